//! Whole sessions of the vhost door over real sockets.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/disks.rs"]
mod disks;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use disks::{Gated, Recorder};
use ublkup::door::vhost::{SessionState, VhostConfig, VhostDoor};
use ublkup::engine::counters::CounterSet;
use ublkup::engine::polling::Polling;
use ublkup::engine::socket::{Socket, SocketAccess};
use ublkup::request::Op;
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
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
        (USUAL & !FLUSH, None, true),
        (USUAL & !FLUSH, Some(1), false),
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
fn sessions_come_by_socket_pair_as_well() {
    let fixture = fixture();
    let (ours, theirs) = UnixStream::pair().unwrap();
    fixture.door.adopt(theirs).unwrap();
    assert_eq!(Driver::running(ours, USUAL).read(0, 512).0, OK);
}

#[test]
fn socket_paths_are_taken_over_only_when_nobody_is_there() {
    let scratch = tempfile::tempdir().unwrap();
    let open = |name: &str| -> Result<VhostDoor, Box<dyn std::error::Error>> {
        let config = VhostConfig {
            name: "test".into(),
            socket: Socket::bind(&scratch.path().join(name), &SocketAccess::default())?,
            queues: 1,
            queue_threads: 1,
            threads: ublkup::engine::threads::ThreadOptions::default(),
            throttle: Arc::default(),
            ownership: open_ownership(false),
        };
        let disk = Arc::new(MemoryDisk::new(limits(1 << 20)).unwrap());
        Ok(VhostDoor::start(
            config,
            disk,
            Arc::new(CounterSet::default()),
        )?)
    };
    let message =
        |result: Result<VhostDoor, Box<dyn std::error::Error>>| result.err().unwrap().to_string();
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
