//! Aligned memory: for data whose buffers do not lie as `O_DIRECT` wants it, and for zeroes.

use std::io;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::request::Buffer;

/// Bytes of one bounce buffer; larger transfers go in pieces.
pub(super) const BOUNCE_BYTES: usize = 256 << 10;

/// Bounce buffers of one queue. They are mapped when first needed.
const BOUNCE_BUFFERS: usize = 4;

/// Anonymous, page-aligned memory; zeroes until it is written to.
#[derive(Debug)]
pub(super) struct Aligned {
    base: *mut u8,
    len_bytes: usize,
}

// SAFETY: the memory belongs to the value alone.
unsafe impl Send for Aligned {}

impl Aligned {
    pub(super) fn new(len_bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        Ok(Self {
            base: base.cast(),
            len_bytes,
        })
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and whoever lends it to the kernel keeps the value meanwhile.
        let _ = unsafe { munmap(self.base.cast(), self.len_bytes) };
    }
}

/// A few bounce buffers, lent out by number.
#[derive(Debug)]
pub(super) struct Pool {
    buffers: [Option<Aligned>; BOUNCE_BUFFERS],
    lent: [bool; BOUNCE_BUFFERS],
}

impl Pool {
    pub(super) fn new() -> Self {
        Self {
            buffers: [const { None }; BOUNCE_BUFFERS],
            lent: [false; BOUNCE_BUFFERS],
        }
    }

    /// A free buffer. `Ok(None)`: all are lent, one will come back.
    ///
    /// # Errors
    ///
    /// When there is no memory for the first one, so that none will come back.
    pub(super) fn take(&mut self) -> io::Result<Option<usize>> {
        let Some(number) = self.lent.iter().position(|lent| !lent) else {
            return Ok(None);
        };
        if self.buffers[number].is_none() {
            match Aligned::new(BOUNCE_BYTES) {
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

    /// Where a buffer that is lent lies.
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
