//! A ring's memory as one end maps it: control page, producer's page, consumer's page, data twice in a row.
//!
//! The layout is the kernel's, also where two processes made the memory themselves. Each piece is mapped
//! with the rights that this end has to it. The data is mapped twice, so that what wraps around the end
//! of the ring still is one stretch of addresses.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use rustix::param::page_size;

use crate::protocol::{Fence, Page, Word};

/// The control page's words, as 32-bit indices.
pub(crate) mod control {
    /// The version of the layout: 1.
    pub const VERSION: usize = 0;
    /// Bytes of data.
    pub const SIZE: usize = 1;
    /// The size less one.
    pub const MASK: usize = 2;
    /// All of it, in bytes.
    pub const MMAP_SIZE: usize = 3;
    /// Where the producer's page is.
    pub const PRODUCER_OFFSET: usize = 4;
    /// Where the consumer's page is.
    pub const CONSUMER_OFFSET: usize = 5;
    /// Where the data is.
    pub const DATA_OFFSET: usize = 6;
    /// [`PENDING`], [`LIVE`], or dead.
    pub const STATE: usize = 8;
    /// Who is gone: [`NO_WRITER`], [`NO_READER`].
    pub const CLOSED: usize = 9;
    /// Changes with the two before it; a futex. The kernel's rings only.
    pub const EVENT: usize = 10;
    /// Who sleeps in the kernel: [`SLEEPS_READ`], [`SLEEPS_WRITE`]. The kernel's rings only.
    pub const WAITING: usize = 32;
    /// How many words there are.
    pub const WORDS: usize = 33;

    /// The only version there is.
    pub const VERSION_1: u32 = 1;
    /// The ring waits for its other end.
    pub const PENDING: u32 = 0;
    /// Data goes through the ring.
    pub const LIVE: u32 = 1;
    /// No writer is left.
    pub const NO_WRITER: u32 = 1;
    /// No reader is left.
    pub const NO_READER: u32 = 2;
    /// Somebody reads or polls in the kernel.
    pub const SLEEPS_READ: u32 = 1;
    /// Somebody writes or polls in the kernel.
    pub const SLEEPS_WRITE: u32 = 2;
}

/// A word in shared memory.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct SharedWord(AtomicU32);

impl SharedWord {
    /// For a futex.
    pub(crate) fn atomic(&self) -> &AtomicU32 {
        &self.0
    }
}

impl Word for SharedWord {
    #[inline]
    fn load(&self, order: Ordering) -> u32 {
        // The page may be mapped for reading only. Rust promises of relaxed loads alone that they work there.
        let value = self.0.load(Ordering::Relaxed);
        if order != Ordering::Relaxed {
            fence(order);
        }
        value
    }

    #[inline]
    fn store(&self, value: u32, order: Ordering) {
        self.0.store(value, order);
    }
}

/// The processor's full barrier.
#[derive(Debug)]
pub struct FullFence;

impl Fence for FullFence {
    #[inline]
    fn full() {
        fence(Ordering::SeqCst);
    }
}

/// Which end of a ring we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Producer,
    Consumer,
}

/// Where the pieces come from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces<'a> {
    /// Control page, producer's page and data at their places in the layout.
    pub main: BorrowedFd<'a>,
    /// The consumer's page, and where it is in that file; `None`: [`Memory::map_consumer`] follows.
    pub consumer: Option<(BorrowedFd<'a>, u64)>,
    /// Whether this end may write to the control page.
    pub control_writable: bool,
}

/// Pages before the data.
pub(crate) const HEAD_PAGES: usize = 3;

/// The mapping. The child of a fork does not have it.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    page_bytes: usize,
    size: u32,
    role: Role,
    owner_pid: u32,
}

// SAFETY: the mapping belongs to this value alone; what it points to is shared with another process and
// reached by atomic operations, or (the producer's free room) by whoever has this value alone.
unsafe impl Send for Memory {}

impl Memory {
    /// Bytes of a file that holds the whole layout.
    pub(crate) fn file_bytes(size: u32) -> u64 {
        (HEAD_PAGES * page_size()) as u64 + u64::from(size)
    }

    /// Whether a ring may have this size: a power of two, whole pages, at most 2^30.
    pub(crate) fn is_size(size: u64) -> bool {
        size.is_power_of_two() && size >= page_size() as u64 && size <= 1 << 30
    }

    /// Maps a ring of `size` bytes of data.
    pub(crate) fn map(role: Role, size: u32, pieces: &Pieces<'_>) -> Result<Self, Errno> {
        if !Self::is_size(size.into()) {
            return Err(Errno::INVAL);
        }
        let page_bytes = page_size();
        let head_bytes = HEAD_PAGES * page_bytes;
        let data_bytes = size as usize;
        let total = head_bytes + 2 * data_bytes;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                total,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
        // From here on dropping it unmaps.
        let this = Self {
            base,
            page_bytes,
            size,
            role,
            owner_pid: std::process::id(),
        };
        let owned = |owner: Role| match owner == role {
            true => ProtFlags::READ | ProtFlags::WRITE,
            false => ProtFlags::READ,
        };
        let control = match pieces.control_writable {
            true => ProtFlags::READ | ProtFlags::WRITE,
            false => ProtFlags::READ,
        };
        let page = page_bytes as u64;
        let main = |offset| (pieces.main, offset);
        let data = main(head_bytes as u64);
        let producer = owned(Role::Producer);
        this.put(0, page_bytes, control, main(0))?;
        this.put(page_bytes, page_bytes, producer, main(page))?;
        if let Some(consumer) = pieces.consumer {
            this.put(2 * page_bytes, page_bytes, owned(Role::Consumer), consumer)?;
        }
        this.put(head_bytes, data_bytes, producer, data)?;
        this.put(head_bytes + data_bytes, data_bytes, producer, data)?;
        Ok(this)
    }

    /// Maps the consumer's page, which the producer had to wait for.
    pub(crate) fn map_consumer(&mut self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let rights = match self.role {
            Role::Producer => ProtFlags::READ,
            Role::Consumer => ProtFlags::READ | ProtFlags::WRITE,
        };
        self.put(2 * self.page_bytes, self.page_bytes, rights, (file, 0))
    }

    /// Maps one piece in its place.
    fn put(
        &self,
        place: usize,
        len_bytes: usize,
        rights: ProtFlags,
        (file, offset): (BorrowedFd<'_>, u64),
    ) -> Result<(), Errno> {
        assert!(place + len_bytes <= self.total_bytes());
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the piece lies inside the region that is ours, and replaces what nobody has used yet. A
        // child that used the ring would be a second producer or consumer, and there can be only one.
        unsafe {
            let at = self.base.as_ptr().add(place).cast();
            mmap(at, len_bytes, rights, flags, file, offset)?;
            madvise(at, len_bytes, Advice::LinuxDontFork)
        }
    }

    fn total_bytes(&self) -> usize {
        HEAD_PAGES * self.page_bytes + 2 * self.size as usize
    }

    /// The bytes of data.
    #[inline]
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// A word of the control page.
    #[inline]
    pub(crate) fn control(&self, index: usize) -> &SharedWord {
        assert!(index < control::WORDS);
        // SAFETY: the control page is mapped as long as `self` lives, its words are aligned, and nobody
        // accesses them but by atomic operations.
        unsafe { self.base.cast::<SharedWord>().add(index).as_ref() }
    }

    /// Fills the control page of a ring between two processes, before anybody else has it.
    pub(crate) fn write_control(&self) {
        let page = to_word(self.page_bytes);
        for (index, value) in [
            (control::VERSION, control::VERSION_1),
            (control::SIZE, self.size),
            (control::MASK, self.size - 1),
            (control::PRODUCER_OFFSET, page),
            (control::CONSUMER_OFFSET, 2 * page),
            (control::DATA_OFFSET, 3 * page),
            (control::MMAP_SIZE, 3 * page + self.size),
            (control::STATE, control::LIVE),
        ] {
            self.control(index).store(value, Ordering::Release);
        }
    }

    /// The value of a word of the control page.
    #[inline]
    pub(crate) fn word(&self, index: usize) -> u32 {
        self.control(index).load(Ordering::Acquire)
    }

    #[inline]
    fn page(&self, owner: Role) -> &Page<SharedWord> {
        let index = match owner {
            Role::Producer => 1,
            Role::Consumer => 2,
        };
        // SAFETY: the page is mapped as long as `self` lives, is aligned, and nobody accesses its words
        // but by atomic operations.
        unsafe { self.base.add(index * self.page_bytes).cast().as_ref() }
    }

    /// The page that this end writes.
    #[inline]
    pub(crate) fn own(&self) -> &Page<SharedWord> {
        self.page(self.role)
    }

    /// The page that the other end writes.
    #[inline]
    pub(crate) fn peer(&self) -> &Page<SharedWord> {
        match self.role {
            Role::Producer => self.page(Role::Consumer),
            Role::Consumer => self.page(Role::Producer),
        }
    }

    /// Says that this end leaves, where no ring was made of the memory yet.
    pub(crate) fn abandon(&self) {
        self.own().closed.store(1, Ordering::Release);
    }

    /// The data at a position: `size` bytes from here are mapped.
    #[inline]
    pub(crate) fn at(&self, position: u32) -> NonNull<u8> {
        let offset = (position & (self.size - 1)) as usize;
        // SAFETY: less than `size` into the first of two mappings of `size` bytes.
        unsafe { self.base.add(HEAD_PAGES * self.page_bytes + offset) }
    }
}

fn to_word(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A forked child does not have the pieces, and may have something else in their place.
        if std::process::id() != self.owner_pid {
            return;
        }
        // SAFETY: the region is ours, and what borrowed from it borrowed `self`.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.total_bytes()) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
