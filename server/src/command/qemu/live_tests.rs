//! The exchange of a disk against a scripted monitor: which commands, in which order, and what
//! happens when one of them fails.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use super::*;

/// What the monitor answers to a command; all commands in order, or it hangs up.
type Script = Vec<(&'static str, Vec<Value>)>;

struct Monitor {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    thread: JoinHandle<Vec<Value>>,
}

impl Monitor {
    fn start(script: Script) -> Self {
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
                for answer in answers {
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

fn old() -> OldDisk {
    OldDisk {
        device: "disk".into(),
        node: "node".into(),
        node_is_devices_own: false,
        filename: "/dev/ublkb0".into(),
        direct: true,
        no_flush: false,
        read_only: false,
        place: vec![("bus", json!("port0")), ("bootindex", json!(1))],
    }
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
        ("chardev-add", vec![ok()]),
        ("device_add", vec![ok()]),
    ]);
    let mut qmp = monitor.connect();
    let mut settled = false;
    exchange(&mut qmp, &old(), "/dev/self/fd/7/vhost-user-blk", || {
        settled = true;
        Ok(())
    })
    .unwrap();
    assert!(settled);
    let heard = monitor.heard(qmp);
    assert_eq!(heard[1], json!({ "node-name": "node" }));
    let address = &heard[2]["backend"]["data"]["addr"]["data"]["path"];
    assert_eq!(address, "/dev/self/fd/7/vhost-user-blk");
    assert_eq!(
        heard[3],
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
        let error = exchange(&mut qmp, &old(), "/a", || unreachable!()).unwrap_err();
        assert!(error.is::<NotUpgradable>(), "{error:#}");
        monitor.heard(qmp);
    }
}

#[test]
fn the_old_device_comes_back_when_the_new_one_cannot_be_plugged_in() {
    let monitor = Monitor::start(vec![
        ("device_del", vec![ok(), event("DEVICE_DELETED", "disk")]),
        ("blockdev-del", vec![ok()]),
        ("chardev-add", vec![ok()]),
        ("device_add", vec![no("connection refused")]),
        ("chardev-remove", vec![ok()]),
        ("query-named-block-nodes", vec![json!({ "return": [] })]),
        ("blockdev-add", vec![ok()]),
        ("device_add", vec![ok()]),
    ]);
    let mut qmp = monitor.connect();
    let error = exchange(&mut qmp, &old(), "/a", || Ok(())).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("has the block device back") && said.contains("connection refused"),
        "{said}"
    );
    let heard = monitor.heard(qmp);
    assert_eq!(heard[6]["filename"], "/dev/ublkb0");
    assert_eq!(heard[6]["cache"]["direct"], true);
    assert_eq!(heard[7]["drive"], "node");
    assert_eq!(heard[7]["bus"], "port0");
}

#[test]
fn a_node_that_is_still_there_is_used_again() {
    let monitor = Monitor::start(vec![
        ("device_del", vec![ok(), event("DEVICE_DELETED", "disk")]),
        ("blockdev-del", vec![no("Node 'node' is busy")]),
        (
            "query-named-block-nodes",
            vec![json!({ "return": [{ "node-name": "node" }] })],
        ),
        ("device_add", vec![no("no slot")]),
    ]);
    let mut qmp = monitor.connect();
    let error = exchange(&mut qmp, &old(), "/a", || unreachable!()).unwrap_err();
    let said = format!("{error:#}");
    assert!(
        said.contains("without the disk") && said.contains("no slot"),
        "{said}"
    );
    monitor.heard(qmp);
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
