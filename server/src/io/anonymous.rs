//! Page-aligned memory of this process.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vm_memory::VolatileSlice;

/// Anonymous memory, private unless it is made [`shareable`](Self::shareable). It reads as zeroes until it is written to,
/// and pages that were never touched take no room.
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

    /// Maps `len_bytes` that another process can map as well: it is given the descriptor, and cannot take pages away
    /// from here with it.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new), and without a descriptor.
    pub fn shareable(name: &str, len_bytes: usize) -> io::Result<(Self, OwnedFd)> {
        let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, len_bytes as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // SAFETY: as in `new`.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                0,
            )?
        };
        let base = base.cast();
        Ok((Self { base, len_bytes }, file))
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
