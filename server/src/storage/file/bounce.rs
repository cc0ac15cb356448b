//! Bounce buffers for data that is not aligned as `O_DIRECT` requires.

use std::io;
use std::ptr;

use crate::io::AnonymousMemory;
use crate::request::Buffer;

/// Size of a bounce buffer; larger transfers are split.
pub(super) const BOUNCE_BYTES: usize = 256 << 10;

/// Bounce buffers of one queue. Each is mapped when first needed.
const BOUNCE_BUFFERS: usize = 4;

/// Bounce buffers, lent by number.
#[derive(Debug)]
pub(super) struct Pool {
    buffers: [Option<AnonymousMemory>; BOUNCE_BUFFERS],
    lent: [bool; BOUNCE_BUFFERS],
}

impl Pool {
    pub(super) fn new() -> Self {
        Self {
            buffers: [const { None }; BOUNCE_BUFFERS],
            lent: [false; BOUNCE_BUFFERS],
        }
    }

    /// Lends a buffer. `Ok(None)`: all are lent, one will be given back.
    ///
    /// # Errors
    ///
    /// When there is no memory for the first one, so that none will be given back.
    pub(super) fn take(&mut self) -> io::Result<Option<usize>> {
        let Some(number) = self.lent.iter().position(|lent| !lent) else {
            return Ok(None);
        };
        if self.buffers[number].is_none() {
            match AnonymousMemory::new(BOUNCE_BYTES) {
                Ok(memory) => self.buffers[number] = Some(memory),
                Err(_) if self.lent.contains(&true) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        self.lent[number] = true;
        Ok(Some(number))
    }

    pub(super) fn give_back(&mut self, number: usize) {
        debug_assert!(self.lent[number], "bounce buffer {number} was not lent");
        self.lent[number] = false;
    }

    /// Address of a buffer that is lent.
    pub(super) fn memory(&self, number: usize) -> *mut u8 {
        self.buffers[number]
            .as_ref()
            .expect("a buffer that is lent is mapped")
            .as_ptr()
    }
}

/// Copies the first `len_bytes` of a buffer list into `to`.
///
/// # Safety
///
/// The buffers must be mapped, `to` must have room, and both must stay so through the call.
pub(super) unsafe fn gather(list: &[Buffer], to: *mut u8, len_bytes: usize) {
    let mut done = 0;
    for buffer in list {
        let part = buffer.iov_len.min(len_bytes - done);
        // SAFETY: promised by the caller.
        unsafe { ptr::copy(buffer.iov_base.cast(), to.add(done), part) };
        done += part;
    }
}

/// Copies `len_bytes` from `from` into the beginning of a buffer list.
///
/// # Safety
///
/// As for [`gather`], in the other direction.
pub(super) unsafe fn scatter(from: *const u8, list: &[Buffer], len_bytes: usize) {
    let mut done = 0;
    for buffer in list {
        let part = buffer.iov_len.min(len_bytes - done);
        // SAFETY: promised by the caller.
        unsafe { ptr::copy(from.add(done), buffer.iov_base.cast(), part) };
        done += part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_lends_each_buffer_once() {
        let mut pool = Pool::new();
        let taken: Vec<_> = std::iter::from_fn(|| pool.take().unwrap()).collect();
        assert_eq!(taken, [0, 1, 2, 3]);
        pool.give_back(2);
        assert_eq!(pool.take().unwrap(), Some(2));
        assert_eq!(pool.take().unwrap(), None);
    }
}
