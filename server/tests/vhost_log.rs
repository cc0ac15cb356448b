//! The log of dirty pages: every page of guest memory that the server writes is marked in it.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/disks.rs"]
mod disks;
#[path = "vhost_log/log.rs"]
mod log;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use disks::{Gated, Halves};
use log::*;
use rustix::fs::ftruncate;
use ublkup::engine::StorageControl;
use ublkup::storage::{CacheMode, File as FileDisk, Memory as MemoryDisk};
use vhost::VhostUserDirtyLogRegion;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

fn memory_house() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 1)
}

/// The used ring and the status byte: what every request writes.
fn always(driver: &Driver) -> Vec<(u64, u64)> {
    let vring = &driver.vrings[0];
    vec![(vring.used, 6 + 8 * u64::from(vring.size)), (DATA + 16, 1)]
}

#[test]
fn exactly_what_each_kind_of_request_writes_is_marked() {
    let fixture = memory_house();
    let (mut driver, log) = logging(&fixture);
    let buffer = DATA + 4096;
    // Kind, sector, data, and which of the data is written.
    type Case = (u32, u64, Vec<(u32, u16)>, Vec<(u64, u64)>);
    let cases: Vec<Case> = vec![
        (T_IN, 0, vec![(512, WRITE)], vec![(buffer, 512)]),
        (T_IN, 0, vec![(4096, WRITE); 5], vec![(buffer, 5 * 4096)]),
        (
            T_IN,
            0,
            vec![(1024, WRITE), (3072, WRITE), (512, WRITE)],
            vec![(buffer, 4608)],
        ),
        (T_IN, 0, vec![(0x4_0000, WRITE)], vec![(buffer, 0x4_0000)]),
        (T_GET_ID, 0, vec![(20, WRITE)], vec![(buffer, 20)]),
        (T_OUT, 0, vec![(8192, 0)], vec![]),
        (T_FLUSH, 0, vec![], vec![]),
        // Behind the end of the disk, and nothing anybody knows: only the status.
        (T_IN, 1 << 20, vec![(4096, WRITE)], vec![]),
        (77, 0, vec![], vec![]),
    ];
    for (kind, sector, data, written) in cases {
        driver.request(kind, sector, &data);
        driver.settle();
        let mut expected = always(&driver);
        expected.extend(written);
        assert_eq!(log.take(), pages(&expected), "{kind} {data:?}");
    }
    // A read that begins and ends in the middle of pages.
    let at = DATA + 4096 + 0xe00;
    driver.header(DATA, T_IN, 0);
    driver.submit_on(
        0,
        0,
        &[(DATA, 16, 0), (at, 0x1400, WRITE), (DATA + 16, 1, WRITE)],
    );
    driver.vrings[0].wait(&driver.memory);
    driver.settle();
    let mut expected = always(&driver);
    expected.push((at, 0x1400));
    assert_eq!(log.take(), pages(&expected));
    assert_eq!(pages(&[(at, 0x1400)]).len(), 3, "this was the point");
}

#[test]
fn a_read_that_failed_half_way_is_marked_whole() {
    let disk = Halves {
        limits: limits(1 << 20),
    };
    let fixture = Fixture::new(disk, 1);
    let (mut driver, log) = logging(&fixture);
    for data in [
        vec![(0x6000, WRITE)],
        vec![(0x2000, WRITE); 3],
        vec![(512, WRITE); 6],
    ] {
        assert_eq!(driver.request(T_IN, 0, &data), (IOERR, 1));
        driver.settle();
        let len: u32 = data.iter().map(|(len, _)| len).sum();
        let mut expected = always(&driver);
        expected.push((DATA + 4096, len.into()));
        assert_eq!(log.take(), pages(&expected), "{data:?}");
    }
}

/// By `io_uring`: the data lies in a file, which ends in the middle of the last request.
#[test]
fn what_the_kernel_read_and_what_was_zero_filled_is_marked() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("disk");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(&[7; 0x1_0000], 0).unwrap();
    let disk = FileDisk::open(file_options(path, CacheMode::default())).unwrap();
    assert_eq!(disk.limits().capacity.bytes(), 1 << 20);
    let fixture = Fixture::new(disk, 1);
    let (mut driver, log) = logging(&fixture);
    file.set_len(0xd000).unwrap();
    for sector in [0, 0xc000 / 512, 0xe000 / 512] {
        let (status, _) = driver.request(T_IN, sector, &[(0x1000, WRITE), (0x2000, WRITE)]);
        assert_eq!(status, OK);
        driver.settle();
        let mut expected = always(&driver);
        expected.push((DATA + 4096, 0x3000));
        assert_eq!(log.take(), pages(&expected), "sector {sector}");
    }
}

#[test]
fn no_page_changes_without_a_mark_whatever_the_chains_are() {
    let fixture = memory_house();
    let (mut driver, log) = logging(&fixture);
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut draw = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let all = usize::try_from(MEMORY_BYTES).unwrap();
    for round in 0..300 {
        driver
            .memory
            .put(DATA, &vec![u8::try_from(round % 250).unwrap(); 1 << 20]);
        VhostUserFrontend::set_vring_enable(&mut driver.frontend, 0, false).unwrap();
        let mut first = 0;
        let mut chains = 0;
        while first < 100 {
            let kind =
                [T_IN, T_IN, T_OUT, T_GET_ID, T_FLUSH, 99][usize::try_from(draw(6)).unwrap()];
            let header = DATA + 64 * u64::from(first);
            driver.header(header, kind, draw(1 << 11));
            let mut chain = vec![(header, 16, 0)];
            for _ in 0..draw(4) {
                let len = u32::try_from(draw(9) * 512).unwrap();
                let flags = if kind == T_OUT { 0 } else { WRITE };
                chain.push((DATA + 0x2000 + draw(0x10_0000), len, flags));
            }
            chain.push((DATA + 0x20_0000 + draw(0x1000), 1, WRITE));
            let offered = driver.vrings[0].next_available;
            driver.submit_on(0, first, &chain);
            assert_eq!(driver.vrings[0].next_available, offered.wrapping_add(1));
            first += u16::try_from(chain.len()).unwrap();
            chains += 1;
        }
        log.take();
        let before = driver.memory.get(0, all);
        VhostUserFrontend::set_vring_enable(&mut driver.frontend, 0, true).unwrap();
        for _ in 0..chains {
            driver.vrings[0].wait(&driver.memory);
        }
        driver.settle();
        let after = driver.memory.get(0, all);
        let page = usize::try_from(PAGE).unwrap();
        let own = pages(&[(driver.vrings[0].available, 6 + 2 * 128)]);
        let marked = log.take();
        for (number, (old, new)) in before.chunks(page).zip(after.chunks(page)).enumerate() {
            let number = number as u64;
            let ok = old == new || marked.contains(&number) || own.contains(&number);
            assert!(ok, "page {number} changed in round {round}");
        }
    }
}

fn gated() -> (Fixture, Arc<EventFd>) {
    Gated::fixture(1 << 20, 1)
}

#[test]
fn requests_that_were_under_way_when_the_log_was_switched_on_are_marked() {
    let (fixture, gate) = gated();
    let mut driver = Driver::running(fixture.connect(), FEATURES);
    driver.prepare(T_IN, 0, &[(0x3000, WRITE)]);
    driver.vrings[0].wait_taken(&driver.memory);
    let log = Log::new();
    driver.log_to(&log);
    driver.log_requests(true);
    driver.log_used(true);
    gate.write(1).unwrap();
    driver.vrings[0].wait(&driver.memory);
    driver.settle();
    let mut expected = always(&driver);
    expected.push((DATA + 4096, 0x3000));
    assert_eq!(log.take(), pages(&expected));
}

#[test]
fn a_vring_that_stops_has_marked_everything_when_the_client_is_told() {
    let (fixture, gate) = gated();
    let (mut driver, log) = {
        let mut driver = Driver::running(fixture.connect(), FEATURES);
        let log = Log::new();
        driver.log_to(&log);
        driver.log_requests(true);
        driver.log_used(true);
        (driver, log)
    };
    driver.prepare(T_IN, 0, &[(0x3000, WRITE)]);
    driver.vrings[0].wait_taken(&driver.memory);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        gate.write(1).unwrap();
    });
    assert_eq!(driver.frontend.get_vring_base(0).unwrap(), 1);
    let mut expected = always(&driver);
    expected.push((DATA + 4096, 0x3000));
    assert_eq!(log.take(), pages(&expected));
    opener.join().unwrap();
}

#[test]
fn the_two_switches_are_independent_and_nothing_is_marked_when_both_are_off() {
    let fixture = memory_house();
    let (mut driver, log) = logging(&fixture);
    let used = pages(&always(&driver)[..1]);
    let written = pages(&[(DATA + 4096, 4096), (DATA + 16, 1)]);
    for (requests, rings) in [(false, true), (true, false), (false, false), (true, true)] {
        driver.log_requests(requests);
        driver.log_used(rings);
        driver.settle();
        log.take();
        assert_eq!(driver.read(0, 4096).0, OK);
        driver.settle();
        let mut expected = BTreeSet::new();
        if requests {
            expected.extend(&written);
        }
        if rings {
            expected.extend(&used);
        }
        assert_eq!(log.take(), expected, "requests {requests}, rings {rings}");
    }
    // Marks go to the log that was set last, and to no other.
    let next = Log::new();
    driver.log_to(&next);
    driver.settle();
    log.take();
    next.take();
    assert_eq!(driver.read(0, 4096).0, OK);
    driver.settle();
    assert_eq!(log.take(), BTreeSet::new());
    assert_eq!(next.take(), &written | &used);
}

/// The order of QEMU when a device starts while a migration is under way.
#[test]
fn the_features_may_come_before_the_log_and_the_log_before_the_vrings() {
    let fixture = memory_house();
    let mut driver = Driver::connect(fixture.connect(), FEATURES);
    driver.log_requests(true);
    let log = Log::new();
    driver.log_to(&log);
    driver.add_vring(128);
    driver.log_used(true);
    assert_eq!(driver.read(0, 4096).0, OK);
    driver.settle();
    let mut expected = always(&driver);
    expected.push((DATA + 4096, 4096));
    assert!(log.take().is_superset(&pages(&expected)));
}

#[test]
fn the_log_may_be_switched_at_any_time_while_requests_are_under_way() {
    let fixture = memory_house();
    let mut driver = Driver::running(fixture.connect(), FEATURES);
    let log = Log::new();
    driver.log_to(&log);
    let over = Arc::new(AtomicBool::new(false));
    let switching = std::thread::spawn({
        let (frontend, over) = (driver.frontend.clone(), Arc::clone(&over));
        let features = driver.features;
        let region = log.region();
        let handle = log.0.try_clone().unwrap();
        move || {
            let mut switches = 0;
            while !over.load(Ordering::Relaxed) {
                for bits in [LOG_ALL, 0] {
                    frontend.set_features(features | bits).unwrap();
                    let region = VhostUserDirtyLogRegion {
                        mmap_handle: handle.as_raw_fd(),
                        ..region
                    };
                    frontend.set_log_base(0, Some(region)).unwrap();
                    switches += 1;
                }
            }
            switches
        }
    });
    for round in 0..20_000u32 {
        let fill = u8::try_from(round % 251).unwrap();
        if round % 16 == 0 {
            assert_eq!(driver.write(8, &[fill; 4096]), OK);
            assert_eq!(driver.read(8, 4096), (OK, vec![fill; 4096]));
        } else {
            assert_eq!(driver.read(0, 512).0, OK);
        }
    }
    over.store(true, Ordering::Relaxed);
    assert!(switching.join().unwrap() > 10);
    driver.log_requests(true);
    log.take();
    assert_eq!(driver.read(0, 4096).0, OK);
    assert!(log.take().is_superset(&pages(&[(DATA + 4096, 4096)])));
}

#[test]
fn memory_that_is_added_and_removed_under_a_log_is_marked_where_it_is() {
    let (fixture, gate) = gated();
    let mut driver = Driver::connect(fixture.connect(), FEATURES);
    let low = driver.memory.part(0, DATA + 8192);
    let high = driver.memory.part(DATA + 8192, MEMORY_BYTES - DATA - 8192);
    driver.frontend.set_mem_table(&[low]).unwrap();
    driver.add_vring(128);
    driver.frontend.add_mem_region(&high).unwrap();
    let log = Log::new();
    driver.log_to(&log);
    driver.log_requests(true);
    // 8 KiB at DATA + 4096: the second half is in the region that goes away.
    driver.prepare(T_IN, 0, &[(8192, WRITE)]);
    driver.vrings[0].wait_taken(&driver.memory);
    driver.frontend.remove_mem_region(&high).unwrap();
    gate.write(1).unwrap();
    driver.vrings[0].wait(&driver.memory);
    assert_eq!(log.take(), pages(&[(DATA + 4096, 8192), (DATA + 16, 1)]));
}

/// The used entries of a ring that the driver broke in the same round are there, and marked.
#[test]
fn what_was_returned_before_the_driver_broke_its_ring_is_marked() {
    let fixture = memory_house();
    let mut driver = Driver::connect(fixture.connect(), FEATURES);
    // Far enough on that the next used entry has a page to itself.
    let mut vring = Vring::new(0, 1024);
    (vring.next_available, vring.next_used) = (600, 600);
    for index in [vring.available + 2, vring.used + 2] {
        driver.memory.word(index).store(600, Ordering::Relaxed);
    }
    vring.event_index = true;
    driver.vrings.push(vring);
    driver.start(0, 600);
    let log = Log::new();
    driver.log_to(&log);
    driver.log_requests(true);
    driver.log_used(true);
    VhostUserFrontend::set_vring_enable(&mut driver.frontend, 0, false).unwrap();
    driver.prepare(T_FLUSH, 0, &[]);
    let Driver { memory, vrings, .. } = &mut driver;
    vrings[0].offer(memory, 1024);
    let entry = vrings[0].used + 4 + 8 * 600;
    assert_eq!(memory.get(entry, 8), [0; 8]);
    log.take();
    VhostUserFrontend::set_vring_enable(&mut driver.frontend, 0, true).unwrap();
    assert!(readable(&driver.vrings[0].error, PATIENCE), "it is broken");
    assert_ne!(driver.memory.get(entry, 8), [0; 8], "it was returned");
    assert!(log.take().is_superset(&pages(&[(entry, 8)])));
}

/// Whether the device takes a log.
fn takes(driver: &Driver, size: u64, offset: u64, file: &impl AsRawFd) -> bool {
    let region = VhostUserDirtyLogRegion {
        mmap_size: size,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    };
    driver.frontend.set_log_base(0, Some(region)).is_ok()
}

#[test]
fn logs_that_cannot_be_used_end_the_session_with_a_clear_word() {
    let fixture = memory_house();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let directory = File::open("/").unwrap();
    let readable = File::open("/proc/self/exe").unwrap();
    let log = Log::new();
    let refused = |what: &str, attempt: &dyn Fn(&mut Driver) -> bool| {
        let mut driver = Driver::running(fixture.connect(), FEATURES);
        assert!(!attempt(&mut driver), "{what}");
        drop(driver);
        fixture.wait_empty();
    };
    refused("a pipe", &|driver| takes(driver, LOG_BYTES, 0, &pipe));
    refused("a directory", &|driver| {
        takes(driver, LOG_BYTES, 0, &directory)
    });
    refused("read-only", &|driver| takes(driver, 4096, 0, &readable));
    refused("shorter than told", &|driver| {
        takes(driver, LOG_BYTES, OFFSET + 1, &log.0)
    });
    refused("endless", &|driver| {
        takes(driver, u64::MAX - OFFSET, OFFSET, &log.0)
    });
    refused("nothing", &|driver| takes(driver, 0, 0, &log.0));
    refused("too small for the memory", &|driver| {
        driver.log_requests(true);
        takes(driver, LOG_BYTES - 1, OFFSET, &log.0)
    });
    refused("too small when it is switched on", &|driver| {
        assert!(takes(driver, LOG_BYTES - 1, OFFSET, &log.0));
        driver.frontend.set_features(FEATURES | LOG_ALL).is_ok()
    });
    refused("a used ring outside the log", &|driver| {
        driver.log_to(&log);
        let addresses = VringConfigData {
            flags: 1,
            log_addr: Some(MEMORY_BYTES),
            ..driver.vrings[0].addresses()
        };
        driver.frontend.set_vring_addr(0, &addresses).is_ok()
    });
    refused("a used ring at the end of everything", &|driver| {
        driver.log_to(&log);
        let addresses = VringConfigData {
            flags: 1,
            log_addr: Some(u64::MAX - 8),
            ..driver.vrings[0].addresses()
        };
        driver.frontend.set_vring_addr(0, &addresses).is_ok()
    });
    let mut driver = Driver::running(fixture.connect(), FEATURES);
    assert_eq!(driver.read(0, 512).0, OK);
}

#[test]
fn a_log_that_is_cut_short_ends_its_session_and_no_other() {
    let mut limits = limits(1 << 20);
    limits.read_only = true;
    let fixture = Fixture::new(MemoryDisk::new(limits).unwrap(), 1);
    let features = VERSION_1 | PROTOCOL;
    let mut good = Driver::running(fixture.connect(), features);
    let mut bad = Driver::running(fixture.connect(), features);
    let log = Log::new();
    bad.log_to(&log);
    bad.log_requests(true);
    assert_eq!(bad.read(0, 4096).0, OK);
    ftruncate(&log.0, 0).unwrap();
    bad.prepare(T_IN, 0, &[(4096, WRITE)]);
    eventually("the session ends", || fixture.door.sessions().len() == 1);
    assert_eq!(good.read(0, 4096).0, OK);
}
