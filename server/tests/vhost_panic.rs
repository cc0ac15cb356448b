//! What becomes of a vhost session whose queue thread panics.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::io;
use std::os::unix::net::UnixStream;

use common::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use ublkup::door::ownership::OwnershipState;
use ublkup::engine::{Storage, StorageControl, StorageQueue};
use ublkup::io::{Ring, Slot};
use ublkup::request::{Limits, Progress, Request};

/// Reads of this sector run into a bug.
const BAD_SECTOR: u64 = 7;

struct Buggy(Limits);

struct BuggyQueue;

impl StorageControl for Buggy {
    fn limits(&self) -> &Limits {
        &self.0
    }
}

impl Storage for Buggy {
    type Queue = BuggyQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.0
    }

    fn queue(&self, _: &mut Ring, _: u32) -> io::Result<BuggyQueue> {
        Ok(BuggyQueue)
    }
}

impl StorageQueue for BuggyQueue {
    fn start(&mut self, _: &mut Ring, _: Slot, request: &mut Request) -> Progress {
        assert_ne!(
            request.offset_bytes(),
            BAD_SECTOR * 512,
            "a bug, on purpose"
        );
        Progress::Done(Ok(()))
    }

    fn advance(&mut self, _: &mut Ring, _: Slot, _: &mut Request, _: u16, _: i32) -> Progress {
        unreachable!("nothing is ever pending")
    }
}

fn buggy(read_only: bool) -> Fixture {
    let limits = Limits {
        read_only,
        ..limits(1 << 20)
    };
    Fixture::new(Buggy(limits), 1)
}

/// Waits until the server has hung up.
fn wait_hung_up(connection: &UnixStream) {
    let limit = Timespec::try_from(PATIENCE).unwrap();
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "the server stays");
}

#[test]
fn a_client_whose_queue_thread_panics_is_hung_up_on_and_the_next_one_is_served() {
    let fixture = buggy(false);
    let connection = fixture.connect();
    let watched = connection.try_clone().unwrap();
    let mut driver = Driver::running(connection, USUAL);
    driver.prepare(T_IN, BAD_SECTOR, &[(512, WRITE)]);
    wait_hung_up(&watched);
    fixture.wait_empty();
    drop(driver);
    // It did not stop, so the disk is kept for it.
    assert_eq!(fixture.ownership.state(), OwnershipState::Waiting);
    let mut next = Driver::running(fixture.connect(), USUAL);
    assert_eq!(next.write(0, &[1; 512]), OK);
}

#[test]
fn a_panic_ends_no_other_session() {
    let fixture = buggy(true);
    let mut other = Driver::running(fixture.connect(), USUAL);
    let connection = fixture.connect();
    let watched = connection.try_clone().unwrap();
    let mut driver = Driver::running(connection, USUAL);
    driver.prepare(T_IN, BAD_SECTOR, &[(512, WRITE)]);
    wait_hung_up(&watched);
    eventually("one session is left", || fixture.door.sessions().len() == 1);
    assert_eq!(other.read(0, 512).0, OK);
}
