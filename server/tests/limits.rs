//! Limits on requests and bytes per second: what they hold back, and when they let it go.
//!
//! How much passes in a second is a matter of arithmetic, tested with a clock of its own. Here a limit is so low that
//! nothing passes after the first request before the test has ended.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use common::*;
use ublkup::engine::counters::Totals;
use ublkup::engine::latency::Latency;
use ublkup::engine::throttle::RateLimits;
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;

const BLOCK: u32 = 4096;

/// The first block is free, the next one comes after an hour.
const SLOW: RateLimits = RateLimits {
    iops_total: 0,
    iops_read: 0,
    iops_write: 0,
    bps_total: 1,
    bps_read: 0,
    bps_write: 0,
    burst_ms: 0,
};

fn fixture() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(64 << 20)).unwrap(), 2)
}

/// Submits request `number` of a vring, with memory of its own.
fn submit(driver: &mut Driver, vring: usize, number: u16, kind: u32) {
    let place = u64::from(number) + 16 * vring as u64;
    let (header, data) = (DATA + 64 * place, DATA + 8192 + u64::from(BLOCK) * place);
    driver.header(header, kind, 0);
    let flags = if kind == T_IN { WRITE } else { 0 };
    let mut chain = vec![
        (header, 16, 0),
        (data, BLOCK, flags),
        (header + 16, 1, WRITE),
    ];
    if kind == T_FLUSH {
        chain.remove(1);
    }
    driver.submit_on(vring, 3 * number, &chain);
}

fn answered(driver: &Driver, vring: usize) -> u16 {
    driver.vrings[vring].used_index(&driver.memory)
}

fn await_answers(driver: &Driver, vring: usize, count: u16) {
    eventually("the requests complete", || answered(driver, vring) == count);
}

/// A driver with four requests, of which one was let pass. A flush behind them tells that the server has seen them all.
fn held_back(fixture: &Fixture, kind: u32) -> Driver {
    fixture.throttle.set(SLOW);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    for number in 0..4 {
        submit(&mut driver, 0, number, kind);
    }
    submit(&mut driver, 0, 4, T_FLUSH);
    await_answers(&driver, 0, 2);
    driver
}

#[test]
fn what_limits_hold_back_starts_when_they_are_lifted() {
    for kind in [T_IN, T_OUT] {
        let fixture = fixture();
        let driver = held_back(&fixture, kind);
        eventually("three are in flight", || fixture.counters.in_flight() == 3);
        fixture.throttle.set(RateLimits::default());
        await_answers(&driver, 0, 5);
        eventually("none is in flight", || fixture.counters.in_flight() == 0);
        let Totals {
            reads,
            writes,
            flushes,
            throttled,
            errors,
            ..
        } = fixture.counters.totals();
        assert_eq!((reads + writes, flushes, throttled, errors), (4, 1, 3, 0));
        // The client waited for the limits as well, the storage did what it was given at once.
        let latencies = fixture.counters.latencies();
        let Latency {
            storage, request, ..
        } = &latencies[0];
        assert_eq!((storage.count, request.count), (4, 4));
        assert_eq!(storage.sum_ns, 0);
        let held_ns = fixture.counters.totals().throttled_ns;
        assert!(held_ns > 0 && request.sum_ns == held_ns, "{request:?}");
    }
}

#[test]
fn a_limit_is_shared_by_the_queues_of_an_export() {
    let fixture = fixture();
    let mut driver = held_back(&fixture, T_IN);
    driver.add_vring(128);
    submit(&mut driver, 1, 0, T_IN);
    submit(&mut driver, 1, 1, T_FLUSH);
    await_answers(&driver, 1, 1);
    assert_eq!(fixture.counters.totals().reads, 1);
    fixture.throttle.set(RateLimits::default());
    await_answers(&driver, 1, 2);
}

#[test]
fn a_driver_that_stops_a_vring_does_not_wait_for_the_limit() {
    let fixture = fixture();
    let mut driver = held_back(&fixture, T_OUT);
    driver.frontend.get_vring_base(0).unwrap();
    assert_eq!(answered(&driver, 0), 5);
    // What went ahead is owed.
    driver.start(0, 5);
    submit(&mut driver, 0, 5, T_OUT);
    submit(&mut driver, 0, 6, T_FLUSH);
    await_answers(&driver, 0, 6);
    assert_eq!(fixture.counters.totals().writes, 4);
}

#[test]
fn the_session_of_a_client_that_goes_does_not_wait_for_the_limit() {
    let fixture = fixture();
    drop(held_back(&fixture, T_IN));
    fixture.wait_empty();
}

#[test]
fn limits_are_options_and_shown() {
    let lab = sandbox();
    let spec = "a=mem:1M,iops-read=5000,burst-ms=50";
    let server = lab.serve(&["--ublk", "no", "--bps-total", "10M", spec]);
    let text = lab.ok(&["stat", "a"]);
    let wanted = "limits    iops-read=5000,bps-total=10M,burst-ms=50\n";
    assert!(text.contains(wanted), "{text}");
    let json: serde_json::Value = serde_json::from_str(&lab.ok(&["stat", "a", "--json"])).unwrap();
    assert_eq!(json["limits"]["bps_total"], 10 << 20);
    assert_eq!(json["limits"]["iops_read"], 5000);
    server.stop().unwrap();
    lab.serve_fails(&["mem:1M,iops-total=many"], 2, &["iops-total", "0 to"]);
}

#[test]
fn an_export_ends_at_once_whatever_its_limits_hold_back() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "a=mem:1M,bps-total=1,burst-ms=0"]);
    let mut driver = Driver::running(lab.connect("a"), VERSION_1 | PROTOCOL);
    for number in 0..2 {
        submit(&mut driver, 0, number, T_OUT);
    }
    submit(&mut driver, 0, 2, T_FLUSH);
    await_answers(&driver, 0, 2);
    server.stop().unwrap();
    await_answers(&driver, 0, 3);
}
