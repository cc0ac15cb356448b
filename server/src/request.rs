//! The words both doors and every backend share.
//!
//! A door parses what arrived on its wire **once** into a [`Request`]; from then on everything is
//! valid: the range lies inside the disk, the buffers are as long as the range, a read-only disk
//! gets no writes. A backend answers with [`Progress`] and, in the end, exactly one [`Outcome`].

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in the sector that ublk and virtio-blk count in, whatever the block size of the disk.
pub const SECTOR_BYTES: u64 = 512;

/// log2 of [`SECTOR_BYTES`].
pub const SECTOR_SHIFT: u32 = 9;

/// The largest disk: what ext4 files and 32-bit page indexes of older tools still reach.
pub const MAX_DISK_BYTES: u64 = 16 << 40;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffers from the disk.
    Read,
    /// Write the buffers to the disk. With `fua` the data is durable before the request completes.
    Write {
        /// Force unit access: durable at completion.
        fua: bool,
    },
    /// Make every write that completed before this request was started durable.
    Flush,
    /// The content of the range is no longer of interest.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// The backend may release the storage behind the range.
        unmap: bool,
        /// Force unit access: durable at completion.
        fua: bool,
    },
}

impl Op {
    /// Whether the operation changes what the disk holds.
    #[must_use]
    pub fn is_write(self) -> bool {
        match self {
            Self::Read | Self::Flush => false,
            Self::Write { .. } | Self::Discard | Self::WriteZeroes { .. } => true,
        }
    }

    /// Whether the request carries data buffers.
    #[must_use]
    pub fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. })
    }
}

/// Why a request failed. Closed and small: each door maps it to its wire once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The storage failed, or the request was malformed (out of range, unaligned, unmapped).
    #[error("input/output error")]
    Io,
    /// The operation, or a flag of it, is not offered.
    #[error("not supported")]
    Unsupported,
    /// A write to a read-only disk.
    #[error("read-only disk")]
    ReadOnly,
    /// The storage has no room left.
    #[error("no space left")]
    NoSpace,
    /// A write through a door that may not write now: a client of another has the disk.
    #[error("another client has the disk")]
    Conflict,
}

impl IoError {
    /// The errno that a kernel interface uses for this error (positive).
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::Io => libc::EIO,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::ReadOnly => libc::EPERM,
            Self::NoSpace => libc::ENOSPC,
            // What the block layer calls a reservation conflict.
            Self::Conflict => libc::EBADE,
        }
    }

    /// The error for a (positive) errno that the storage answered with.
    #[must_use]
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT => Self::NoSpace,
            libc::EOPNOTSUPP => Self::Unsupported,
            libc::EROFS => Self::ReadOnly,
            _ => Self::Io,
        }
    }
}

/// How a request ended. Success always means the whole request: backends resume short transfers.
pub type Outcome = Result<(), IoError>;

/// What a backend says after it was given a request or a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// The request ended.
    Done(Outcome),
    /// Work is under way on the thread's ring; a completion will follow.
    Pending,
    /// No room right now; give the same request again after the next reap. Never an error.
    Full,
}

/// Memory that a request reads into or writes from, as the kernel's `struct iovec`.
pub type Buffer = libc::iovec;

/// The buffers of one request: borrowed from the slot of the door that made the request, or
/// registered with its thread's ring.
///
/// The door guarantees that the list and the memory it names stay valid and mapped until the
/// request is finished. The backend may move them forward (short transfers).
#[derive(Debug)]
pub struct Buffers(Place);

#[derive(Debug)]
enum Place {
    /// The entries before `next` are behind us, and as the door made them.
    Memory {
        list: *mut Buffer,
        next: u32,
        count: u32,
    },
    Ring(RingBuffer),
}

/// Data that only the kernel can reach: what is left of a buffer in the ring's table, for
/// `IORING_OP_READ_FIXED` and `WRITE_FIXED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingBuffer {
    /// Its index in the table.
    pub index: u16,
    /// Where the rest begins.
    pub offset_bytes: usize,
    /// How long the rest is.
    pub len_bytes: usize,
}

impl Buffers {
    /// No buffers (flush, discard, write-zeroes).
    pub const NONE: Self = Self(Place::Memory {
        list: std::ptr::null_mut(),
        next: 0,
        count: 0,
    });

    /// Borrows `list` for the life of a request.
    ///
    /// # Safety
    ///
    /// `list` and the memory that its entries name must stay valid, and `list` must not be touched
    /// by anyone else, until the [`Request`] that holds the result is finished.
    pub unsafe fn from_list(list: &mut [Buffer]) -> Self {
        Self(Place::Memory {
            list: list.as_mut_ptr(),
            next: 0,
            // Doors have some hundred entries at most.
            count: u32::try_from(list.len()).unwrap_or(u32::MAX),
        })
    }

    /// The first `len_bytes` of a buffer in the ring's table. Only for backends that take such
    /// (`Backend::ring_buffers`).
    #[must_use]
    pub fn in_ring(index: u16, len_bytes: usize) -> Self {
        Self(Place::Ring(RingBuffer {
            index,
            offset_bytes: 0,
            len_bytes,
        }))
    }

    /// The buffer in the ring's table, if the data is there.
    #[must_use]
    pub fn ring(&self) -> Option<RingBuffer> {
        match self.0 {
            Place::Memory { .. } => None,
            Place::Ring(buffer) => Some(buffer),
        }
    }

    /// The buffers still to be transferred, if they are in memory.
    #[must_use]
    pub fn list(&self) -> &[Buffer] {
        match self.0 {
            Place::Memory { list, next, count } if count > next => {
                // SAFETY: `from_list` requires the list to outlive the request, which owns `self`;
                // nobody else writes to it meanwhile.
                unsafe {
                    std::slice::from_raw_parts(list.add(next as usize), (count - next) as usize)
                }
            }
            _ => &[],
        }
    }

    /// Bytes still to be transferred.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        match &self.0 {
            Place::Memory { .. } => self.list().iter().map(|b| b.iov_len as u64).sum(),
            Place::Ring(buffer) => buffer.len_bytes as u64,
        }
    }

    /// Moves the list forward past `more_bytes` transferred bytes, after `before_bytes`.
    fn advance(&mut self, more_bytes: usize, before_bytes: u64) {
        if let Place::Ring(buffer) = &mut self.0 {
            assert!(
                more_bytes <= buffer.len_bytes,
                "more bytes transferred than asked for"
            );
            buffer.offset_bytes += more_bytes;
            buffer.len_bytes -= more_bytes;
            return;
        }
        let mut done_bytes = self.complete_entry(before_bytes) + more_bytes;
        let Place::Memory { list, next, count } = &mut self.0 else {
            return;
        };
        while *next < *count && done_bytes > 0 {
            // SAFETY: `list` points at the `count` valid entries of the list (`from_list`), which
            // this request alone may write.
            let head = unsafe { &mut *list.add(*next as usize) };
            if done_bytes < head.iov_len {
                head.iov_base = head.iov_base.wrapping_byte_add(done_bytes);
                head.iov_len -= done_bytes;
                return;
            }
            done_bytes -= head.iov_len;
            *next += 1;
        }
        assert!(done_bytes == 0, "more bytes transferred than asked for");
    }

    /// Gives the entry that the first `done_bytes` end in back what they cut off its beginning; how
    /// much that was.
    fn complete_entry(&mut self, done_bytes: u64) -> usize {
        let Place::Memory { list, next, count } = self.0 else {
            return 0;
        };
        if done_bytes == 0 || next >= count {
            return 0;
        }
        // SAFETY: as for `advance`.
        let list = unsafe { std::slice::from_raw_parts_mut(list, count as usize) };
        let (behind, rest) = list.split_at_mut(next as usize);
        let behind: u64 = behind.iter().map(|entry| entry.iov_len as u64).sum();
        // No truncation: it is less than the length of an entry.
        let cut = usize::try_from(done_bytes - behind).unwrap_or(0);
        rest[0].iov_base = rest[0].iov_base.wrapping_byte_sub(cut);
        rest[0].iov_len += cut;
        cut
    }
}

/// One request, valid from here on. It is finished exactly once, by value.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// First byte of the range on the disk.
    pub offset_bytes: u64,
    /// Length of the range; equals the length of the buffers where the operation has data.
    pub len_bytes: u64,
    /// Where the rest of the data goes to or comes from.
    pub buffers: Buffers,
    /// How much of the range is behind us.
    done_bytes: u64,
    armed: Armed,
}

impl Request {
    /// A request for `range`. See [`Limits::check`] for how to get one.
    #[must_use]
    pub fn new(op: Op, range: Range, buffers: Buffers) -> Self {
        debug_assert!(!op.has_data() || buffers.len_bytes() == range.len_bytes);
        Self {
            op,
            offset_bytes: range.offset_bytes,
            len_bytes: range.len_bytes,
            buffers,
            done_bytes: 0,
            armed: Armed,
        }
    }

    /// Where the rest of the request begins on the disk.
    #[must_use]
    pub fn position_bytes(&self) -> u64 {
        self.offset_bytes + self.done_bytes
    }

    /// How much is left of it.
    #[must_use]
    pub fn remaining_bytes(&self) -> u64 {
        self.len_bytes - self.done_bytes
    }

    /// Puts `moved_bytes` of the range, and of the buffers if there are any, behind us.
    ///
    /// # Panics
    ///
    /// When that is more than is left.
    pub fn advance(&mut self, moved_bytes: u64) {
        assert!(
            moved_bytes <= self.remaining_bytes(),
            "more moved than asked for"
        );
        self.done_bytes += moved_bytes;
        if self.op.has_data() {
            // No truncation: it is no more than the buffers' length, which is a usize.
            let more_bytes = usize::try_from(moved_bytes).unwrap_or(usize::MAX);
            self.buffers
                .advance(more_bytes, self.done_bytes - moved_bytes);
        }
    }

    /// Fills what is left of a read into memory with zeroes, which ends it.
    pub fn zero_fill(&mut self) {
        for buffer in self.buffers.list() {
            // SAFETY: the door keeps the memory mapped and writable until the request is finished
            // (`from_list`); a client that races with us only hurts its own data.
            unsafe { std::ptr::write_bytes(buffer.iov_base.cast::<u8>(), 0, buffer.iov_len) };
        }
        self.advance(self.remaining_bytes());
    }

    /// All buffers in memory as the door made them, for a request that has ended: what of them was
    /// transferred does not matter any more.
    pub fn whole_list(&mut self) -> &[Buffer] {
        self.buffers.complete_entry(self.done_bytes);
        match self.buffers.0 {
            Place::Memory { list, count, .. } if count > 0 => {
                // SAFETY: as for `Buffers::list`.
                unsafe { std::slice::from_raw_parts(list, count as usize) }
            }
            _ => &[],
        }
    }

    /// Ends the request. The door that made it calls this when it has answered its client.
    pub fn finish(self) {
        let Self { armed, .. } = self;
        std::mem::forget(armed);
    }
}

/// Panics in debug builds when a request is dropped without having been finished.
#[derive(Debug)]
struct Armed;

impl Drop for Armed {
    fn drop(&mut self) {
        if cfg!(debug_assertions) && !std::thread::panicking() {
            panic!("a request was dropped without an outcome");
        }
    }
}

/// A checked range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset_bytes: u64,
    /// Length.
    pub len_bytes: u64,
}

impl Range {
    /// The range of a request that names none (flush).
    pub const EMPTY: Self = Self {
        offset_bytes: 0,
        len_bytes: 0,
    };
}

/// Bytes in the identification string of virtio-blk (virtio 1.3, 5.2.6: `VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_BYTES: usize = 20;

/// The size of a disk. It is the one thing about a disk that may change: all copies do.
#[derive(Clone, Debug)]
pub struct Capacity(Arc<AtomicU64>);

impl Capacity {
    /// In bytes, as it is now.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// From now on it is this, for everybody.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }
}

impl From<u64> for Capacity {
    fn from(bytes: u64) -> Self {
        Self(Arc::new(bytes.into()))
    }
}

impl PartialEq for Capacity {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Capacity {}

/// What a disk is and what it takes. Both doors advertise exactly this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk; a multiple of `block_bytes`.
    pub capacity: Capacity,
    /// Logical block: requests are multiples of it in position and length. A power of two, 512 at
    /// least and 4096 at most.
    pub block_bytes: u32,
    /// Physical block: what the storage writes without reading first. A power of two.
    pub physical_block_bytes: u32,
    /// Preferred request size, 0 if there is none.
    pub optimal_io_bytes: u32,
    /// Largest read or write.
    pub max_io_bytes: u32,
    /// Granularity of discards.
    pub discard_granularity_bytes: u32,
    /// Largest discard; 0 when discard is not offered.
    pub max_discard_bytes: u64,
    /// Largest write-zeroes; 0 when it is not offered.
    pub max_write_zeroes_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The disk has a volatile write cache: completed writes need a flush to be durable.
    pub write_cache: bool,
    /// What the disk calls itself (ASCII, at most [`SERIAL_BYTES`]).
    pub serial: Serial,
}

impl Limits {
    /// Checks a range of `sectors` 512-byte sectors from `first_sector` against the disk.
    ///
    /// # Errors
    ///
    /// `ReadOnly` for a write to a read-only disk, `Unsupported` for an operation that is not
    /// offered, `Io` for a range outside the disk, off the block size, or longer than allowed.
    pub fn check(&self, op: Op, first_sector: u64, sectors: u64) -> Result<Range, IoError> {
        if op.is_write() && self.read_only {
            return Err(IoError::ReadOnly);
        }
        let max_bytes = match op {
            Op::Flush => return Ok(Range::EMPTY),
            // Doors that carry data in buffers bound a transfer by their own segment limits.
            Op::Read | Op::Write { .. } => u64::MAX,
            Op::Discard => self.max_discard_bytes,
            Op::WriteZeroes { .. } => self.max_write_zeroes_bytes,
        };
        if max_bytes == 0 {
            return Err(IoError::Unsupported);
        }
        let total = self.capacity.bytes() >> SECTOR_SHIFT;
        if first_sector > total || sectors > total - first_sector {
            return Err(IoError::Io);
        }
        // No overflow: both are at most `total`, which is a byte count shifted down.
        let range = Range {
            offset_bytes: first_sector << SECTOR_SHIFT,
            len_bytes: sectors << SECTOR_SHIFT,
        };
        let block_mask = u64::from(self.block_bytes) - 1;
        if (range.offset_bytes | range.len_bytes) & block_mask != 0 || range.len_bytes > max_bytes {
            return Err(IoError::Io);
        }
        Ok(range)
    }
}

/// The serial number of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Serial([u8; SERIAL_BYTES]);

/// Why a string cannot be a serial number.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a serial is 1 to {SERIAL_BYTES} printable ASCII characters without spaces")]
pub struct BadSerial;

impl Serial {
    /// A serial from user input.
    ///
    /// # Errors
    ///
    /// [`BadSerial`] when it is empty, too long or not printable ASCII.
    pub fn new(text: &str) -> Result<Self, BadSerial> {
        let text = text.as_bytes();
        if text.is_empty() || text.len() > SERIAL_BYTES || !text.iter().all(u8::is_ascii_graphic) {
            return Err(BadSerial);
        }
        let mut bytes = [0; SERIAL_BYTES];
        bytes[..text.len()].copy_from_slice(text);
        Ok(Self(bytes))
    }

    /// As virtio-blk sends it: padded with NUL, not terminated when all 20 bytes are used.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; SERIAL_BYTES] {
        &self.0
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(SERIAL_BYTES);
        std::str::from_utf8(&self.0[..end]).unwrap_or_default()
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Limits of an ordinary small disk, for tests all over the crate.
    pub(crate) fn small_disk(capacity_bytes: u64) -> Limits {
        Limits {
            capacity: capacity_bytes.into(),
            block_bytes: 512,
            physical_block_bytes: 4096,
            optimal_io_bytes: 0,
            max_io_bytes: 1 << 20,
            discard_granularity_bytes: 4096,
            max_discard_bytes: 1 << 30,
            max_write_zeroes_bytes: 1 << 30,
            read_only: false,
            write_cache: true,
            serial: Serial::new("test").unwrap(),
        }
    }

    #[test]
    fn ranges_are_checked_without_wrapping() {
        let disk = small_disk(1 << 20);
        let total = disk.capacity.bytes() / SECTOR_BYTES;
        let cases = [
            (0, 0, true),
            (0, total, true),
            (total, 0, true),
            (total - 1, 1, true),
            (total, 1, false),
            (total - 1, 2, false),
            (total + 1, 0, false),
            (u64::MAX, 1, false),
            (1, u64::MAX, false),
            (u64::MAX, u64::MAX, false),
            (1 << 55, 1 << 55, false),
        ];
        for (first, count, ok) in cases {
            let got = disk.check(Op::Read, first, count);
            assert_eq!(got.is_ok(), ok, "{first}+{count}: {got:?}");
            if !ok {
                assert_eq!(got, Err(IoError::Io));
            }
        }
    }

    #[test]
    fn requests_off_the_block_size_are_refused() {
        let mut disk = small_disk(1 << 20);
        disk.block_bytes = 4096;
        let write = Op::Write { fua: false };
        assert!(disk.check(write, 8, 8).is_ok());
        assert_eq!(disk.check(write, 1, 8), Err(IoError::Io));
        assert_eq!(disk.check(write, 8, 1), Err(IoError::Io));
    }

    #[test]
    fn what_is_not_offered_is_unsupported_and_read_only_comes_first() {
        let mut disk = small_disk(1 << 20);
        disk.max_discard_bytes = 0;
        assert_eq!(disk.check(Op::Discard, 0, 8), Err(IoError::Unsupported));
        disk.read_only = true;
        assert_eq!(disk.check(Op::Discard, 0, 8), Err(IoError::ReadOnly));
        assert!(disk.check(Op::Flush, u64::MAX, 0).is_ok());
    }

    #[test]
    fn discards_longer_than_advertised_are_refused() {
        let mut disk = small_disk(1 << 20);
        disk.max_discard_bytes = 4096;
        assert!(disk.check(Op::Discard, 0, 8).is_ok());
        assert_eq!(disk.check(Op::Discard, 0, 16), Err(IoError::Io));
    }

    #[test]
    fn buffers_advance_across_entries() {
        let mut bytes = [1u8; 12];
        let base = bytes.as_mut_ptr();
        let entry = |at: usize, len| Buffer {
            iov_base: base.wrapping_add(at).cast(),
            iov_len: len,
        };
        let mut list = [entry(0, 4), entry(4, 0), entry(4, 8)];
        // SAFETY: `list` and `bytes` live to the end of this test and are not touched otherwise.
        let buffers = unsafe { Buffers::from_list(&mut list) };
        let range = Range {
            offset_bytes: 512,
            len_bytes: 12,
        };
        let mut request = Request::new(Op::Read, range, buffers);
        assert_eq!(request.buffers.len_bytes(), 12);
        for (moved, left) in [(3, 9), (0, 9), (2, 7), (1, 6)] {
            request.advance(moved);
            assert_eq!(request.buffers.len_bytes(), left);
            let first = request
                .buffers
                .list()
                .iter()
                .find(|entry| entry.iov_len > 0);
            let at = base.wrapping_add(12 - usize::try_from(left).unwrap());
            assert_eq!(first.map(|entry| entry.iov_base), Some(at.cast()));
        }
        request.zero_fill();
        assert_eq!(request.buffers.len_bytes(), 0);
        request.finish();
        assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn the_buffers_of_a_request_that_ended_anywhere_are_found_whole() {
        let mut bytes = [0u8; 12];
        let base = bytes.as_mut_ptr();
        let entry = |at: usize, len| Buffer {
            iov_base: base.wrapping_add(at).cast(),
            iov_len: len,
        };
        let made = [entry(0, 5), entry(5, 1), entry(6, 6)];
        let range = Range {
            offset_bytes: 0,
            len_bytes: 12,
        };
        for steps in [&[][..], &[12], &[3], &[3, 1], &[4, 4, 2], &[5, 1], &[1, 11]] {
            let mut list = made;
            // SAFETY: as above.
            let buffers = unsafe { Buffers::from_list(&mut list) };
            let mut request = Request::new(Op::Read, range, buffers);
            for step in steps {
                request.advance(*step);
            }
            let whole = |list: &[Buffer]| -> Vec<_> {
                let parts = list.iter().map(|entry| (entry.iov_base, entry.iov_len));
                parts.collect()
            };
            assert_eq!(whole(request.whole_list()), whole(&made), "{steps:?}");
            request.finish();
        }
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "without an outcome")]
    fn dropping_an_unfinished_request_panics_in_debug_builds() {
        drop(Request::new(Op::Flush, Range::EMPTY, Buffers::NONE));
    }

    #[test]
    fn serials_are_checked() {
        assert_eq!(Serial::new("disk-1").unwrap().as_str(), "disk-1");
        let long = "x".repeat(SERIAL_BYTES);
        assert_eq!(Serial::new(&long).unwrap().as_str(), long);
        for bad in ["", "a b", "ä", &"x".repeat(SERIAL_BYTES + 1)] {
            assert_eq!(Serial::new(bad), Err(BadSerial));
        }
    }
}
