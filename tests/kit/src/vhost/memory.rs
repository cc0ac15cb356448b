//! Guest memory.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::AtomicU16;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::VhostUserMemoryRegionInfo;

use super::{MEMORY_BYTES, USER_BASE};

/// A descriptor: address, length, flags, next.
pub type Raw = (u64, u32, u16, u16);

/// Guest memory, mapped twice: here and in the server.
#[derive(Debug)]
pub struct Memory {
    /// What the server is given to map.
    pub file: File,
    base: *mut u8,
}

// SAFETY: the mapping belongs to the value; all access is raw or atomic.
unsafe impl Send for Memory {}

impl Memory {
    /// Zeroes.
    #[must_use]
    pub fn new() -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, MEMORY_BYTES).unwrap();
        let len = usize::try_from(MEMORY_BYTES).unwrap();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) };
        Self {
            file,
            base: base.unwrap().cast(),
        }
    }

    /// A pointer to `len` bytes at an address.
    ///
    /// # Panics
    /// They are not all in the memory.
    #[must_use]
    pub fn at(&self, address: u64, len: usize) -> *mut u8 {
        assert!(address + len as u64 <= MEMORY_BYTES);
        self.base.wrapping_add(usize::try_from(address).unwrap())
    }

    /// Writes bytes.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        // SAFETY: `at` checked the range; nothing else in this process refers to the memory.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(address, bytes.len()), bytes.len())
        };
    }

    /// Reads bytes.
    #[must_use]
    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: as for `put`.
        unsafe { ptr::copy_nonoverlapping(self.at(address, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Reads a byte that the device may be writing.
    #[must_use]
    pub fn byte(&self, address: u64) -> u8 {
        // SAFETY: as for `put`.
        unsafe { self.at(address, 1).read_volatile() }
    }

    /// A word that both sides access.
    #[must_use]
    pub fn word(&self, address: u64) -> &AtomicU16 {
        // SAFETY: mapped as long as `self`, aligned by the callers, only accessed atomically.
        unsafe { AtomicU16::from_ptr(self.at(address, 2).cast()) }
    }

    /// Writes an entry of a descriptor table.
    pub fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): Raw) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// The whole memory as one region.
    #[must_use]
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        self.part(0, MEMORY_BYTES)
    }

    /// A region for a part of the memory.
    #[must_use]
    pub fn part(&self, from: u64, len: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: from,
            memory_size: len,
            userspace_addr: USER_BASE + from,
            mmap_offset: from,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is not used after the value.
        unsafe { munmap(self.base.cast(), usize::try_from(MEMORY_BYTES).unwrap()) }.unwrap();
    }
}
