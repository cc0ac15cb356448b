//! What is looked at of the process behind a monitor, and what is left alone.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use testkit::namespaces::{is_inside, run_inside};

use super::super::peer::file_system;
use super::*;

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
fn only_what_a_dev_is_made_of_is_copied() {
    let monitor = Monitor::start(vec![]);
    let qmp = monitor.connect();
    let peer = Peer::of(qmp.stream()).unwrap();
    let copies = |file: &Path| peer.copy(File::open(file).unwrap().as_raw_fd()).is_some();
    assert!(copies(Path::new("/dev/null")));
    assert!(!copies(Path::new("/proc/self/stat")));
    assert!(!copies(Path::new("/sys")));
    assert!(peer.copy(qmp.stream().as_raw_fd()).is_none(), "a socket");
    monitor.heard(qmp);
}

#[test]
fn the_type_of_a_mount_is_read_whatever_users_call_it() {
    let mounts = "\
24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,size=4k
31 24 0:27 / /dev/x\\040-\\040tmpfs rw shared:1 master:2 - fuse.tmpfs - rw - tmpfs
32 24 0:28 / - rw - fuse tmpfs rw
";
    assert_eq!(file_system(mounts, "24"), Some("devtmpfs"));
    assert_eq!(file_system(mounts, "31"), Some("fuse.tmpfs"));
    assert_eq!(file_system(mounts, "32"), Some("fuse"));
    assert_eq!(file_system(mounts, "27"), None);
}

/// Requests of FUSE.
const INIT: u32 = 26;
const OPENDIR: u32 = 27;

/// A file system at `place` that can be opened. What else it is asked fails, and is told.
fn mount_fuse(place: &Path) -> Receiver<u32> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let mut device = device.unwrap();
    let mounted = Command::new("mount")
        .args(["-i", "-t", "fuse", "none"])
        .arg(place)
        .args(["-o", "fd=0,rootmode=40000,user_id=0,group_id=0"])
        .stdin(Stdio::from(device.try_clone().unwrap()))
        .status();
    assert!(mounted.unwrap().success());
    let (asked, requests) = channel();
    std::thread::spawn(move || {
        let mut request = vec![0; 1 << 18];
        while let Ok(40..) = device.read(&mut request) {
            let opcode = u32::from_ne_bytes(request[4..8].try_into().unwrap());
            let body: &[u32] = match opcode {
                // Version 7.31; all else is 0 but the most bytes of a write.
                INIT => &[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                OPENDIR => &[0; 4],
                _ => &[],
            };
            let failed = if body.is_empty() { -libc::EIO } else { 0 };
            let length = u32::try_from(16 + 4 * body.len()).unwrap();
            let mut answer = [length.to_ne_bytes(), failed.to_ne_bytes()].concat();
            answer.extend_from_slice(&request[8..16]);
            answer.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
            let told = asked.send(opcode);
            if device.write_all(&answer).is_err() || told.is_err() {
                break;
            }
        }
    });
    requests
}

/// The server of such a file system may never answer, and who waits for it cannot be killed.
#[test]
fn a_file_system_of_the_process_is_asked_nothing() {
    if !is_inside() {
        if Path::new("/dev/fuse").exists() {
            let test =
                "command::qemu::live::tests::peer::a_file_system_of_the_process_is_asked_nothing";
            run_inside(["--mount"], test, Stdio::null());
        }
        return;
    }
    // A name in /dev, which any process can have for it in a mount namespace of its own.
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let requests = mount_fuse(place.path());
    let opened = File::open(place.path()).unwrap();
    let while_opening: Vec<_> = requests.try_iter().collect();
    assert!(while_opening.contains(&OPENDIR), "{while_opening:?}");

    let monitor = Monitor::start(vec![]);
    let qmp = monitor.connect();
    let peer = Peer::of(qmp.stream()).unwrap();
    let looked = peer.expect_open(place.path(), Access::Read, |fd| block_number(fd) == Some(1));
    assert!(looked.unwrap_err().is::<NotUpgradable>());
    assert!(
        peer.copy(opened.as_raw_fd())
            .as_ref()
            .and_then(block_number)
            .is_none()
    );
    let name = format!("/proc/self/fd/{}", opened.as_raw_fd());
    assert!(peer.block_device(&name).is_err());
    let asked: Vec<_> = requests.try_iter().collect();
    assert!(asked.is_empty(), "{asked:?}");
    monitor.heard(qmp);
    drop(opened);
    assert!(
        Command::new("umount")
            .arg(place.path())
            .status()
            .unwrap()
            .success()
    );
}
