//! Page-aligned memory of this process.

use std::io;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vm_memory::VolatileSlice;

/// Private anonymous memory. It reads as zeroes until it is written to, and pages that were never
/// touched take no room.
#[derive(Debug)]
pub struct AnonymousMemory {
    base: *mut u8,
    len_bytes: usize,
}

// SAFETY: the mapping belongs to the value alone. It is accessed through raw pointers, whose users
// answer for the order of their accesses.
unsafe impl Send for AnonymousMemory {}
// SAFETY: as above.
unsafe impl Sync for AnonymousMemory {}

impl AnonymousMemory {
    /// Maps `len_bytes`.
    ///
    /// # Errors
    ///
    /// When the address space or the machine's overcommit policy does not allow it.
    pub fn new(len_bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses overlaps no other memory.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        Ok(Self {
            base: base.cast(),
            len_bytes,
        })
    }

    /// The first byte. Valid for as long as the value.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// All of it.
    #[must_use]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: mapped for as long as `self`. The kernel and other threads may access it at the same time;
        // what is made of the slice are copies.
        unsafe { VolatileSlice::new(self.base, self.len_bytes) }
    }
}

impl Drop for AnonymousMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; users of the pointer, the kernel among them, keep the value. It
        // fails only for a range that was never mapped.
        let _ = unsafe { munmap(self.base.cast(), self.len_bytes) };
    }
}
