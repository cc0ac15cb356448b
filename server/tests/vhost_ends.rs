//! How sessions end: clients that block, leave, die or take their memory away, and a door that closes.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/disks.rs"]
mod disks;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use disks::Gated;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vmm_sys_util::eventfd::EventFd;

fn fixture() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(64 << 20)).unwrap(), 2)
}

#[test]
fn a_client_whose_notifications_block_hurts_nobody_but_itself() {
    let fixture = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    driver.frontend.set_vring_call(0, &full).unwrap();
    for _ in 0..10 {
        let before = driver.vrings[0].used_index(&driver.memory);
        driver.prepare(T_FLUSH, 0, &[]);
        eventually("the request completes", || {
            driver.vrings[0].used_index(&driver.memory) != before
        });
    }
    // What is due goes to a new descriptor without waiting for the old one.
    let fresh = EventFd::new(0).unwrap();
    driver.frontend.set_vring_call(0, &fresh).unwrap();
    assert!(
        readable(&fresh, PATIENCE),
        "the old descriptor is in the way"
    );
    driver.frontend.set_vring_call(0, &full).unwrap();
    driver.prepare(T_FLUSH, 0, &[]);
    std::thread::sleep(Duration::from_millis(20));
    // Once it is read, what was due arrives.
    assert_eq!(full.read().unwrap(), u64::MAX - 1);
    assert!(readable(&full, PATIENCE));
    full.write(u64::MAX - 2).unwrap();
    drop(driver);
    fixture.wait_empty();
}

/// It fills its notification descriptor, which nobody empties, and goes; perhaps it stops the vring first.
#[test]
fn a_client_that_goes_with_notifications_that_nobody_takes_leaves_the_disk_to_others() {
    for stops in [false, true] {
        goes_with_notifications_that_nobody_takes(stops);
    }
}

fn goes_with_notifications_that_nobody_takes(stops: bool) {
    let fixture = fixture();
    let stream = fixture.connect();
    let mut raw = stream.try_clone().unwrap();
    let mut driver = Driver::running(stream, USUAL);
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    driver.frontend.set_vring_call(0, &full).unwrap();
    for _ in 0..3 {
        let before = driver.vrings[0].used_index(&driver.memory);
        driver.prepare(T_FLUSH, 0, &[]);
        eventually("the request completes", || {
            driver.vrings[0].used_index(&driver.memory) != before
        });
    }
    // GET_VRING_BASE of vring 0.
    let stop = [11u32, 1, 8, 0, 0].map(u32::to_ne_bytes).concat();
    if stops {
        raw.write_all(&stop).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(fixture.door.sessions().len(), 1);
    }
    drop((driver, raw));
    fixture.wait_empty();
    let mut next = Driver::running(fixture.connect(), USUAL);
    assert_eq!(next.read(0, 512).0, OK);
}

#[test]
fn a_writable_export_has_one_client_and_the_next_one_follows_at_once() {
    let fixture = fixture();
    let first = Driver::running(fixture.connect(), USUAL);
    let mut refused = fixture.connect();
    refused.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0, "closed at once");
    assert_eq!(fixture.door.sessions().len(), 1);
    let pid = i32::try_from(std::process::id()).unwrap();
    assert_eq!(fixture.door.sessions()[0].peer_pid, Some(pid));
    drop(first);
    let mut next = Driver::running(fixture.connect(), USUAL);
    assert_eq!(next.read(0, 512).0, OK);
}

/// Open descriptors, threads and shared mappings of this process that belong to `fixture`.
fn belongings() -> (usize, usize) {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let guests = maps
        .lines()
        .filter(|line| line.contains("memfd:guest"))
        .count();
    (count("/proc/self/task"), guests)
}

#[test]
fn clients_that_hang_up_in_any_state_leave_nothing_behind() {
    // A process of its own, so that other tests do not count.
    const INNER: &str = "UBLKUP_TEST_ALONE";
    if std::env::var_os(INNER).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "clients_that_hang_up_in_any_state_leave_nothing_behind",
            ])
            .env(INNER, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let (fixture, gate) = Gated::fixture(64 << 20, 2);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = None;
    for round in 0..105 {
        let mut driver = Driver::connect(fixture.connect(), USUAL);
        match round % 5 {
            0 => {}
            1 => driver.add_vring(128),
            2 => {
                driver.add_vring(128);
                driver.add_vring(128);
                driver.prepare(T_IN, 0, &[(512, WRITE)]);
                gate.write(1).unwrap();
            }
            3 => {
                driver.add_vring(128);
                driver.prepare(T_IN, 0, &[(512, WRITE)]);
                gate.write(1).unwrap();
                driver.frontend.get_vring_base(0).unwrap();
            }
            _ => assert!(driver.frontend.set_vring_base(1000, 0).is_err()),
        }
        drop(driver);
        fixture.wait_empty();
        // A request that was not taken before the client hung up leaves its unit at the gate.
        let _ = gate.read();
        if round == 4 {
            eventually("threads end", || belongings() == (3, 0));
            before = Some(descriptors());
        }
    }
    eventually("threads end", || belongings() == (3, 0));
    assert_eq!(Some(descriptors()), before);
}

#[test]
fn memory_cut_short_ends_that_session_and_no_other() {
    let mut limits = limits(1 << 20);
    limits.read_only = true;
    let fixture = Fixture::new(MemoryDisk::new(limits).unwrap(), 1);
    let features = VERSION_1 | PROTOCOL;
    let mut good = Driver::running(fixture.connect(), features);
    let mut bad = Driver::running(fixture.connect(), features);
    assert_eq!(bad.read(0, 4096).0, OK);
    let (kick, file) = (
        bad.vrings[0].kick.try_clone().unwrap(),
        bad.memory.file.try_clone().unwrap(),
    );
    // From here on this process must not touch the memory either.
    ftruncate(&file, 0).unwrap();
    kick.write(1).unwrap();
    eventually("the session ends", || fixture.door.sessions().len() == 1);
    assert_eq!(good.read(0, 4096).0, OK);
}

#[test]
fn a_record_cut_short_ends_that_session_and_no_other() {
    let mut limits = limits(1 << 20);
    limits.read_only = true;
    let fixture = Fixture::new(MemoryDisk::new(limits).unwrap(), 1);
    let features = VERSION_1 | PROTOCOL;
    let mut good = Driver::running(fixture.connect(), features);
    let mut bad = Driver::connect(fixture.connect(), features);
    let wanted = VhostUserInflight::new(0, 0, 1, 128);
    let (told, _) = bad.frontend.get_inflight_fd(&wanted).unwrap();
    // The server's own file cannot be cut, but a client may send another one.
    let record = memfd_create("record", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&record, told.mmap_size).unwrap();
    let fd = record.as_raw_fd();
    bad.frontend.set_inflight_fd(&told, fd).unwrap();
    bad.add_vring(128);
    assert_eq!(bad.read(0, 4096).0, OK);
    ftruncate(&record, 0).unwrap();
    bad.prepare(T_IN, 0, &[(4096, WRITE)]);
    eventually("the session ends", || fixture.door.sessions().len() == 1);
    assert_eq!(good.read(0, 4096).0, OK);
}

#[test]
fn closing_the_door_finishes_what_is_under_way() {
    let (fixture, gate) = Gated::fixture(64 << 20, 1);
    let Fixture { door, scratch, .. } = fixture;
    let stream = UnixStream::connect(door.path()).unwrap();
    let mut driver = Driver::running(stream, USUAL | EVENT_IDX);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    driver.vrings[0].wait_taken(&driver.memory);
    let path = door.path().to_owned();
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        gate.write(1).unwrap();
    });
    assert_eq!(door.stop(PATIENCE), 0);
    assert_eq!(driver.vrings[0].used_index(&driver.memory), 1);
    assert!(!path.exists());
    opener.join().unwrap();
    drop(scratch);
}

/// Whether a closed door let go of the disk while two clients that it turned away were still connected.
fn closes_before_those_that_it_turned_away_hang_up() -> bool {
    let fixture = fixture();
    let mut broken = fixture.connect();
    eventually("it is admitted", || fixture.door.sessions().len() == 1);
    let owner = Driver::running(fixture.connect(), USUAL);
    let mut refused = fixture.connect();
    broken.write_all(&[0xff; 12]).unwrap();
    for stream in [&mut refused, &mut broken] {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "it is turned away");
    }
    let Fixture {
        door, ownership, ..
    } = fixture;
    assert_eq!(door.stop(PATIENCE), 0);
    eventually("the disk is let go of", || {
        Arc::strong_count(&ownership) == 1
    });
    drop(owner);
    // Nobody reads what is written to a client's past.
    let is_connected = |mut stream: UnixStream| stream.write(&[0]).is_ok();
    is_connected(refused) && is_connected(broken)
}

#[test]
fn clients_that_are_turned_away_do_not_hold_the_disk() {
    // They are waited for as long as a machine may take that has much to do.
    let in_time = (0..5).any(|_| closes_before_those_that_it_turned_away_hang_up());
    assert!(in_time, "the disk is held until they hang up");
}
