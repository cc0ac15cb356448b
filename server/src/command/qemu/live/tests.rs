//! The exchange of a disk against a scripted monitor: which commands, in which order, and what
//! happens when one of them fails.

mod answers;
mod peer;

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use serde_json::{Value, json};

use super::disk::{Disk, device_of, filename_of};
use super::*;

/// What the monitor answers to a command, all commands in order. [`Value::Null`] is no answer: it says nothing any more.
type Script = Vec<(&'static str, Vec<Value>)>;

struct Monitor {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    thread: JoinHandle<Vec<Value>>,
}

impl Monitor {
    fn start(script: Script) -> Self {
        Self::start_with(script, || {})
    }

    /// `before_event` runs before each event that is told.
    fn start_with(script: Script, before_event: impl Fn() + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            writeln!(stream, "{}", json!({ "QMP": { "version": {} } })).unwrap();
            let mut heard = Vec::new();
            let capabilities = ("qmp_capabilities", vec![ok()]);
            for (name, answers) in std::iter::once(capabilities).chain(script) {
                let line = lines.next().expect("one more command").unwrap();
                let command: Value = serde_json::from_str(&line).unwrap();
                assert_eq!(command["execute"], name);
                heard.push(command["arguments"].clone());
                for mut answer in answers {
                    if answer.is_null() {
                        stream.shutdown(Shutdown::Write).unwrap();
                        break;
                    }
                    if answer.get("id").is_none() {
                        answer["id"] = command["id"].clone();
                    }
                    if answer.get("event").is_some() {
                        before_event();
                    }
                    writeln!(stream, "{answer}").unwrap();
                }
            }
            assert!(lines.next().is_none(), "there were more commands");
            heard
        });
        Self {
            _dir: dir,
            socket,
            thread,
        }
    }

    fn connect(&self) -> Qmp {
        Qmp::connect(&self.socket).unwrap()
    }

    /// The arguments of all commands after the capabilities.
    fn heard(self, qmp: Qmp) -> Vec<Value> {
        drop(qmp);
        self.thread.join().unwrap().split_off(1)
    }
}

fn ok() -> Value {
    json!({ "return": {} })
}

fn no(why: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": why } })
}

fn event(name: &str, device: &str) -> Value {
    json!({ "event": name, "data": { "device": device }, "timestamp": {} })
}

fn returns(value: Value) -> Value {
    json!({ "return": value })
}

fn old() -> Disk {
    let place = json!({ "bus": "port0", "bootindex": 1 });
    Disk {
        device: "disk".into(),
        node: "node".into(),
        node_is_devices_own: false,
        filename: "/dev/ublkb0".into(),
        direct: true,
        no_flush: false,
        read_only: false,
        serial: Some("s1".into()),
        place: serde_json::from_value(place).unwrap(),
    }
}

/// An exchange of that disk for the service.
fn exchange_old(
    qmp: &mut Qmp,
    interrupted: &Interrupted,
    settle: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let old = old();
    let to = Attached::Service(&old, "/dev/self/fd/7/vhost-user-blk");
    or_unknown(exchange(
        qmp,
        interrupted,
        Attached::Block(&old),
        to,
        settle,
    ))
}

/// `Interrupted` as if a signal had come.
fn interrupted() -> Interrupted {
    let interrupted = Interrupted::default();
    interrupted.0.store(true, Ordering::Relaxed);
    interrupted
}

#[test]
fn the_new_device_comes_after_the_old_one_has_gone_and_its_node_is_closed() {
    let monitor = Monitor::start(vec![
        (
            "device_del",
            // Another device's event comes first; ours even before the answer.
            vec![
                event("DEVICE_DELETED", "other"),
                event("DEVICE_DELETED", "disk"),
                ok(),
            ],
        ),
        ("blockdev-del", vec![ok()]),
        ("query-chardev", vec![returns(json!([]))]),
        ("chardev-add", vec![ok()]),
        ("device_add", vec![ok()]),
    ]);
    let mut qmp = monitor.connect();
    let mut settled = false;
    exchange_old(&mut qmp, &Interrupted::default(), || {
        settled = true;
        Ok(())
    })
    .unwrap();
    assert!(settled);
    let heard = monitor.heard(qmp);
    assert_eq!(heard[1], json!({ "node-name": "node" }));
    let address = &heard[3]["backend"]["data"]["addr"]["data"]["path"];
    assert_eq!(address, "/dev/self/fd/7/vhost-user-blk");
    assert_eq!(
        heard[4],
        json!({
            "driver": "vhost-user-blk-pci", "id": "disk", "chardev": "disk-ublkup",
            "bus": "port0", "bootindex": 1,
        })
    );
}

#[test]
fn a_disk_that_cannot_be_unplugged_is_left_alone() {
    for answers in [
        vec![no("Bus 'pcie.0' does not support hotplugging")],
        vec![ok(), event("DEVICE_UNPLUG_GUEST_ERROR", "disk")],
    ] {
        let monitor = Monitor::start(vec![("device_del", answers)]);
        let mut qmp = monitor.connect();
        let error = exchange_old(&mut qmp, &Interrupted::default(), || unreachable!()).unwrap_err();
        assert!(error.is::<NotUpgradable>(), "{error:#}");
        monitor.heard(qmp);
    }
}

#[test]
fn a_monitor_that_goes_away_is_not_said_to_have_changed_nothing() {
    let monitor = Monitor::start(vec![]);
    let mut qmp = monitor.connect();
    qmp.stream().shutdown(Shutdown::Both).unwrap();
    let error = exchange_old(&mut qmp, &Interrupted::default(), || unreachable!()).unwrap_err();
    assert!(!error.is::<NotUpgradable>(), "{error:#}");
}

#[test]
fn the_old_device_comes_back_when_the_new_one_cannot_be_plugged_in() {
    let monitor = Monitor::start(vec![
        ("device_del", vec![ok(), event("DEVICE_DELETED", "disk")]),
        ("blockdev-del", vec![ok()]),
        ("query-chardev", vec![returns(json!([]))]),
        ("chardev-add", vec![ok()]),
        ("device_add", vec![no("connection refused")]),
        ("chardev-remove", vec![ok()]),
        ("query-named-block-nodes", vec![returns(json!([]))]),
        ("blockdev-add", vec![ok()]),
        ("device_add", vec![ok()]),
    ]);
    let mut qmp = monitor.connect();
    let error = exchange_old(&mut qmp, &Interrupted::default(), || Ok(())).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("has the block device back") && said.contains("connection refused"),
        "{said}"
    );
    let heard = monitor.heard(qmp);
    assert_eq!(heard[7]["filename"], "/dev/ublkb0");
    assert_eq!(heard[7]["cache"]["direct"], true);
    let device = json!({
        "driver": "virtio-blk-pci", "id": "disk", "drive": "node", "serial": "s1",
        "bus": "port0", "bootindex": 1,
    });
    assert_eq!(heard[8], device);
}

#[test]
fn a_node_that_is_still_there_is_used_again() {
    let monitor = Monitor::start(vec![
        ("device_del", vec![ok(), event("DEVICE_DELETED", "disk")]),
        ("blockdev-del", vec![no("Node 'node' is busy")]),
        (
            "query-named-block-nodes",
            vec![returns(json!([{ "node-name": "node" }]))],
        ),
        ("device_add", vec![no("no slot")]),
    ]);
    let mut qmp = monitor.connect();
    let error = exchange_old(&mut qmp, &Interrupted::default(), || unreachable!()).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("without the disk") && said.contains("no slot"),
        "{said}"
    );
    monitor.heard(qmp);
}

#[test]
fn a_node_whose_name_qemu_made_up_is_added_under_another_one() {
    let old = Disk {
        node: "#block123".into(),
        node_is_devices_own: true,
        ..old()
    };
    let monitor = Monitor::start(vec![
        ("query-named-block-nodes", vec![returns(json!([]))]),
        ("blockdev-add", vec![ok()]),
        ("device_add", vec![ok()]),
    ]);
    let mut qmp = monitor.connect();
    Attached::Block(&old).plug(&mut qmp).unwrap();
    let heard = monitor.heard(qmp);
    assert_eq!(heard[1]["node-name"], "disk-node");
    assert_eq!(heard[2]["drive"], "disk-node");
}

#[test]
fn a_disk_that_moves_back_is_off_the_service_before_it_is_on_the_block_device() {
    let monitor = Monitor::start(vec![
        ("device_del", vec![ok(), event("DEVICE_DELETED", "disk")]),
        ("chardev-remove", vec![ok()]),
        ("query-named-block-nodes", vec![returns(json!([]))]),
        ("blockdev-add", vec![ok()]),
        ("device_add", vec![ok()]),
    ]);
    let mut qmp = monitor.connect();
    let old = old();
    let mut settled = false;
    let (from, to) = (Attached::Service(&old, "/a"), Attached::Block(&old));
    exchange(&mut qmp, &Interrupted::default(), from, to, || {
        settled = true;
        Ok(())
    })
    .unwrap();
    assert!(settled);
    let heard = monitor.heard(qmp);
    assert_eq!(heard[1], json!({ "id": "disk-ublkup" }));
    assert_eq!(heard[4]["drive"], "node");
}

#[test]
fn a_signal_before_the_unplugging_changes_nothing() {
    let monitor = Monitor::start(vec![]);
    let mut qmp = monitor.connect();
    let error = exchange_old(&mut qmp, &interrupted(), || unreachable!()).unwrap_err();
    assert!(error.is::<NotUpgradable>(), "{error:#}");
    monitor.heard(qmp);
}

#[test]
fn a_signal_while_the_guest_is_waited_for_gives_it_the_old_device_back() {
    let interrupted = Interrupted::default();
    let flag = std::sync::Arc::clone(&interrupted.0);
    let signal = move || flag.store(true, Ordering::Relaxed);
    let monitor = Monitor::start_with(
        vec![
            ("device_del", vec![ok(), event("DEVICE_DELETED", "disk")]),
            (
                "query-named-block-nodes",
                vec![returns(json!([{ "node-name": "node" }]))],
            ),
            ("device_add", vec![ok()]),
        ],
        signal,
    );
    let mut qmp = monitor.connect();
    let error = exchange_old(&mut qmp, &interrupted, || unreachable!()).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("has the block device back: interrupted"),
        "{said}"
    );
    assert_eq!(monitor.heard(qmp)[2]["driver"], "virtio-blk-pci");
}

#[test]
fn a_signal_is_noticed() {
    let interrupted = Interrupted::listen().unwrap();
    assert!(!interrupted.is_asked());
    signal_hook::low_level::raise(signal_hook::consts::SIGHUP).unwrap();
    assert!(interrupted.is_asked());
    // A second one would end the program.
    interrupted.0.store(false, Ordering::Relaxed);
}

/// The answer to `query-fdsets` for a disk that was moved, or whose move was cut off.
fn sets(disk: &Disk) -> Value {
    let note = Note {
        disk: disk.clone(),
        entry: None,
    };
    let opaque = format!("ublkup {}", serde_json::to_string(&note).unwrap());
    returns(json!([
        { "fdset-id": 1, "fds": [{ "fd": 8, "opaque": "rdwr:/dev/other" }] },
        { "fdset-id": 2, "fds": [{ "fd": 9, "opaque": opaque }] },
    ]))
}

#[test]
fn what_qemu_was_given_is_found_again_with_what_was_noted() {
    let old = old();
    let monitor = Monitor::start(vec![("query-fdsets", vec![sets(&old)])]);
    let mut qmp = monitor.connect();
    let found = given(&mut qmp).unwrap();
    let [given] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!(given.note.disk, old);
    assert_eq!(given.address(), "/dev/self/fd/9/vhost-user-blk");
    monitor.heard(qmp);
}

#[test]
fn a_claim_that_a_killed_move_left_is_taken_back_and_one_in_use_is_not() {
    let old = old();
    let chardevs = |label: &str| vec![returns(json!([{ "label": label }]))];
    let removed: (_, Vec<_>) = ("remove-fd", vec![ok()]);
    for (script, tidied) in [
        (vec![("query-chardev", chardevs("disk-ublkup"))], true),
        (
            vec![
                ("query-chardev", chardevs("serial0")),
                ("qom-get", vec![returns(json!("virtio-blk-pci"))]),
                removed,
            ],
            true,
        ),
        (
            vec![
                ("query-chardev", chardevs("serial0")),
                (
                    "qom-get",
                    vec![no("Device '/machine/peripheral/disk' not found")],
                ),
            ],
            false,
        ),
    ] {
        let script = [("query-fdsets", vec![sets(&old)])]
            .into_iter()
            .chain(script);
        let monitor = Monitor::start(script.collect());
        let mut qmp = monitor.connect();
        let peer = Peer::of(qmp.stream()).unwrap();
        let result = tidy_up(&mut qmp, &peer, Wanted::Name("disk"));
        assert_eq!(result.is_ok(), tidied, "{result:?}");
        let heard = monitor.heard(qmp);
        if heard.len() == 4 {
            assert_eq!(heard[3], json!({ "fdset-id": 2 }));
        }
    }
}

#[test]
fn a_guest_that_does_not_run_is_left_alone() {
    for (status, good) in [
        (json!({ "running": true, "status": "running" }), true),
        (json!({ "running": false, "status": "paused" }), false),
    ] {
        let monitor = Monitor::start(vec![("query-status", vec![returns(status)])]);
        let mut qmp = monitor.connect();
        let result = expect_running(&mut qmp);
        assert_eq!(result.is_ok(), good);
        if let Err(error) = result {
            assert!(error.is::<NotUpgradable>() && error.to_string().contains("'paused'"));
        }
        monitor.heard(qmp);
    }
}

fn stats(writes: u64, idle: Option<u64>) -> Vec<Value> {
    let mut stats = json!({ "wr_operations": writes });
    if let Some(idle) = idle {
        stats["idle_time_ns"] = json!(idle);
    }
    let qdev = "/machine/peripheral/disk/virtio-backend";
    vec![returns(json!([{ "qdev": qdev, "stats": stats }]))]
}

#[test]
fn a_disk_is_quiet_when_its_last_request_is_long_ago() {
    const SECOND: u64 = 1_000_000_000;
    let what = "query-blockstats";
    for (answers, good) in [
        // Long ago; never.
        (
            vec![stats(5, Some(41 * SECOND)), stats(5, Some(41 * SECOND))],
            true,
        ),
        (vec![stats(0, None), stats(0, None)], true),
        // It is watched until then, and is used meanwhile or not.
        (
            vec![
                stats(5, Some(39 * SECOND)),
                stats(5, Some(40 * SECOND - 1)),
                stats(5, Some(40 * SECOND)),
            ],
            true,
        ),
        (
            vec![
                stats(5, Some(39 * SECOND)),
                stats(5, Some(40 * SECOND - 1)),
                stats(6, Some(0)),
            ],
            false,
        ),
    ] {
        let script = answers.into_iter().map(|answer| (what, answer));
        let monitor = Monitor::start(script.collect());
        let mut qmp = monitor.connect();
        let result = expect_quiet(&mut qmp, &old(), Duration::from_secs(40));
        assert_eq!(result.is_ok(), good, "{result:?}");
        monitor.heard(qmp);
    }
}

#[test]
fn a_path_is_a_device_and_no_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = device_named(file.path().to_str().unwrap()).unwrap_err();
    assert!(error.is::<NotUpgradable>(), "{error:#}");
    for name in ["disk", "/machine/peripheral-anon/device[3]"] {
        assert!(device_named(name).unwrap().is_none(), "{name}");
    }
}

#[test]
fn memory_that_is_not_shared_keeps_the_guest_where_it_is() {
    for (backends, good) in [
        (json!([]), false),
        (json!([{ "share": true }, { "share": false }]), false),
        (json!([{ "share": true }]), true),
    ] {
        let monitor = Monitor::start(vec![("query-memdev", vec![json!({ "return": backends })])]);
        let mut qmp = monitor.connect();
        assert_eq!(check_memory(&mut qmp).is_ok(), good, "{backends}");
        monitor.heard(qmp);
    }
}

#[test]
fn devices_and_files_are_read_from_what_qemu_says() {
    let device = |path: &str| device_of(&json!({ "qdev": path })).unwrap();
    assert_eq!(device("/machine/peripheral/disk/virtio-backend"), "disk");
    assert_eq!(
        device("/machine/peripheral-anon/device[3]/virtio-backend"),
        "/machine/peripheral-anon/device[3]"
    );
    assert_eq!(device_of(&json!({})), None);
    assert_eq!(filename_of("/dev/ublkb0"), "/dev/ublkb0");
    let options = "json:{\"driver\": \"raw\", \"file\": {\"filename\": \"/dev/ublkb1\"}}";
    assert_eq!(filename_of(options), "/dev/ublkb1");
}
