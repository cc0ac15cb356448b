//! Disks that do what a test wants.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use io_uring::{opcode, types};
use ublkup::engine::{Storage, StorageControl, StorageQueue};
use ublkup::io::{Owner, Ring, Slot, Token};
use ublkup::request::{IoError, Limits, Op, Progress, Request};
use vmm_sys_util::eventfd::EventFd;

use crate::common::{Fixture, limits};

/// Remembers what it was asked for.
pub struct Recorder {
    pub limits: Limits,
    pub seen: Arc<Mutex<Vec<Op>>>,
}

pub struct RecorderQueue(Arc<Mutex<Vec<Op>>>);

impl StorageControl for Recorder {
    fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Storage for Recorder {
    type Queue = RecorderQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _ring: &mut Ring, _slots: u32) -> io::Result<RecorderQueue> {
        Ok(RecorderQueue(Arc::clone(&self.seen)))
    }
}

impl StorageQueue for RecorderQueue {
    fn start(&mut self, _ring: &mut Ring, _slot: Slot, request: &mut Request) -> Progress {
        self.0.lock().unwrap().push(request.op());
        Progress::Done(Ok(()))
    }

    fn advance(&mut self, _: &mut Ring, _: Slot, _: &mut Request, _: u16, _: i32) -> Progress {
        unreachable!("nothing is put on the ring")
    }
}

/// Fills reads with `0x5a`, but only when the gate lets one through.
pub struct Gated {
    pub limits: Limits,
    /// A semaphore: each unit lets one request through.
    pub gate: Arc<EventFd>,
}

impl Gated {
    /// A fixture with such a disk, and its gate, which blocks nobody who reads it.
    pub fn fixture(capacity_bytes: u64, threads: u16) -> (Fixture, Arc<EventFd>) {
        let gate = EventFd::new(libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK).unwrap();
        let gate = Arc::new(gate);
        let disk = Self {
            limits: limits(capacity_bytes),
            gate: Arc::clone(&gate),
        };
        (Fixture::new(disk, threads), gate)
    }
}

pub struct GatedQueue {
    gate: Arc<EventFd>,
    counts: Box<[u64]>,
}

impl StorageControl for Gated {
    fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Storage for Gated {
    type Queue = GatedQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _ring: &mut Ring, slots: u32) -> io::Result<GatedQueue> {
        Ok(GatedQueue {
            gate: Arc::clone(&self.gate),
            counts: vec![0; slots as usize].into(),
        })
    }
}

impl StorageQueue for GatedQueue {
    fn start(&mut self, ring: &mut Ring, slot: Slot, _request: &mut Request) -> Progress {
        let fd = types::Fd(self.gate.as_raw_fd());
        let count = std::ptr::from_mut(&mut self.counts[slot as usize]);
        let token = Token {
            owner: Owner::Storage,
            kind: 0,
            index: slot,
        };
        // SAFETY: the thread drains its ring before it drops the queue.
        match unsafe { ring.push(opcode::Read::new(fd, count.cast(), 8).build(), token) } {
            Ok(()) => Progress::Pending,
            Err(_) => Progress::Full,
        }
    }

    fn advance(
        &mut self,
        _ring: &mut Ring,
        _slot: Slot,
        request: &mut Request,
        _kind: u16,
        result: i32,
    ) -> Progress {
        assert_eq!(result, 8, "the gate is an eventfd");
        for buffer in request.buffers().list() {
            // SAFETY: the door keeps the buffers mapped until the request is finished.
            unsafe { std::ptr::write_bytes(buffer.iov_base.cast::<u8>(), 0x5a, buffer.iov_len) };
        }
        Progress::Done(Ok(()))
    }
}

/// Fails reads half way: what was written of the buffers stays written.
pub struct Halves {
    pub limits: Limits,
}

pub struct HalvesQueue;

impl StorageControl for Halves {
    fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Storage for Halves {
    type Queue = HalvesQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _ring: &mut Ring, _slots: u32) -> io::Result<HalvesQueue> {
        Ok(HalvesQueue)
    }
}

impl StorageQueue for HalvesQueue {
    fn start(&mut self, _ring: &mut Ring, _slot: Slot, request: &mut Request) -> Progress {
        if request.op() != Op::Read {
            return Progress::Done(Ok(()));
        }
        // In three steps, as storage that moves little at once would.
        for _ in 0..3 {
            let part = request.len_bytes() / 6;
            let first = request.buffers().list()[0];
            let len = first.iov_len.min(usize::try_from(part).unwrap());
            // SAFETY: the door keeps the buffers mapped until the request is finished.
            unsafe { std::ptr::write_bytes(first.iov_base.cast::<u8>(), 0x77, len) };
            request.advance(part);
        }
        Progress::Done(Err(IoError::Io))
    }

    fn advance(&mut self, _: &mut Ring, _: Slot, _: &mut Request, _: u16, _: i32) -> Progress {
        unreachable!("nothing is put on the ring")
    }
}
