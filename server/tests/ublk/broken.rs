//! A ublk door over storage whose queues misbehave.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use ublkup::door::ublk::{DoorEnd, UblkDoor};
use ublkup::engine::{Storage, StorageControl, StorageQueue};
use ublkup::io::{Ring, Slot};
use ublkup::request::{Limits, Op, Progress, Request};

use crate::{config, is_gone, limits, no_end, with_id, write_page};

/// A disk whose queues misbehave.
struct Broken {
    limits: Limits,
    no_queue: bool,
}

impl StorageControl for Broken {
    fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Storage for Broken {
    type Queue = BrokenQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _ring: &mut Ring, _slots: u32) -> io::Result<BrokenQueue> {
        if self.no_queue {
            return Err(io::Error::other("no queue today"));
        }
        Ok(BrokenQueue)
    }
}

/// Panics at the first write.
struct BrokenQueue;

impl StorageQueue for BrokenQueue {
    fn start(&mut self, _: &mut Ring, _: Slot, request: &mut Request) -> Progress {
        assert!(
            !matches!(request.op(), Op::Write { .. }),
            "a bug, on purpose"
        );
        Progress::Done(Ok(()))
    }

    fn advance(&mut self, _: &mut Ring, _: Slot, _: &mut Request, _: u16, _: i32) -> Progress {
        unreachable!("nothing is ever pending")
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_queue_that_cannot_start_leaves_no_device() {
    let broken = Arc::new(Broken {
        limits: limits(),
        no_queue: true,
    });
    let config = with_id(240);
    let error = UblkDoor::start(&config, &broken, Arc::default, no_end).unwrap_err();
    assert!(error.to_string().contains("no queue today"), "{error}");
    assert!(is_gone(240));
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_panic_in_a_queue_thread_fails_the_io_and_removes_the_device() {
    let (sender, ends) = channel();
    let broken = Arc::new(Broken {
        limits: limits(),
        no_queue: false,
    });
    let report = move |end| sender.send(end).unwrap();
    let door = UblkDoor::start(&config(), &broken, Arc::default, report).unwrap();
    let (id, begin) = (door.id(), Instant::now());
    let write = write_page(&door.block_path());
    assert!(write.unwrap_err().contains("Input/output error"));
    let end = ends.recv_timeout(Duration::from_secs(20)).unwrap();
    let DoorEnd::Failed(error) = end else {
        panic!("{end:?}");
    };
    assert!(error.to_string().contains("panicked"), "{error}");
    assert!(is_gone(id));
    // The other queues did not wait for commands that no cancellation reaches (10 s, in vain).
    assert!(begin.elapsed() < Duration::from_secs(9));
    door.stop().unwrap();
}
