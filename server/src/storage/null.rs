//! A disk that accepts all requests and stores nothing.

use std::io;

use crate::engine::{RingBuffers, Storage, StorageControl, StorageQueue};
use crate::io::{Ring, Slot};
use crate::request::{Limits, Progress, Request};

/// A disk without storage: writes are dropped, reads leave the buffers unchanged. For measuring doors.
#[derive(Debug)]
pub struct Null {
    limits: Limits,
}

impl Null {
    /// A null disk with these limits.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits }
    }
}

impl StorageControl for Null {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn ring_buffers(&self) -> RingBuffers {
        // Reads are not filled: they return what the pages held before.
        RingBuffers::Possible
    }

    fn grow(&self, wanted_bytes: Option<u64>) -> io::Result<u64> {
        Ok(wanted_bytes.unwrap_or_else(|| self.limits.capacity.bytes()))
    }

    fn cut(&self, _capacity_bytes: u64) -> io::Result<()> {
        Ok(())
    }
}

impl Storage for Null {
    type Queue = NullQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _ring: &mut Ring, _slots: u32) -> io::Result<NullQueue> {
        Ok(NullQueue)
    }
}

/// The queue of a null disk: everything is done at once.
#[derive(Debug)]
pub struct NullQueue;

impl StorageQueue for NullQueue {
    fn start(&mut self, _ring: &mut Ring, _slot: Slot, _request: &mut Request) -> Progress {
        Progress::Done(Ok(()))
    }

    fn advance(
        &mut self,
        _ring: &mut Ring,
        slot: Slot,
        _request: &mut Request,
        _kind: u16,
        _result: i32,
    ) -> Progress {
        unreachable!("a null disk puts nothing on the ring, slot {slot}")
    }
}
