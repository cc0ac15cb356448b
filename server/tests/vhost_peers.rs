//! What front-ends in the field do otherwise than the specification has it, or than ours do.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::io::Read;
use std::os::unix::net::UnixStream;

use common::*;
use testkit::vhost::raw::{self, FrontendReq};
use ublkup::engine::Storage;
use ublkup::engine::polling::Polling;
use ublkup::storage::{CacheMode, File, Memory as MemoryDisk};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

fn memory(len_bytes: u64) -> MemoryDisk {
    MemoryDisk::new(limits(len_bytes)).unwrap()
}

/// Writes at both ends and in the middle of a disk, has all but the first and last blocks zeroed or discarded by one
/// request that is longer than clients are told of, and meanwhile reads.
fn one_long_range<B: Storage>(mut disk: B, kind: u32, flags: u32) {
    const LEN: u64 = 160 << 20;
    let limits = disk.limits_mut();
    (limits.max_discard_bytes, limits.max_write_zeroes_bytes) = (1 << 20, 1 << 20);
    let fixture = Fixture::new(disk, 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let sectors = LEN / 512;
    for sector in [0, 8, sectors / 2, sectors - 16, sectors - 8] {
        assert_eq!(driver.write(sector, &[7; 4096]), OK);
    }
    let count = u32::try_from(sectors - 16).unwrap();
    assert_eq!(driver.segment(kind, 8, count, flags), OK);
    for sector in [8, sectors / 2, sectors - 16] {
        assert_eq!(driver.read(sector, 4096), (OK, vec![0; 4096]), "{sector}");
    }
    for sector in [0, sectors - 8] {
        assert_eq!(driver.read(sector, 4096), (OK, vec![7; 4096]), "{sector}");
    }
    assert_eq!(
        driver.segment(kind, 8, count + 9, flags),
        IOERR,
        "out of range"
    );
    let totals = fixture.counters.totals();
    assert_eq!(totals.discards + totals.write_zeroes, 1);
}

const LONG_RANGES: [(u32, u32); 3] = [(T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, 1)];

#[test]
fn ranges_of_any_length_are_zeroed_and_discarded_in_memory() {
    for (kind, flags) in LONG_RANGES {
        one_long_range(memory(160 << 20), kind, flags);
    }
}

#[test]
fn ranges_of_any_length_are_zeroed_and_discarded_in_files() {
    for cache in [CacheMode::Auto, CacheMode::Buffered] {
        for folder in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
            for (kind, flags) in LONG_RANGES {
                let dir = tempfile::tempdir_in(folder).unwrap();
                let path = dir.path().join("disk.img");
                let file = std::fs::File::create(&path).unwrap();
                file.set_len(160 << 20).unwrap();
                let file = file_options(path, cache);
                one_long_range(File::open(file).unwrap(), kind, flags);
            }
        }
    }
}

/// 2 TiB in pieces take longer than a read, which must not wait for them.
#[test]
fn a_long_range_lets_other_requests_pass() {
    let fixture = Fixture::polling(memory(8 << 40), 1, Polling::Never);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    driver.header(DATA, T_WRITE_ZEROES, 0);
    let mut segment = [0; 16];
    segment[8..12].copy_from_slice(&(u32::MAX - 7).to_le_bytes());
    segment[12] = 1;
    driver.memory.put(DATA + 32, &segment);
    let long = [(DATA, 16, 0), (DATA + 32, 16, 0), (DATA + 16, 1, WRITE)];
    driver.submit_on(0, 0, &long);
    let (control, data) = (DATA + 0x1000, DATA + 0x2000);
    driver.header(control, T_IN, 0);
    let read = [
        (control, 16, 0),
        (data, 4096, WRITE),
        (control + 16, 1, WRITE),
    ];
    driver.submit_on(0, 8, &read);
    assert_eq!(driver.vrings[0].wait(&driver.memory), (8, 4097));
    // The client does not wait for the rest, nor does the door for the client.
    drop(driver);
    fixture.wait_empty();
    assert_eq!(fixture.counters.totals().write_zeroes, 1);
    assert_eq!(fixture.counters.totals().errors, 1, "ended early");
}

#[test]
fn a_write_may_have_more_room_than_one_byte_for_its_status() {
    let fixture = Fixture::new(memory(1 << 20), 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    driver.header(DATA, T_OUT, 3);
    driver.memory.put(DATA + 4096, &[9; 512]);
    driver.memory.put(DATA + 16, &[UNTOUCHED; 4]);
    let chain = [(DATA, 16, 0), (DATA + 4096, 512, 0), (DATA + 16, 4, WRITE)];
    driver.submit_on(0, 0, &chain);
    assert_eq!(driver.vrings[0].wait(&driver.memory), (0, 1));
    let status = [UNTOUCHED, UNTOUCHED, UNTOUCHED, OK];
    assert_eq!(driver.memory.get(DATA + 16, 4), status);
    assert_eq!(driver.read(3, 512), (OK, vec![9; 512]));
}

#[test]
fn the_barrier_bit_of_legacy_drivers_is_ignored() {
    const BARRIER: u32 = 1 << 31;
    let fixture = Fixture::new(memory(1 << 20), 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    driver.memory.put(DATA + 4096, &[5; 512]);
    let written = driver.request(T_OUT | BARRIER, 1, &[(512, 0)]);
    assert_eq!(written, (OK, 1));
    let read = driver.request(T_IN | BARRIER, 1, &[(512, WRITE)]);
    assert_eq!(read, (OK, 513));
    assert_eq!(driver.memory.get(DATA + 4096, 512), [5; 512]);
}

#[test]
fn the_configuration_is_also_found_where_virtio_mmio_has_it() {
    let fixture = Fixture::new(memory(1 << 20), 1);
    let mut driver = Driver::connect(fixture.connect(), USUAL);
    let flags = VhostUserConfigFlags::WRITABLE;
    let frontend = &mut driver.frontend;
    let mut read = |at| frontend.get_config(at, 60, flags, &[0; 60]).unwrap().1;
    let config = read(0);
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    assert_eq!(read(0x100), config);
    driver.frontend.set_config(0x120, flags, &[0]).unwrap();
    let (_, byte) = driver.frontend.get_config(32, 1, flags, &[1]).unwrap();
    assert_eq!(byte, [0], "the cache is off");
}

#[test]
fn a_short_ring_without_indirect_descriptors_is_told_what_fits() {
    let seg_max = |features, size| {
        let fixture = Fixture::new(memory(1 << 20), 1);
        let mut driver = Driver::connect(fixture.connect(), features);
        driver.add_vring(size);
        let flags = VhostUserConfigFlags::WRITABLE;
        let config = driver.frontend.get_config(12, 4, flags, &[0; 4]).unwrap().1;
        u32::from_le_bytes(config.try_into().unwrap())
    };
    assert_eq!(seg_max(USUAL, 16), 126);
    assert_eq!(seg_max(USUAL & !INDIRECT, 128), 126);
    assert_eq!(seg_max(USUAL & !INDIRECT, 16), 14);
    assert_eq!(seg_max(USUAL & !INDIRECT, 2), 1);
}

/// Twice what is advertised, and then one buffer too many: an error for that request alone.
#[test]
fn a_request_has_at_most_255_buffers() {
    let fixture = Fixture::new(memory(1 << 20), 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let table = DATA + 0x8000;
    for (buffers, status) in [(255, OK), (256, IOERR), (255, OK)] {
        driver.header(DATA, T_IN, 0);
        driver.memory.put(DATA + 16, &[UNTOUCHED]);
        let memory = &driver.memory;
        memory.descriptor(table, 0, (DATA, 16, NEXT, 1));
        for number in 1..=buffers {
            // Not side by side: those are one buffer.
            let at = DATA + 0x1_0000 + 1024 * u64::from(number);
            let buffer = (at, 512, NEXT | WRITE, number + 1);
            memory.descriptor(table, number, buffer);
        }
        memory.descriptor(table, buffers + 1, (DATA + 16, 1, WRITE, 0));
        let len_bytes = 16 * (u32::from(buffers) + 2);
        driver.submit_on(0, 0, &[(table, len_bytes, TABLE)]);
        driver.vrings[0].wait(&driver.memory);
        assert_eq!(driver.memory.byte(DATA + 16), status, "{buffers} buffers");
    }
}

/// Sends messages before and after it is refused, and reads to the end.
fn sees_an_end_of_file(mut stream: UnixStream) {
    let hello = raw::message(FrontendReq::SET_OWNER as u32, 0, &[]);
    let question = raw::message(FrontendReq::GET_FEATURES as u32, 0, &[]);
    raw::send(&stream, &[&hello[..], &question].concat(), &[]).unwrap();
    let read = |stream: &mut UnixStream| stream.read(&mut [0; 64]).unwrap();
    assert_eq!(read(&mut stream), 0, "refused");
    raw::send(&stream, &question, &[]).unwrap();
    assert_eq!(read(&mut stream), 0);
}

#[test]
fn a_client_that_is_refused_reads_an_end_of_file_and_stat_has_the_reason() {
    let fixture = Fixture::new(memory(1 << 20), 1);
    assert!(fixture.door.last_refusal().is_none());
    let owner = Driver::running(fixture.connect(), USUAL);
    // One that is not admitted.
    for _ in 0..50 {
        sees_an_end_of_file(fixture.connect());
    }
    let refusal = fixture.door.last_refusal().unwrap();
    assert!(
        refusal.why.contains("disk is in use by session 1"),
        "{refusal:?}"
    );
    assert_eq!(refusal.peer_pid, Some(std::process::id().cast_signed()));
    drop(owner);
    fixture.wait_empty();
    // One whose session ends with an error, with more messages on their way.
    let mut stream = fixture.connect();
    let unknown = raw::message(999, 0, &[]);
    raw::send(&stream, &unknown.repeat(50), &[]).unwrap();
    assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0);
    eventually("the reason is noted", || {
        let refusal = fixture.door.last_refusal().unwrap();
        refusal.why.contains("unknown number 999")
    });
}

/// As libblkio's programs end.
#[test]
fn a_client_that_hangs_up_with_nothing_under_way_is_no_warning() {
    let lab = sandbox();
    let server = lab.serve(&[
        "--ublk",
        "no",
        "--queues",
        "1",
        "d=fault:read=delay2000;mem:1M",
    ]);
    let mut driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    drop(driver);
    let said = |what: &str| server.log().contains(what);
    eventually("the end is logged", || {
        said("client hung up without stopping its vrings; no request was under way")
    });
    assert!(!said("WARN  client"), "{}", server.log());
    // With a request under way it is one.
    let mut driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    drop(driver);
    eventually("the loss is logged", || {
        said("client hung up with requests under way")
    });
    let log = server.stop().unwrap();
    assert!(log.contains("unanswered=1"), "{log}");
}
