//! The record of chains in flight, for fuzz targets.

use std::fs::File;
use std::io;

use vhost::vhost_user::message::VhostUserInflight;

use crate::door::vhost::inflight::{InflightBuffer, InflightQueue};

/// A record of a session, in memory of the client's.
#[derive(Clone, Debug)]
pub struct Record(InflightBuffer);

impl Record {
    /// A new one, and the file that it is in.
    ///
    /// # Errors
    ///
    /// When a session would refuse to make it.
    pub fn create(queues: u16, size: u16) -> io::Result<(Self, File)> {
        let (told, file) = InflightBuffer::create(&VhostUserInflight::new(0, 0, queues, size))?;
        Ok((Self(InflightBuffer::map(&told, &file)?), file))
    }

    /// One that a client sent back.
    ///
    /// # Errors
    ///
    /// When a session would refuse it.
    pub fn map(
        file: &File,
        len_bytes: u64,
        offset_bytes: u64,
        queues: u16,
        size: u16,
    ) -> io::Result<Self> {
        let told = VhostUserInflight::new(len_bytes, offset_bytes, queues, size);
        InflightBuffer::map(&told, file).map(Self)
    }

    /// Forgets all chains, as at a reset.
    pub fn clear(&self) {
        self.0.clear();
    }

    /// The part of a vring.
    ///
    /// # Errors
    ///
    /// When there is none for a ring of this size.
    pub fn queue(&self, index: u16, size: u16) -> io::Result<RecordQueue> {
        self.0.queue(index, size).map(RecordQueue)
    }
}

/// The record of one vring.
#[derive(Debug)]
pub struct RecordQueue(InflightQueue);

impl RecordQueue {
    pub(super) fn into_inner(self) -> InflightQueue {
        self.0
    }

    /// The chains that were in flight, in their order, when the ring's used index was `used`; `None` if the record
    /// makes no sense.
    pub fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        self.0.recover(used).ok()
    }

    /// A chain was popped.
    pub fn take(&mut self, head: u16) {
        self.0.take(head);
    }

    /// A chain is being returned.
    pub fn returned(&mut self, head: u16) {
        self.0.returned(head);
    }

    /// The driver sees what was returned.
    pub fn published(&mut self, used: u16) {
        self.0.published(used);
    }
}
