//! The mapping of a ring: control page, producer's index page, consumer's index page, and the data twice in a row.
//!
//! The layout is the kernel's, also for memory that two processes made themselves. Each piece is mapped with the
//! access that this end has to it. The data is mapped twice, so that a record that wraps around the end of the
//! ring has contiguous addresses.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use rustix::param::page_size;

use crate::bytes::{Bytes, Space};
use crate::protocol::{Fence, IndexPage, Word};

/// The most bytes that can be reserved or peeked at once.
pub const MAX_RECORD_BYTES: usize = 64 << 10;

/// The least size of a ring in bytes. Two records fit, so that a producer that waits for free space for one and
/// a consumer that waits for the whole of another cannot wait for each other.
pub const MIN_SIZE_BYTES: u32 = 128 << 10;

/// The words of the control page, as indices of 32-bit words.
pub(crate) mod control {
    /// The version of the layout: 1.
    pub const VERSION: usize = 0;
    /// Bytes of data.
    pub const SIZE: usize = 1;
    /// The size less one.
    pub const MASK: usize = 2;
    /// Bytes of the whole layout.
    pub const MMAP_SIZE: usize = 3;
    /// Offset of the producer's index page.
    pub const PRODUCER_OFFSET: usize = 4;
    /// Offset of the consumer's index page.
    pub const CONSUMER_OFFSET: usize = 5;
    /// Offset of the data.
    pub const DATA_OFFSET: usize = 6;
    /// [`PENDING`], [`LIVE`], or another value: dead.
    pub const STATE: usize = 8;
    /// Which ends are closed: [`NO_WRITER`], [`NO_READER`].
    pub const CLOSED: usize = 9;
    /// Changes with the two before it; a futex. In the kernel's rings only.
    pub const EVENT: usize = 10;
    /// Which sides have sleepers in the kernel: [`SLEEPS_READ`], [`SLEEPS_WRITE`]. In the kernel's rings only.
    pub const WAITING: usize = 32;
    /// Number of words.
    pub const WORDS: usize = 33;

    /// The only version there is.
    pub const VERSION_1: u32 = 1;
    /// The other end has not asked for the ring yet.
    pub const PENDING: u32 = 0;
    /// Data goes through the ring.
    pub const LIVE: u32 = 1;
    /// No writer is left.
    pub const NO_WRITER: u32 = 1;
    /// No reader is left.
    pub const NO_READER: u32 = 2;
    /// A reader or poller sleeps in the kernel.
    pub const SLEEPS_READ: u32 = 1;
    /// A writer or poller sleeps in the kernel.
    pub const SLEEPS_WRITE: u32 = 2;
}

/// A word in shared memory.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct SharedWord(AtomicU32);

impl SharedWord {
    /// The word itself, for a futex.
    pub(crate) fn atomic(&self) -> &AtomicU32 {
        &self.0
    }
}

impl Word for SharedWord {
    #[inline]
    fn load(&self, order: Ordering) -> u32 {
        // The page may be mapped read-only, where Rust allows no atomic loads but relaxed ones.
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

/// Which end of a ring this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Producer,
    Consumer,
}

/// The files with the pieces of a ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces<'a> {
    /// Control page, producer's index page and data at their offsets in the layout.
    pub main: BorrowedFd<'a>,
    /// The consumer's index page and its offset in that file; `None`: [`Memory::map_consumer`] follows.
    pub consumer: Option<(BorrowedFd<'a>, u64)>,
    /// Whether this end made and sealed `main`. Then it may write the control page, and what it writes no other
    /// process can write.
    pub own: bool,
}

/// Pages before the data.
pub(crate) const HEAD_PAGES: usize = 3;

/// Addresses that are unmapped with the value, in the process that mapped them.
#[derive(Debug)]
struct Region {
    base: NonNull<u8>,
    len_bytes: usize,
    owner_pid: u32,
}

impl Region {
    /// What was mapped just now.
    fn new(base: *mut c_void, len_bytes: usize) -> Result<Self, Errno> {
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?,
            len_bytes,
            owner_pid: std::process::id(),
        })
    }

    /// A word of the control page at its beginning.
    #[inline]
    fn control(&self, index: usize) -> &SharedWord {
        assert!(index < control::WORDS);
        // SAFETY: the control page is mapped as long as `self` lives, its words are aligned, and they are
        // accessed by atomic operations only.
        unsafe { self.base.cast::<SharedWord>().add(index).as_ref() }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // A forked child does not have the mapping, and may have another one at these addresses.
        if std::process::id() != self.owner_pid {
            return;
        }
        // SAFETY: this value owns the region, and all references into it borrow it.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len_bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// The control page of a kernel's ring alone. This end's read(2) and write(2) work beside it, as they do not beside
/// [`Memory`].
#[derive(Debug)]
pub(crate) struct ControlPage(Region);

// SAFETY: this value owns the mapping; the memory is accessed by atomic operations only.
unsafe impl Send for ControlPage {}

impl ControlPage {
    pub(crate) fn map(ring: BorrowedFd<'_>) -> Result<Self, Errno> {
        let len_bytes = page_size();
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing. The kernel does not let a
        // child inherit it.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len_bytes,
                ProtFlags::READ,
                MapFlags::SHARED,
                ring,
                0,
            )?
        };
        Region::new(base, len_bytes).map(Self)
    }

    /// The value of a word.
    pub(crate) fn word(&self, index: usize) -> u32 {
        self.0.control(index).load(Ordering::Acquire)
    }
}

/// The mapping. A forked child does not have it.
#[derive(Debug)]
pub(crate) struct Memory {
    region: Region,
    /// The index page that this end writes, and the one that the peer writes.
    own: NonNull<IndexPage<SharedWord>>,
    peer: NonNull<IndexPage<SharedWord>>,
    data: NonNull<u8>,
    page_bytes: usize,
    size: u32,
    role: Role,
    /// No other process can write what this end can write.
    exclusive: bool,
}

// SAFETY: this value owns the mapping; the memory is accessed by atomic operations only.
unsafe impl Send for Memory {}

impl Memory {
    /// Bytes of a file with the whole layout.
    pub(crate) fn file_bytes(size: u32) -> u64 {
        (HEAD_PAGES * page_size()) as u64 + u64::from(size)
    }

    /// Whether a ring may have so many bytes of data: a power of two, whole pages, at most 2^30.
    pub(crate) fn is_size(size: u64) -> bool {
        let least = u64::from(MIN_SIZE_BYTES).max(page_size() as u64);
        size.is_power_of_two() && (least..=1 << 30).contains(&size)
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
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                total,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )?
        };
        // Dropping it unmaps.
        let region = Region::new(base, total)?;
        let base = region.base;
        // SAFETY: less than `total` bytes into the mapping.
        let at = |offset| unsafe { base.add(offset) };
        let (producer, consumer) = (at(page_bytes).cast(), at(2 * page_bytes).cast());
        let (own, peer) = match role {
            Role::Producer => (producer, consumer),
            Role::Consumer => (consumer, producer),
        };
        let this = Self {
            region,
            own,
            peer,
            data: at(head_bytes),
            page_bytes,
            size,
            role,
            exclusive: pieces.own,
        };
        let owned = |owner: Role| match owner == role {
            true => ProtFlags::READ | ProtFlags::WRITE,
            false => ProtFlags::READ,
        };
        let control = match pieces.own {
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

    /// Maps the consumer's index page, which the producer received later.
    pub(crate) fn map_consumer(&mut self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let rights = match self.role {
            Role::Producer => ProtFlags::READ,
            Role::Consumer => ProtFlags::READ | ProtFlags::WRITE,
        };
        self.put(2 * self.page_bytes, self.page_bytes, rights, (file, 0))
    }

    /// Maps one piece at its offset.
    fn put(
        &self,
        place: usize,
        len_bytes: usize,
        rights: ProtFlags,
        (file, offset): (BorrowedFd<'_>, u64),
    ) -> Result<(), Errno> {
        assert!(place + len_bytes <= self.region.len_bytes);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the piece lies inside the region that this value owns, and replaces reserved addresses that
        // were not used yet. Not inherited: a forked child would be a second producer or consumer.
        unsafe {
            let at = self.region.base.as_ptr().add(place).cast();
            mmap(at, len_bytes, rights, flags, file, offset)?;
            madvise(at, len_bytes, Advice::LinuxDontFork)
        }
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// The bytes of data.
    #[inline]
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// A word of the control page.
    #[inline]
    pub(crate) fn control(&self, index: usize) -> &SharedWord {
        self.region.control(index)
    }

    /// Fills in the control page of a new ring, before another process has it.
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

    /// The index page that this end writes.
    #[inline]
    pub(crate) fn own(&self) -> &IndexPage<SharedWord> {
        // SAFETY: the page is mapped as long as `self` lives, is aligned, and its words are accessed by atomic
        // operations only.
        unsafe { self.own.as_ref() }
    }

    /// The index page that the peer writes.
    #[inline]
    pub(crate) fn peer(&self) -> &IndexPage<SharedWord> {
        // SAFETY: as for `own`.
        unsafe { self.peer.as_ref() }
    }

    /// Announces that this end closes, before a [`crate::ring::Ring`] was made of the memory.
    pub(crate) fn abandon(&self) {
        self.own().closed.store(1, Ordering::Release);
    }

    /// The address of the data at a position.
    ///
    /// # Panics
    /// `len_bytes` is more than the size.
    #[inline]
    fn at(&self, position: u32, len_bytes: usize) -> NonNull<u8> {
        assert!(len_bytes <= self.size as usize, "longer than the ring");
        let offset = (position & (self.size - 1)) as usize;
        // SAFETY: less than `size` into the first of two mappings of `size` bytes.
        unsafe { self.data.add(offset) }
    }

    /// Data to read.
    #[inline]
    pub(crate) fn bytes(&self, position: u32, len_bytes: usize) -> Bytes<'_> {
        let start = self.at(position, len_bytes);
        // SAFETY: `len_bytes` from there are mapped as long as `self` lives. This process writes data by `Space`.
        unsafe { Bytes::new(start, len_bytes) }
    }

    /// Data to write.
    ///
    /// # Panics
    /// This is the consumer.
    #[inline]
    pub(crate) fn space(&mut self, position: u32, len_bytes: usize) -> Space<'_> {
        assert!(
            self.role == Role::Producer,
            "a consumer maps the data read-only"
        );
        let start = self.at(position, len_bytes);
        // SAFETY: `len_bytes` from there are mapped for the producer to write as long as `self` lives. This
        // process accesses data by `Bytes` and `Space`, and a reader in this process only what was committed.
        unsafe { Space::new(start, len_bytes, self.exclusive) }
    }
}

fn to_word(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
