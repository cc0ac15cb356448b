//! Room for a record.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::pipe::Mode;
use crate::producer::Producer;

/// Room for bytes that the consumer will see when they are committed: part of a ring, or of a buffer.
///
/// It can be written to and not read, and nobody gets a `&mut [u8]` of it: with the kernel's ring whoever
/// may write to the pipe can write to this memory as well. What is committed without having been written to
/// is whatever was there before.
#[derive(Debug)]
pub struct Grant<'a> {
    producer: &'a mut Producer,
    len_bytes: usize,
    mode: Mode,
}

impl<'a> Grant<'a> {
    #[inline]
    pub(super) fn new(producer: &'a mut Producer, len_bytes: usize, mode: Mode) -> Self {
        Self {
            producer,
            len_bytes,
            mode,
        }
    }

    /// How many bytes there is room for.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether there is no room: none was asked for.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Writes `bytes` from `offset` on.
    ///
    /// # Panics
    /// They do not fit.
    #[inline]
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        let fits = offset
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.len_bytes);
        assert!(fits, "more is written than was reserved");
        self.producer.put(offset, bytes);
    }

    /// Fills all of it.
    ///
    /// # Panics
    /// There are not as many bytes as were reserved.
    #[inline]
    pub fn copy_from_slice(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len_bytes, "not as many as were reserved");
        self.producer.put(0, bytes);
    }

    /// read(2) of another file right into it, from `offset` on; how many bytes were read, which is zero at
    /// the end of that file, or if there is no room after `offset`.
    pub fn read_from(&mut self, offset: usize, file: impl AsFd) -> io::Result<usize> {
        let room = self.len_bytes.saturating_sub(offset);
        let start = self.as_mut_ptr().wrapping_add(offset.min(self.len_bytes));
        loop {
            // SAFETY: the kernel writes at most `room` bytes, which is what follows `start`.
            let count =
                unsafe { libc::read(file.as_fd().as_raw_fd(), start.cast::<libc::c_void>(), room) };
            if let Ok(count) = usize::try_from(count) {
                return Ok(count);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// The address, for a system call that writes there. Writing through it otherwise needs volatile or
    /// atomic stores.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.producer.slot(self.len_bytes).as_ptr()
    }

    /// Hands over the first `len_bytes` of it; more than there are is all of them.
    #[inline]
    pub fn commit(self, len_bytes: usize) -> io::Result<()> {
        self.producer
            .commit(len_bytes.min(self.len_bytes), self.mode)
    }
}
