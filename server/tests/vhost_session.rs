//! Whole sessions of the vhost door over real sockets.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/disks.rs"]
mod disks;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use disks::{Gated, Recorder};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use ublkup::door::vhost::{SessionState, StartError, VhostConfig, VhostDoor};
use ublkup::engine::counters::CounterSet;
use ublkup::engine::polling::Polling;
use ublkup::request::Op;
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vmm_sys_util::eventfd::EventFd;

fn fixture() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(64 << 20)).unwrap(), 2)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

fn gated(threads: u16) -> (Fixture, Arc<EventFd>) {
    Gated::fixture(64 << 20, threads)
}

#[test]
fn what_a_client_writes_it_reads_back() {
    for features in [USUAL, USUAL | EVENT_IDX] {
        let fixture = fixture();
        let mut driver = Driver::running(fixture.connect(), features);
        let data = pattern(8192);
        assert_eq!(driver.write(100, &data), OK);
        driver.memory.put(DATA + 4096, &[0; 8192]);
        assert_eq!(driver.read(100, 8192), (OK, data.clone()));
        assert_eq!(driver.request(T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(driver.segment(T_WRITE_ZEROES, 100, 8, 1), OK);
        assert_eq!(driver.segment(T_DISCARD, 108, 2, 0), OK);
        let (status, back) = driver.read(100, 8192);
        assert_eq!(status, OK);
        assert!(back[..5120].iter().all(|&b| b == 0));
        assert_eq!(back[5120..], data[5120..]);
        let totals = fixture.counters.totals();
        assert_eq!((totals.reads, totals.writes, totals.flushes), (2, 1, 1));
        assert_eq!(
            (totals.discards, totals.write_zeroes, totals.errors),
            (1, 1, 0)
        );
    }
}

#[test]
fn the_serial_has_twenty_bytes_and_shorter_buffers_get_less() {
    let fixture = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(driver.request(T_GET_ID, 0, &[(20, WRITE)]), (OK, 21));
    assert_eq!(driver.memory.get(DATA + 4096, 20), b"serial-of-20-letters");
    assert_eq!(driver.request(T_GET_ID, 0, &[(4, WRITE)]), (OK, 5));
}

#[test]
fn any_layout_of_descriptors_is_understood() {
    let fixture = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let data = pattern(1024);
    // Header in three pieces, the last one with the first data; all pieces apart from each other.
    driver.header(DATA, T_OUT, 7);
    let header = driver.memory.get(DATA, 16);
    driver.memory.put(DATA + 0x100, &header[..5]);
    driver.memory.put(DATA + 0x200, &header[5..6]);
    driver.memory.put(DATA + 0x300, &header[6..]);
    driver.memory.put(DATA + 0x30a, &data[..500]);
    driver.memory.put(DATA + 0x800, &data[500..]);
    driver.memory.put(DATA + 16, &[UNTOUCHED]);
    let chain = [
        (DATA + 0x100, 5, 0),
        (DATA + 0x200, 1, 0),
        (DATA + 0x300, 510, 0),
        (DATA + 0x800, 524, 0),
        (DATA + 16, 1, WRITE),
    ];
    driver.submit_on(0, 3, &chain);
    assert_eq!(driver.vrings[0].wait(&driver.memory), (3, 1));
    assert_eq!(driver.memory.byte(DATA + 16), OK);
    // A read whose status byte is the end of the data's descriptor, through an indirect table.
    driver.header(DATA, T_IN, 7);
    let table = DATA + 0x2008;
    driver.memory.descriptor(table, 0, (DATA, 16, NEXT, 2));
    driver
        .memory
        .descriptor(table, 2, (DATA + 0x4000, 24, NEXT | WRITE, 1));
    driver
        .memory
        .descriptor(table, 1, (DATA + 0x5000, 1001, WRITE, 0));
    driver.memory.put(DATA + 0x5000 + 1000, &[UNTOUCHED]);
    driver.submit_on(0, 9, &[(table, 48, TABLE)]);
    assert_eq!(driver.vrings[0].wait(&driver.memory), (9, 1025));
    assert_eq!(driver.memory.byte(DATA + 0x5000 + 1000), OK);
    assert_eq!(driver.memory.get(DATA + 0x4000, 24), data[..24]);
    assert_eq!(driver.memory.get(DATA + 0x5000, 1000), data[24..]);
}

#[test]
fn buffers_may_straddle_memory_regions() {
    let fixture = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let split = DATA + 8192;
    let parts = [
        driver.memory.part(0, split),
        driver.memory.part(split, MEMORY_BYTES - split),
    ];
    driver.frontend.set_mem_table(&parts).unwrap();
    let data = pattern(16384);
    assert_eq!(driver.write(0, &data), OK);
    driver.memory.put(DATA + 4096, &[0; 16384]);
    assert_eq!(driver.read(0, 16384), (OK, data));
}

#[test]
fn the_configuration_is_answered_in_exactly_the_length_asked_for() {
    // Two queues are told of, and one thread would serve them.
    let disk = MemoryDisk::new(limits(64 << 20)).unwrap();
    let fixture = Fixture::with(disk, (2, 1), Polling::default());
    let mut driver = Driver::connect(fixture.connect(), USUAL);
    let flags = VhostUserConfigFlags::WRITABLE;
    for len in [1, 8, 60, 96, 256] {
        let buffer = vec![0xff; len];
        let len = u32::try_from(len).unwrap();
        let (_, config) = driver.frontend.get_config(0, len, flags, &buffer).unwrap();
        assert_eq!(config.len(), buffer.len());
        assert_eq!(config[0], 0);
        if config.len() >= 60 {
            assert_eq!(config[..8], (64u64 << 20 >> 9).to_le_bytes());
            assert_eq!(config[12..16], 126u32.to_le_bytes());
            assert_eq!(config[20..24], 512u32.to_le_bytes());
            assert_eq!(config[24], 3);
            assert_eq!(config[32], 1);
            assert_eq!(config[34..36], 2u16.to_le_bytes());
            assert_eq!(config[36..40], (1u32 << 30 >> 9).to_le_bytes());
            assert_eq!(config[40..44], 1u32.to_le_bytes());
            assert_eq!(config[56], 1);
            assert!(config[60..].iter().all(|&b| b == 0));
        }
    }
    assert_eq!(driver.frontend.get_queue_num().unwrap(), 256);
    assert!(driver.frontend.set_config(0, flags, &[1; 8]).is_err());
}

#[test]
fn a_disk_without_cache_discard_or_writes_does_not_offer_them() {
    let mut limits = limits(1 << 20);
    limits.write_cache = false;
    limits.max_discard_bytes = 0;
    limits.max_write_zeroes_bytes = 0;
    limits.read_only = true;
    let fixture = Fixture::new(MemoryDisk::new(limits).unwrap(), 1);
    let features = VERSION_1 | PROTOCOL;
    let mut first = Driver::running(fixture.connect(), features);
    let offered = first.frontend.get_features().unwrap();
    assert_eq!(offered & (FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES), 0);
    assert_eq!(offered & (1 << 5), 1 << 5, "read-only");
    assert_eq!(first.write(0, &[1; 512]), IOERR);
    assert_eq!(first.segment(T_DISCARD, 0, 8, 0), UNSUPP);
    // Several clients may read at once.
    let mut second = Driver::running(fixture.connect(), features);
    assert_eq!(second.read(0, 512).0, OK);
    assert_eq!(first.read(0, 512).0, OK);
    assert_eq!(fixture.door.sessions().len(), 2);
}

#[test]
fn writes_are_durable_exactly_when_the_cache_is_off() {
    let write_cache_cases = [
        (USUAL, None, false),
        (USUAL, Some(1), false),
        (USUAL, Some(0), true),
        (USUAL & !CONFIG_WCE, None, false),
        (USUAL & !CONFIG_WCE & !FLUSH, None, true),
    ];
    for (features, writeback, durable) in write_cache_cases {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let disk = Recorder {
            limits: limits(1 << 20),
            seen: Arc::clone(&seen),
        };
        let fixture = Fixture::new(disk, 1);
        let mut driver = Driver::running(fixture.connect(), features);
        if let Some(byte) = writeback {
            let flags = VhostUserConfigFlags::WRITABLE;
            driver.frontend.set_config(32, flags, &[byte]).unwrap();
        }
        assert_eq!(driver.write(0, &[1; 512]), OK);
        assert_eq!(driver.segment(T_WRITE_ZEROES, 0, 8, 0), OK);
        let expected = [
            Op::Write { fua: durable },
            Op::WriteZeroes {
                unmap: false,
                fua: durable,
            },
        ];
        assert_eq!(
            *seen.lock().unwrap(),
            expected,
            "{features:#x} {writeback:?}"
        );
    }
}

#[test]
fn a_vring_stops_where_it_is_and_goes_on_from_there() {
    let fixture = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL | EVENT_IDX);
    for sector in 0..5 {
        assert_eq!(driver.write(sector, &[7; 512]), OK);
    }
    driver.frontend.set_vring_enable(0, false).unwrap();
    // Offered while the vring is off: left for later.
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 5);
    assert_eq!(fixture.door.sessions()[0].state, SessionState::Idle);
    assert_eq!(driver.vrings[0].reap(&driver.memory), None);
    driver.start(0, 5);
    assert_eq!(driver.vrings[0].wait(&driver.memory), (0, 513));
    assert_eq!(fixture.door.sessions()[0].state, SessionState::Running);
    assert_eq!(driver.read(4, 512), (OK, vec![7; 512]));
}

#[test]
fn stopping_a_vring_waits_for_what_is_under_way() {
    let (fixture, gate) = gated(1);
    let mut driver = Driver::running(fixture.connect(), USUAL | EVENT_IDX);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    driver.header(DATA + 0x8000, T_IN, 0);
    let second = [
        (DATA + 0x8000, 16, 0),
        (DATA + 0x9000, 512, WRITE),
        (DATA + 0x8010, 1, WRITE),
    ];
    driver.submit_on(0, 10, &second);
    driver.vrings[0].wait_taken(&driver.memory);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        gate.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        gate.write(1).unwrap();
    });
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 2);
    assert_eq!(driver.vrings[0].used_index(&driver.memory), 2);
    assert_eq!(driver.memory.get(DATA + 0x9000, 512), [0x5a; 512]);
    assert!(readable(&driver.vrings[0].call, Duration::ZERO));
    opener.join().unwrap();
}

#[test]
fn memory_may_be_added_and_removed_while_requests_use_it() {
    let (fixture, gate) = gated(1);
    let mut driver = Driver::connect(fixture.connect(), USUAL | EVENT_IDX);
    let low = driver.memory.part(0, DATA + 8192);
    let high = driver.memory.part(DATA + 8192, MEMORY_BYTES - DATA - 8192);
    driver.frontend.set_mem_table(&[low]).unwrap();
    assert_eq!(driver.frontend.get_max_mem_slots().unwrap(), 512);
    driver.add_vring(128);
    driver.frontend.add_mem_region(&high).unwrap();
    // 8 KiB at DATA + 4096: the second half is in the region that goes away.
    driver.prepare(T_IN, 0, &[(8192, WRITE)]);
    driver.vrings[0].wait_taken(&driver.memory);
    driver.frontend.remove_mem_region(&high).unwrap();
    gate.write(1).unwrap();
    assert_eq!(driver.vrings[0].wait(&driver.memory), (0, 8193));
    assert_eq!(driver.memory.get(DATA + 4096, 8192), vec![0x5a; 8192]);
    // New requests do not reach it any more.
    assert_eq!(driver.request(T_IN, 0, &[(8192, WRITE)]), (IOERR, 1));
    assert!(driver.frontend.remove_mem_region(&high).is_err());
}

/// Each request keeps the memory that the client had when it was taken.
#[test]
fn a_client_cannot_pile_up_memory_that_it_took_away() {
    let (fixture, gate) = gated(1);
    let mut driver = Driver::running(fixture.connect(), USUAL | EVENT_IDX);
    // The rings and the request have a region to themselves.
    let rest = (MEMORY_BYTES - 2 * DATA) / 31;
    let mut table = vec![driver.memory.part(0, 2 * DATA)];
    table.extend((0..31).map(|part| driver.memory.part(2 * DATA + part * rest, rest)));
    let change = |driver: &mut Driver| {
        driver.prepare(T_IN, 0, &[(512, WRITE)]);
        driver.vrings[0].wait_taken(&driver.memory);
        driver.frontend.set_mem_table(&table)
    };
    // 32 mappings each time, 1,024 in all, one of which was there before.
    for _ in 0..31 {
        change(&mut driver).unwrap();
    }
    // What has ended counts no more.
    gate.write(31).unwrap();
    eventually("all requests end", || {
        driver.vrings[0].used_index(&driver.memory) == 31
    });
    for _ in 0..31 {
        change(&mut driver).unwrap();
    }
    assert!(change(&mut driver).is_err());
    gate.write(64).unwrap();
    drop(driver);
    fixture.wait_empty();
}

#[test]
fn four_vrings_on_two_threads_serve_each_on_its_own() {
    let fixture = fixture();
    let mut driver = Driver::connect(fixture.connect(), USUAL | EVENT_IDX);
    for _ in 0..4 {
        driver.add_vring(64);
    }
    for round in 0..200u16 {
        for index in 0..4 {
            let at = DATA + 0x1_0000 * (1 + index as u64);
            driver.header(at, T_IN, u64::from(round));
            driver.memory.put(at + 16, &[UNTOUCHED]);
            let chain = [(at, 16, 0), (at + 512, 512, WRITE), (at + 16, 1, WRITE)];
            driver.submit_on(index, round % 50, &chain);
        }
        for index in 0..4 {
            let got = driver.vrings[index].wait(&driver.memory);
            assert_eq!(got, (u32::from(round % 50), 513));
        }
    }
    assert_eq!(fixture.counters.totals().reads, 800);
    assert_eq!(fixture.door.sessions()[0].vrings, 4);
}

#[test]
fn no_kick_and_no_notification_is_lost_in_a_hundred_thousand_requests() {
    // More than one wrap of the 16-bit indexes, in bursts, sleeping on nothing but the eventfd.
    let fixture = Fixture::new(ublkup::storage::Null::new(limits(1 << 20)), 1);
    let mut driver = Driver::running(fixture.connect(), USUAL | EVENT_IDX);
    driver.header(DATA, T_FLUSH, 0);
    for head in 0..64 {
        let vring = &driver.vrings[0];
        let first = (DATA, 16, NEXT, 2 * head + 1);
        driver.memory.descriptor(vring.descriptors, 2 * head, first);
        let second = (DATA + 16, 1, WRITE, 0);
        driver
            .memory
            .descriptor(vring.descriptors, 2 * head + 1, second);
    }
    let mut left = 100_000u32;
    let mut burst = 1;
    while left > 0 {
        burst = (burst * 5 + 3) % 61 + 1;
        let count = burst.min(left);
        let vring = &mut driver.vrings[0];
        for n in 0..count {
            let old = vring.next_available;
            vring.offer(&driver.memory, u16::try_from(2 * n).unwrap());
            vring.kick_if_wanted(&driver.memory, old);
        }
        for _ in 0..count {
            vring.wait(&driver.memory);
        }
        left -= count;
    }
    assert_eq!(fixture.counters.totals().flushes, 100_000);
    assert!(driver.vrings[0].kicks < 100_000, "kicks are suppressed");
}

#[test]
fn the_notification_goes_to_the_descriptor_that_was_set_last() {
    let (fixture, gate) = gated(1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    let masked = EventFd::new(0).unwrap();
    driver.frontend.set_vring_call(0, &masked).unwrap();
    gate.write(1).unwrap();
    assert!(readable(&masked, PATIENCE));
    assert!(!readable(&driver.vrings[0].call, Duration::ZERO));
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
    let (fixture, gate) = gated(2);
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
    let (fixture, gate) = gated(1);
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

/// What a server that was killed left behind: three chains taken, in another order than they lie on the
/// ring, one of them returned. The next one does the other two, in the order in which they were taken.
#[test]
fn requests_of_a_server_that_died_are_done_by_the_next_one() {
    let fixture = fixture();
    let told = VhostUserInflight::new(0, 0, 1, 128);
    let mut asking = Driver::connect(fixture.connect(), USUAL);
    let (told, record) = asking.frontend.get_inflight_fd(&told).unwrap();
    drop(asking);
    fixture.wait_empty();

    let mut driver = Driver::connect(fixture.connect(), USUAL);
    let fd = record.as_raw_fd();
    driver.frontend.set_inflight_fd(&told, fd).unwrap();
    // Chains 0, 3 and 6 read sectors 0, 8 and 16; all three are on the ring.
    let mut vring = Vring::new(0, 128);
    for (head, sector) in [(0, 0), (3, 8), (6, 16)] {
        let at = DATA + 0x1_0000 * u64::from(head);
        driver.header(at, T_IN, sector);
        driver.memory.put(at + 16, &[UNTOUCHED]);
        let chain = [
            (at, 16, NEXT, head + 1),
            (at + 4096, 4096, WRITE | NEXT, head + 2),
            (at + 16, 1, WRITE, 0),
        ];
        for (index, descriptor) in (head..).zip(chain) {
            driver
                .memory
                .descriptor(vring.descriptors, index, descriptor);
        }
        vring.offer(&driver.memory, head);
    }
    // The dead server's record: 6 was taken first, then 0 and 3; 0 has been returned.
    driver
        .memory
        .word(vring.used + 2)
        .store(1, Ordering::Relaxed);
    vring.next_used = 1;
    let entry = |head: u64, inflight: u8, number: u64| {
        record.write_all_at(&[inflight], 16 + 16 * head).unwrap();
        record
            .write_all_at(&number.to_le_bytes(), 16 + 16 * head + 8)
            .unwrap();
    };
    // Version 1, descriptors, last batch began at 0, used index 0: the end of it was not noted.
    let room = u16::try_from((told.mmap_size - 16) / 16).unwrap();
    let header: Vec<u8> = [1u16, room, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    record.write_all_at(&header, 8).unwrap();
    entry(0, 1, 11);
    entry(3, 1, 12);
    entry(6, 1, 10);
    driver.vrings.push(vring);
    // The base that a client sends after a reconnect is the used index.
    driver.start(0, 1);

    let memory = &driver.memory;
    let heads: Vec<u32> = (0..2).map(|_| driver.vrings[0].wait(memory).0).collect();
    assert_eq!(heads, [6, 3]);
    // And it goes on with what is new.
    assert_eq!(driver.read(0, 512).0, OK);
    let mut left = [0; 2];
    record.read_exact_at(&mut left, 14).unwrap();
    assert_eq!(u16::from_le_bytes(left), 4, "the record's used index");
    for head in [0, 3, 6] {
        let mut flag = [9];
        record.read_exact_at(&mut flag, 16 + 16 * head).unwrap();
        assert_eq!(flag, [0], "chain {head} is on record as under way");
    }
}

#[test]
fn sessions_come_by_socket_pair_as_well() {
    let fixture = fixture();
    let (ours, theirs) = UnixStream::pair().unwrap();
    fixture.door.adopt(theirs).unwrap();
    assert_eq!(Driver::running(ours, USUAL).read(0, 512).0, OK);
}

#[test]
fn socket_paths_are_taken_over_only_when_nobody_is_there() {
    let scratch = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        let config = VhostConfig {
            name: "test".into(),
            socket: scratch.path().join(name),
            queues: 1,
            queue_threads: 1,
            threads: ublkup::engine::threads::ThreadOptions::default(),
            ownership: open_ownership(false),
        };
        let disk = Arc::new(MemoryDisk::new(limits(1 << 20)).unwrap());
        VhostDoor::start(config, disk, Arc::new(CounterSet::default()))
    };
    let message = |result: Result<VhostDoor, StartError>| result.err().unwrap().to_string();
    let door = open("s").unwrap();
    let mode = std::fs::metadata(door.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(message(open("s")).contains("socket in use"));
    drop(door);
    assert!(!scratch.path().join("s").exists());
    // A listener that dies without removing its file.
    drop(UnixListener::bind(scratch.path().join("stale")).unwrap());
    drop(open("stale").unwrap());
    std::fs::write(scratch.path().join("file"), "precious").unwrap();
    assert!(message(open("file")).contains("not a socket"));
    assert_eq!(
        std::fs::read(scratch.path().join("file")).unwrap(),
        b"precious"
    );
    assert!(message(open(&"x".repeat(108))).contains("at most 107"));
    assert!(message(open("no/such/directory")).contains("cannot bind"));
}
