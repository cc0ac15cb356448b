//! A file or device has one server that writes, or several that read.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ublkup::engine::StorageControl;
use ublkup::storage::{CacheMode, File};

use crate::common::file_options;
use crate::devices::Loop;
use crate::{claimed_later, claims_later, is_in_use, open, read_only};
use crate::{refusal, run, scratch, sparse};

/// Storage that is claimed when a guest wants it: two servers open it, one at a time has it.
fn one_at_a_time(path: &Path) {
    let (source, target) = (claimed_later(path), claimed_later(path));
    let soon = Duration::from_millis(100);
    assert_eq!(source.claim(soon), Ok(true));
    assert_eq!(source.claim(soon), Ok(false), "it has it");
    assert!(target.claim(soon).unwrap_err().contains("in use"));
    // Nor does it go with servers whose guests do not move.
    assert!(is_in_use(path));
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| target.claim(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        source.release();
        waiting.join().unwrap()
    });
    assert_eq!(waiting, Ok(true));
    assert!(source.claim(soon).is_err());
    drop(target);
    assert_eq!(source.claim(soon), Ok(true));
    source.release();
    source.release();
    // One that does not let go would have it for good, and so it sees when it starts that it cannot.
    assert!(refusal(file_options(path, CacheMode::Auto)).contains("--migration"));
    drop(source);
    let stays = open(path);
    assert!(refusal(claims_later(path)).contains("without --migration"));
    drop(stays);
    drop(claimed_later(path));
}

#[test]
fn a_file_that_is_claimed_later_is_had_by_one_server_at_a_time() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    one_at_a_time(&path);
    // A disk that others cut short is not the one that the guest knows.
    let disk = claimed_later(&path);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 19).unwrap();
    let refused = disk.claim(Duration::ZERO).unwrap_err();
    assert!(refused.contains("shorter"), "{refused}");
    // And it has not kept the claim.
    assert_eq!(claimed_later(&path).claim(Duration::ZERO), Ok(true));
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_device_that_is_claimed_later_is_had_by_one_server_or_mount_at_a_time() {
    let device = Loop::new(16 << 20, &[]);
    one_at_a_time(&device.device);
    let name = device.device.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", name]);
    let dir = tempfile::tempdir().unwrap();
    let mount = || Command::new("mount").arg(name).arg(dir.path()).output();
    let mounts = || mount().unwrap().status.success();
    let unmount = || run("umount", &[dir.path().to_str().unwrap()]);
    let disk = claimed_later(&device.device);
    assert!(mounts(), "it is not claimed yet");
    let refused = disk.claim(Duration::ZERO).unwrap_err();
    assert!(
        refused.contains(name) && refused.contains("in use"),
        "{refused}"
    );
    unmount();
    assert_eq!(disk.claim(Duration::ZERO), Ok(true));
    assert!(!mounts(), "it is the disk's");
    disk.release();
    assert!(mounts(), "it is no longer claimed");
    unmount();
}

#[test]
fn a_file_has_one_writer_or_many_readers() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    let reader = File::open(read_only(&path)).unwrap();
    let other = File::open(read_only(&path)).unwrap();
    assert!(is_in_use(&path));
    drop((reader, other));
    let writer = open(&path);
    assert!(is_in_use(&path));
    assert!(refusal(read_only(&path)).contains("in use"));
    drop(writer);
    open(&path);
}

/// Locks one byte for reading as QEMU does with the images it has open.
fn lock_byte(file: &fs::File, byte: i64) {
    // SAFETY: all zeroes is a valid `flock`.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::c_short::try_from(libc::F_RDLCK).unwrap();
    (range.l_start, range.l_len) = (byte, 1);
    // SAFETY: `range` lives through the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    assert_eq!(result, 0);
}

#[test]
fn an_image_that_a_virtual_machine_has_open_is_in_use() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    let image = fs::File::open(&path).unwrap();
    lock_byte(&image, 100);
    assert!(is_in_use(&path));
    File::open(read_only(&path)).unwrap();
}

#[test]
fn a_file_that_is_released_in_a_moment_is_waited_for() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    let writer = open(&path);
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(writer);
    });
    open(&path);
    other.join().unwrap();
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_device_has_one_writer_and_udev_may_look_at_it() {
    let device = Loop::new(1 << 20, &[]);
    let udev = fs::File::open(&device.device).unwrap();
    rustix::fs::flock(&udev, rustix::fs::FlockOperation::NonBlockingLockShared).unwrap();
    let writer = open(&device.device);
    assert!(is_in_use(&device.device));
    drop(writer);
    open(&device.device);
}
