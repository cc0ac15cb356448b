//! Memory that a peer shares with this process and may change at any time.
//!
//! It is only ever copied, by volatile or atomic accesses; nothing here hands out a reference to it. What was
//! copied is what is checked and used.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::{AtomicAccess, ByteValued, Bytes, VolatileMemory, VolatileRef, VolatileSlice};

use super::access;
use super::sigbus;

/// Why an access inside a checked part cannot fail.
const INSIDE: &str = "the access is aligned and inside of the checked part";

/// Mapped pages of a peer's file, and the watch over them.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len_bytes: usize,
    /// Taken just before the pages are unmapped.
    watch: Option<sigbus::Watch>,
}

// SAFETY: `start` is only an address; all access to the mapping is volatile or atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.watch = None;
        // SAFETY: every user of the mapping holds it by `Arc`, so nothing uses it any more. It cannot fail for a
        // range that was mapped as one.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len_bytes) };
    }
}

/// A range of shared memory. It keeps its mapping.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    start: NonNull<u8>,
    len_bytes: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: `start` is only an address inside of `mapping`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps `len_bytes` of `file` from `offset`, a multiple of its page size.
    ///
    /// # Errors
    ///
    /// When the file cannot be mapped for reading and writing.
    pub(super) fn map(file: &File, offset: u64, len_bytes: usize) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of this process.
        let start = unsafe { mmap(ptr::null_mut(), len_bytes, prot, flags, file, offset) }
            .map_err(|error| {
                let file = file.as_raw_fd();
                io::Error::other(format!(
                    "cannot map {len_bytes} bytes of fd {file}: {error}"
                ))
            })?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut mapping = Mapping {
            start,
            len_bytes,
            watch: None,
        };
        mapping.watch = Some(sigbus::Watch::new(start.as_ptr(), len_bytes)?);
        Ok(Self {
            start,
            len_bytes,
            mapping: Arc::new(mapping),
        })
    }

    /// `len_bytes` of it from `offset`, if it is that long.
    pub(super) fn part(&self, offset: u64, len_bytes: u64) -> Option<Self> {
        let total = self.len_bytes as u64;
        if offset > total || len_bytes > total - offset {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        Some(Self {
            // SAFETY: the offset is inside of the mapping, as was just checked.
            start: unsafe { self.start.add(offset) },
            len_bytes: usize::try_from(len_bytes).ok()?,
            mapping: Arc::clone(&self.mapping),
        })
    }

    /// The memory itself.
    #[inline(always)]
    pub(super) fn slice(&self) -> VolatileSlice<'_> {
        access::point();
        // SAFETY: the range lies in the mapping, which `self` keeps; this process accesses it only by
        // volatile and atomic operations.
        unsafe { VolatileSlice::new(self.start.as_ptr(), self.len_bytes) }
    }

    /// Where it begins in this process.
    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Its length.
    pub(super) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether it begins at a multiple of `alignment`.
    pub(super) fn is_aligned(&self, alignment: usize) -> bool {
        self.start.as_ptr().addr().is_multiple_of(alignment)
    }

    /// Tells one mapping from another, as long as both exist.
    pub(super) fn mapping(&self) -> *const () {
        Arc::as_ptr(&self.mapping).cast()
    }

    /// Whether the peer took the memory away.
    pub(super) fn is_poisoned(&self) -> bool {
        let watch = self.mapping.watch.as_ref();
        watch.is_some_and(sigbus::Watch::is_poisoned)
    }

    /// Loads an integer atomically. The offset is aligned, and inside.
    pub(super) fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> T {
        self.slice().load(offset, order).expect(INSIDE)
    }

    /// Stores an integer atomically. The offset is aligned, and inside.
    pub(super) fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) {
        self.slice().store(value, offset, order).expect(INSIDE);
    }

    /// [`load`](Self::load) of an index or of flags. (Of any type, vm-memory's is a call and a jump by the order.)
    #[inline(always)]
    pub(super) fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        let memory = self.slice();
        let word: &AtomicU16 = memory.get_atomic_ref(offset).expect(INSIDE);
        word.load(order)
    }

    /// [`store`](Self::store) of an index or of flags.
    #[inline(always)]
    pub(super) fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        let memory = self.slice();
        let word: &AtomicU16 = memory.get_atomic_ref(offset).expect(INSIDE);
        word.store(value, order);
    }

    /// Reads a value once. It is an integer: a volatile load of anything else is one of each of its bytes.
    ///
    /// # Safety
    ///
    /// The value lies inside: `offset` and its size are at most [`len_bytes`](Self::len_bytes).
    #[inline(always)]
    pub(super) unsafe fn read<T: ByteValued>(&self, offset: usize) -> T {
        debug_assert!(offset + size_of::<T>() <= self.len_bytes);
        access::point();
        // SAFETY: inside of the mapping, which `self` keeps, as the caller promises.
        unsafe { VolatileRef::new(self.start.add(offset).as_ptr()) }.load()
    }

    /// Writes a word that the peer reads only when it is told to. (vm-memory's store goes through the stack.)
    ///
    /// # Safety
    ///
    /// As for [`read`](Self::read), and the offset is aligned.
    #[inline(always)]
    pub(super) unsafe fn write_u32(&self, offset: usize, value: u32) {
        debug_assert!(offset + size_of::<u32>() <= self.len_bytes);
        // SAFETY: as for `read`, and aligned.
        unsafe { self.start.add(offset).cast::<u32>().write_volatile(value) };
    }

    /// Sets bits of a byte, in one order with everything that this thread and others store before and after.
    pub(super) fn set_bits(&self, offset: usize, bits: u8) {
        let byte = self.slice();
        let byte = byte.get_atomic_ref::<AtomicU8>(offset).expect(INSIDE);
        byte.fetch_or(bits, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::door::vhost::memory::tests::memfd;

    #[test]
    fn parts_lie_inside_and_nothing_else_is_reached() {
        let shared = Shared::map(&memfd(0x2000), 0, 0x2000).unwrap();
        for (offset, len) in [
            (0, 0x2001),
            (0x2000, 1),
            (0x2001, 0),
            (8, u64::MAX),
            (u64::MAX, 1),
        ] {
            assert!(shared.part(offset, len).is_none(), "{offset:#x}+{len:#x}");
        }
        let part = shared.part(0x1ffe, 2).unwrap();
        part.store(0, 0x1234u16, Ordering::Relaxed);
        assert_eq!(shared.load::<u16>(0x1ffe, Ordering::Relaxed), 0x1234);
        assert!(part.is_aligned(2) && !part.is_aligned(4));
        let reach =
            |offset| std::panic::catch_unwind(|| part.load::<u16>(offset, Ordering::Relaxed));
        assert!(reach(0).is_ok() && reach(1).is_err() && reach(2).is_err());
    }
}
