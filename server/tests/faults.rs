//! A disk that fails as it is told, seen by its client.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::time::{Duration, Instant};

use common::*;
use ublkup::storage::{Fault, Memory as MemoryDisk};

fn fixture(rules: &[&str]) -> Fixture {
    let disk = MemoryDisk::new(limits(64 << 20)).unwrap();
    let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    Fixture::new(Fault::new(disk, rules), 1)
}

#[test]
fn errors_come_where_and_as_often_as_they_were_asked_for() {
    let fixture = fixture(&["write=eio@1M-2M", "read=eio/3*2"]);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let sector = |bytes: u64| bytes / 512;
    assert_eq!(driver.write(0, &[1; 512]), OK);
    assert_eq!(driver.write(sector(1 << 20), &[1; 512]), IOERR);
    // A request that only touches the range.
    assert_eq!(driver.write(sector(1 << 20) - 1, &[1; 1024]), IOERR);
    assert_eq!(driver.write(sector(2 << 20), &[1; 512]), OK);
    let read = (0..12).map(|_| driver.read(0, 512).0);
    let failed: Vec<usize> = read
        .enumerate()
        .filter_map(|(number, status)| (status == IOERR).then_some(number))
        .collect();
    assert_eq!(failed, [2, 5]);
    assert_eq!(driver.read(sector(1 << 20), 512), (OK, vec![0; 512]));
    assert_eq!(fixture.counters.totals().errors, 4);
}

#[test]
fn a_delay_holds_its_request_and_no_other() {
    let fixture = fixture(&["write=delay300@0-1M"]);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let start = Instant::now();
    assert_eq!(driver.write(0, &[1; 512]), OK);
    assert!(start.elapsed() >= Duration::from_millis(300));
    let start = Instant::now();
    assert_eq!(driver.read(0, 512), (OK, vec![1; 512]));
    assert!(start.elapsed() < Duration::from_millis(300));
}

#[test]
fn a_stalled_request_stalls_nothing_else() {
    let (stalled, fine) = (fixture(&["write=stall"]), fixture(&[]));
    let mut driver = Driver::running(stalled.connect(), USUAL);
    driver.add_vring(128);
    let mut other = Driver::running(fine.connect(), USUAL);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
    assert_eq!(other.write(0, &[2; 512]), OK);
    // Other requests of the same ring go on too.
    driver.header(DATA + 64, T_FLUSH, 0);
    driver.submit_on(0, 8, &[(DATA + 64, 16, 0), (DATA + 80, 1, WRITE)]);
    assert_eq!(driver.vrings[0].wait(&driver.memory), (8, 1));
    assert_eq!(driver.memory.byte(DATA + 80), OK);
    assert_eq!(driver.memory.byte(DATA + 16), UNTOUCHED);
    // The client may go; its session stays as long as the storage has a request of it.
    drop(driver);
    assert_eq!(other.read(0, 512), (OK, vec![2; 512]));
    assert_eq!(stalled.door.sessions().len(), 1);
    assert_eq!(stalled.door.stop(Duration::from_millis(500)), 1);
}
