//! Bytes that a consumer has read ahead.

use crate::bytes::Bytes;
use crate::memory::MAX_RECORD_BYTES;

/// Bytes from the pipe, and the first part of a record of which the rest is to come.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Buffer {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; MAX_RECORD_BYTES],
            start: 0,
            end: 0,
        }
    }

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(super) fn bytes(&self) -> Bytes<'_> {
        Bytes::of(&self.bytes[self.start..self.end])
    }

    /// Takes the first `count` bytes.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
    }

    /// The free space at the end, of which [`Buffer::add`] tells how much was filled.
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    pub(super) fn add(&mut self, count: usize) {
        self.end += count;
    }
}
