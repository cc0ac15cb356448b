//! What is found out before anything changes: claims that were left, the guest, its disk, the monitor's process.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use super::*;
use crate::command::qemu::live::disk::{device_of, filename_of};

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

/// A file with a name in /dev, opened with these flags beside the access.
fn open_shm(file: &Path, write: bool, flags: OFlags) -> OwnedFd {
    let flags = flags.bits().cast_signed();
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(flags);
    options.open(file).unwrap().into()
}

#[test]
fn a_process_gets_only_what_it_has_open_itself() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, "").unwrap();
    let monitor = Monitor::start(vec![]);
    let qmp = monitor.connect();
    let peer = Peer::of(qmp.stream()).unwrap();
    let inode = rustix::fs::stat(&file).unwrap().st_ino;
    let is_it = |fd: &OwnedFd| rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_ino == inode);
    let may = |access| peer.expect_open(&file, access, is_it).is_ok();
    assert!(!may(Access::Read));
    for (write, flags, reads, writes) in [
        (false, OFlags::PATH, false, false),
        (false, OFlags::empty(), true, false),
        (true, OFlags::empty(), true, true),
    ] {
        let opened = open_shm(&file, write, flags);
        assert_eq!(
            (may(Access::Read), may(Access::ReadWrite)),
            (reads, writes),
            "{flags:?}"
        );
        drop(opened);
    }
    let error = peer
        .expect_open(&file, Access::ReadWrite, is_it)
        .unwrap_err();
    assert!(error.is::<NotUpgradable>(), "{error:#}");
    monitor.heard(qmp);
}

#[test]
fn what_is_named_outside_dev_is_not_looked_up() {
    let monitor = Monitor::start(vec![]);
    let qmp = monitor.connect();
    let peer = Peer::of(qmp.stream()).unwrap();
    for name in [
        "/proc/1/root/dev/loop0",
        "/tmp/../dev/loop0",
        "loop0",
        "/dev/../proc",
        "/dev/stdin",
    ] {
        assert!(peer.block_device(name).is_err(), "{name}");
    }
    monitor.heard(qmp);
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
