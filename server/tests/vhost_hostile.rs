//! Drivers that break the rules: each gets the right status, and nobody else notices.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "vhost_hostile/sessions.rs"]
mod sessions;

use std::sync::atomic::Ordering;

use common::*;
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;

/// Where a chain's status byte is, in all cases here.
const STATUS: u64 = DATA + 16;
const BUFFER: u64 = DATA + 4096;
const TABLE_AT: u64 = DATA + 0x1_0000;
const SECTORS: u64 = (1 << 20) / 512;

/// A good session beside the bad ones; the disk is read-only so that both may be there.
struct Pair {
    fixture: Fixture,
    good: Driver,
}

const READ_ONLY: u64 =
    VERSION_1 | PROTOCOL | INDIRECT | FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES;

impl Pair {
    fn new() -> Self {
        let mut limits = limits(1 << 20);
        limits.read_only = true;
        let fixture = Fixture::new(MemoryDisk::new(limits).unwrap(), 1);
        let good = Driver::running(fixture.connect(), READ_ONLY);
        Self { fixture, good }
    }

    fn bad(&self) -> Driver {
        Driver::running(self.fixture.connect(), READ_ONLY)
    }

    fn check_good(&mut self) {
        assert_eq!(self.good.read(0, 4096).0, OK);
    }
}

/// Offers what is in the ring from descriptor 0; returns status byte and used length.
fn run(driver: &mut Driver) -> (u8, u32) {
    driver.memory.put(STATUS, &[UNTOUCHED]);
    let vring = &mut driver.vrings[0];
    let old = vring.next_available;
    vring.offer(&driver.memory, 0);
    vring.kick_if_wanted(&driver.memory, old);
    let (head, len) = vring.wait(&driver.memory);
    assert_eq!(head, 0);
    (driver.memory.byte(STATUS), len)
}

fn writable_disk() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 1)
}

#[test]
fn chains_that_are_malformed_are_returned_with_an_error() {
    let header = (DATA, 16, NEXT, 1);
    let status = (STATUS, 1, WRITE, 0);
    // Descriptors of the ring, those of an indirect table, and what must come back.
    type Case = (&'static str, Vec<Raw>, Vec<Raw>, u8, u32);
    let cases: Vec<Case> = vec![
        (
            "data beyond the end of memory",
            vec![header, (MEMORY_BYTES - 512, 1024, NEXT | WRITE, 2), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "data at the end of the address space",
            vec![header, (u64::MAX - 100, 512, NEXT | WRITE, 2), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "data of almost four gigabytes",
            vec![header, (BUFFER, u32::MAX, NEXT | WRITE, 2), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "header outside memory",
            vec![(MEMORY_BYTES, 16, NEXT, 1), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "header too short",
            vec![(DATA, 15, NEXT, 1), (BUFFER, 512, NEXT | WRITE, 2), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "no header",
            vec![(BUFFER, 512, NEXT | WRITE, 1), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "readable after writable",
            vec![
                header,
                (BUFFER, 512, NEXT | WRITE, 2),
                (BUFFER, 512, NEXT, 3),
                status,
            ],
            vec![],
            IOERR,
            1,
        ),
        (
            "a read into a readable buffer",
            vec![header, (BUFFER, 512, NEXT, 2), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "a zero-length descriptor in between",
            vec![
                header,
                (BUFFER, 0, NEXT | WRITE, 2),
                (BUFFER, 512, NEXT | WRITE, 3),
                status,
            ],
            vec![],
            OK,
            513,
        ),
        (
            "nothing but zero-length data",
            vec![header, (u64::MAX, 0, NEXT | WRITE, 2), status],
            vec![],
            OK,
            1,
        ),
        (
            "a zero-length status",
            vec![header, (STATUS, 0, WRITE, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "no room for a status",
            vec![(DATA, 16, 0, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "a status outside memory",
            vec![header, (MEMORY_BYTES, 1, WRITE, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "a loop of one",
            vec![(DATA, 16, NEXT, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "a loop over the status",
            vec![header, (STATUS, 1, NEXT | WRITE, 1)],
            vec![],
            IOERR,
            1,
        ),
        (
            "next out of range",
            vec![header, (STATUS, 1, NEXT | WRITE, 128)],
            vec![],
            IOERR,
            1,
        ),
        (
            "next far out of range",
            vec![(DATA, 16, NEXT, u16::MAX)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "half a sector",
            vec![header, (BUFFER, 256, NEXT | WRITE, 2), status],
            vec![],
            IOERR,
            1,
        ),
        (
            "an indirect table of length 0",
            vec![(TABLE_AT, 0, TABLE, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "an indirect table of no whole number of descriptors",
            vec![(TABLE_AT, 33, TABLE, 0)],
            vec![(DATA, 16, NEXT, 1), status],
            UNTOUCHED,
            0,
        ),
        (
            "an indirect table of absurd length",
            vec![(0, 0xffff_fff0, TABLE, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "an indirect table outside memory",
            vec![(MEMORY_BYTES - 16, 64, TABLE, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "an indirect table that wraps around",
            vec![(u64::MAX - 15, 64, TABLE, 0)],
            vec![],
            UNTOUCHED,
            0,
        ),
        (
            "an indirect table in an indirect table",
            vec![(TABLE_AT, 48, TABLE, 0)],
            vec![
                header,
                (STATUS, 1, WRITE | NEXT, 2),
                (TABLE_AT, 32, TABLE, 0),
            ],
            IOERR,
            1,
        ),
        (
            "an indirect table with a next",
            vec![(TABLE_AT, 32, TABLE | NEXT, 1), status],
            vec![header, status],
            UNTOUCHED,
            0,
        ),
        (
            "a loop in an indirect table",
            vec![(TABLE_AT, 32, TABLE, 0)],
            vec![header, (STATUS, 1, WRITE | NEXT, 1)],
            IOERR,
            1,
        ),
        (
            "next out of an indirect table",
            vec![(TABLE_AT, 32, TABLE, 0)],
            vec![header, (STATUS, 1, WRITE | NEXT, 2)],
            IOERR,
            1,
        ),
    ];
    let mut pair = Pair::new();
    let mut bad = pair.bad();
    for (what, ring, table, status, len) in cases {
        bad.header(DATA, T_IN, 0);
        for (index, descriptor) in (0..).zip(ring) {
            bad.memory
                .descriptor(bad.vrings[0].descriptors, index, descriptor);
        }
        for (index, descriptor) in (0..).zip(table) {
            bad.memory.descriptor(TABLE_AT, index, descriptor);
        }
        assert_eq!(run(&mut bad), (status, len), "{what}");
        // The same session goes on, and so does the other one.
        assert_eq!(bad.read(0, 512).0, OK, "after {what}");
    }
    pair.check_good();
}

#[test]
fn more_buffers_than_a_request_can_have_are_an_error() {
    let fixture = writable_disk();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    for (count, expected) in [(200u16, OK), (900, IOERR)] {
        driver.header(DATA, T_IN, 0);
        driver.memory.descriptor(TABLE_AT, 0, (DATA, 16, NEXT, 1));
        for n in 1..=count {
            // Two apart, so that they cannot be joined.
            let at = BUFFER + 1024 * u64::from(n % 16);
            driver
                .memory
                .descriptor(TABLE_AT, n, (at, 512, WRITE | NEXT, n + 1));
        }
        driver
            .memory
            .descriptor(TABLE_AT, count + 1, (STATUS, 1, WRITE, 0));
        let table = (TABLE_AT, u32::from(count + 2) * 16, TABLE, 0);
        driver
            .memory
            .descriptor(driver.vrings[0].descriptors, 0, table);
        assert_eq!(run(&mut driver).0, expected, "{count} buffers");
    }
}

#[test]
fn requests_outside_the_disk_and_of_unknown_kinds_get_the_right_status() {
    let fixture = writable_disk();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let read = [(1024, WRITE)];
    let write = [(1024, 0)];
    type Case<'a> = (u32, u64, &'a [(u32, u16)], u8);
    let cases: [Case; 16] = [
        (T_IN, SECTORS - 2, &read, OK),
        (T_IN, SECTORS - 1, &read, IOERR),
        (T_IN, SECTORS, &read, IOERR),
        (T_IN, u64::MAX, &read, IOERR),
        (T_IN, u64::MAX - 1, &read, IOERR),
        (T_IN, 1 << 55, &read, IOERR),
        (T_OUT, SECTORS - 2, &write, OK),
        (T_OUT, SECTORS - 1, &write, IOERR),
        (T_OUT, u64::MAX, &write, IOERR),
        (T_OUT, 0, &read, IOERR),
        (T_IN, 0, &write, IOERR),
        (T_FLUSH, u64::MAX, &[], OK),
        (T_GET_ID, 0, &[], IOERR),
        (2, 0, &[], UNSUPP),
        (14, 0, &[(512, 0)], UNSUPP),
        (u32::MAX, 0, &[(512, WRITE)], UNSUPP),
    ];
    for (kind, sector, data, expected) in cases {
        let (status, _) = driver.request(kind, sector, data);
        assert_eq!(status, expected, "type {kind} at {sector} with {data:?}");
    }
    assert_eq!(fixture.counters.totals().errors, 13);
}

#[test]
fn discards_and_write_zeroes_with_flags_or_ranges_nobody_offered_are_refused() {
    let fixture = writable_disk();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let total = u32::try_from(SECTORS).unwrap();
    for (kind, sector, sectors, flags, expected) in [
        (T_DISCARD, 0, 8, 0, OK),
        (T_DISCARD, 0, 0, 0, OK),
        (T_DISCARD, 0, 8, 1, UNSUPP),
        (T_DISCARD, 0, 8, 2, UNSUPP),
        (T_DISCARD, SECTORS, 1, 0, IOERR),
        (T_DISCARD, 0, total + 1, 0, IOERR),
        (T_DISCARD, u64::MAX, 1, 0, IOERR),
        (T_DISCARD, 1, u32::MAX, 0, IOERR),
        (T_WRITE_ZEROES, 0, total, 0, OK),
        (T_WRITE_ZEROES, 0, 8, 1, OK),
        (T_WRITE_ZEROES, 0, 8, 2, UNSUPP),
        (T_WRITE_ZEROES, 0, 8, 0x8000_0001, UNSUPP),
        (T_WRITE_ZEROES, SECTORS - 1, 2, 0, IOERR),
        (T_WRITE_ZEROES, u64::MAX - 1, 2, 1, IOERR),
    ] {
        let status = driver.segment(kind, sector, sectors, flags);
        assert_eq!(
            status, expected,
            "type {kind}: {sector}+{sectors} flags {flags:#x}"
        );
    }
    for (data, expected) in [
        (vec![], IOERR),
        (vec![(15, 0)], IOERR),
        (vec![(17, 0)], IOERR),
        (vec![(16, 0), (16, WRITE)], IOERR),
        (vec![(32, 0)], UNSUPP),
        (vec![(16, 0), (16, 0)], UNSUPP),
    ] {
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(
                driver.request(kind, 0, &data).0,
                expected,
                "{kind} {data:?}"
            );
        }
    }
    // The segment in two pieces is fine.
    driver.memory.put(BUFFER, &[0; 16]);
    assert_eq!(driver.request(T_DISCARD, 0, &[(7, 0), (9, 0)]).0, OK);
    // Offered, but not accepted by this driver.
    drop(driver);
    let features = USUAL & !(DISCARD | WRITE_ZEROES);
    let mut plain = Driver::running(fixture.connect(), features);
    assert_eq!(plain.segment(T_DISCARD, 0, 8, 0), UNSUPP);
    assert_eq!(plain.segment(T_WRITE_ZEROES, 0, 8, 0), UNSUPP);
}

#[test]
fn a_broken_ring_is_reported_and_its_session_goes_on() {
    let mut pair = Pair::new();
    for broken_head in [false, true] {
        let mut bad = pair.bad();
        bad.add_vring(64);
        let vring = &mut bad.vrings[0];
        if broken_head {
            vring.offer(&bad.memory, 128);
        } else {
            bad.memory
                .word(vring.available + 2)
                .store(129, Ordering::Release);
        }
        vring.kick.write(1).unwrap();
        assert!(
            readable(&vring.error, PATIENCE),
            "the error descriptor says so"
        );
        assert_eq!(vring.used_index(&bad.memory), 0);
        // The other vring of the same thread still serves.
        bad.header(DATA, T_IN, 0);
        let chain = [(DATA, 16, 0), (BUFFER, 512, WRITE), (STATUS, 1, WRITE)];
        bad.submit_on(1, 0, &chain);
        assert_eq!(bad.vrings[1].wait(&bad.memory), (0, 513));
        assert_eq!(bad.frontend.get_vring_base(0).unwrap(), 0);
        pair.check_good();
    }
}
