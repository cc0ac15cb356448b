//! What becomes of a vhost session whose requests end elsewhere, and do not.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/elsewhere.rs"]
mod elsewhere;

use std::time::Duration;

use common::*;
use elsewhere::{Elsewhere, Holder};
use testkit::wait::eventually;

/// From here on requests are held.
const HELD_SECTOR: u64 = 1024;

fn fixture() -> (Fixture, Holder) {
    let disk = Elsewhere::new(limits(1 << 20), 1024 * 512);
    let holder = disk.holder();
    (Fixture::new(disk, 1), holder)
}

/// Begins a write that is held, with descriptors and memory of its own.
fn begin_held(driver: &mut Driver, holder: &Holder) {
    let (control, data) = (DATA + (64 << 10), DATA + (65 << 10));
    driver.header(control, T_OUT, HELD_SECTOR);
    let chain = [(control, 16, 0), (data, 512, 0), (control + 16, 1, WRITE)];
    driver.submit_on(0, 8, &chain);
    eventually("the request is held", || holder.len() == 1);
}

#[test]
fn a_request_that_does_not_end_holds_up_no_other() {
    let (fixture, holder) = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    begin_held(&mut driver, &holder);
    for sector in 0..100 {
        assert_eq!(driver.write(sector, &[7; 512]), OK);
        assert_eq!(driver.read(sector, 512), (OK, vec![7; 512]));
    }
    assert_eq!(holder.len(), 1);
    holder.release();
    let Driver { memory, vrings, .. } = &mut driver;
    assert_eq!(vrings[0].wait(memory), (8, 1));
}

#[test]
fn a_session_ends_when_the_last_of_its_requests_has() {
    let (fixture, holder) = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    begin_held(&mut driver, &holder);
    drop(driver);
    // A write that is under way must not come after those of the next client.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(fixture.door.sessions().len(), 1);
    holder.release();
    fixture.wait_empty();
    let mut next = Driver::running(fixture.connect(), USUAL);
    assert_eq!(next.write(0, &[1; 512]), OK);
}

#[test]
fn a_queue_thread_that_panics_waits_for_its_requests_elsewhere() {
    let (fixture, holder) = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    begin_held(&mut driver, &holder);
    driver.prepare(T_IN, HELD_SECTOR - 1, &[(512, WRITE)]);
    // What is under way may still be written to memory of the thread.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(fixture.door.sessions().len(), 1);
    holder.release();
    fixture.wait_empty();
}
