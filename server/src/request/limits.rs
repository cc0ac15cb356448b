//! What a disk is and takes, and which ranges of it a request may name.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::op::Op;
use super::outcome::IoError;

/// Bytes in the sector that ublk and virtio-blk count in, whatever the block size of the disk.
pub const SECTOR_BYTES: u64 = 512;

/// log2 of [`SECTOR_BYTES`].
pub const SECTOR_SHIFT: u32 = 9;

/// The largest disk: a position in a file has 63 bits, and a disk ends with a whole block of any size.
pub const MAX_DISK_BYTES: u64 = (1 << 63) - 4096;

/// A range of the disk that [`Limits::check`] has checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    offset_bytes: u64,
    len_bytes: u64,
}

impl Range {
    /// First byte.
    #[must_use]
    #[inline]
    pub fn offset_bytes(self) -> u64 {
        self.offset_bytes
    }

    /// Length.
    #[must_use]
    #[inline]
    pub fn len_bytes(self) -> u64 {
        self.len_bytes
    }

    /// A range that nothing has checked.
    #[cfg(test)]
    pub(crate) fn new(offset_bytes: u64, len_bytes: u64) -> Self {
        Self {
            offset_bytes,
            len_bytes,
        }
    }

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
    /// Largest discard that clients are told of; 0 when discard is not offered. Longer ones are done all the same:
    /// clients are known that do not heed the limit.
    pub max_discard_bytes: u64,
    /// The same for write-zeroes.
    pub max_write_zeroes_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The disk has a volatile write cache: completed writes need a flush to be durable.
    pub write_cache: bool,
    /// What the disk calls itself (ASCII, at most [`SERIAL_BYTES`]).
    pub serial: Serial,
}

impl Limits {
    /// The operation of a write-zeroes. A disk that takes no discards keeps its space allocated.
    #[must_use]
    pub fn write_zeroes(&self, unmap: bool, fua: bool) -> Op {
        let unmap = unmap && self.max_discard_bytes != 0;
        Op::WriteZeroes { unmap, fua }
    }

    /// Checks a range of `sectors` 512-byte sectors from `first_sector` against the disk.
    ///
    /// # Errors
    ///
    /// `ReadOnly` for a write to a read-only disk, `Unsupported` for an operation that is not
    /// offered, `Io` for a range outside the disk or off the block size.
    // On the way of each request, where a call would have to save what the parser keeps in registers.
    #[inline(always)]
    pub fn check(&self, op: Op, first_sector: u64, sectors: u64) -> Result<Range, IoError> {
        if op.is_write() && self.read_only {
            return Err(IoError::ReadOnly);
        }
        let is_offered = match op {
            Op::Flush => return Ok(Range::EMPTY),
            Op::Read | Op::Write { .. } => true,
            Op::Discard => self.max_discard_bytes != 0,
            Op::WriteZeroes { .. } => self.max_write_zeroes_bytes != 0,
        };
        if !is_offered {
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
        if (range.offset_bytes | range.len_bytes) & block_mask != 0 {
            return Err(IoError::Io);
        }
        Ok(range)
    }
}

/// The serial number of a disk; by default none.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
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

/// Limits of an ordinary small disk, for tests.
#[cfg(any(test, feature = "testing"))]
#[must_use]
pub fn small_disk(capacity_bytes: u64) -> Limits {
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
        serial: Serial::new("test").expect("it is short"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn ranges_of_the_largest_disk_are_checked_to_its_end() {
        let disk = small_disk(MAX_DISK_BYTES);
        let total = MAX_DISK_BYTES / SECTOR_BYTES;
        let last = disk.check(Op::Read, total - 8, 8).unwrap();
        assert_eq!(last.offset_bytes() + last.len_bytes(), MAX_DISK_BYTES);
        assert_eq!(disk.check(Op::Read, total - 8, 9), Err(IoError::Io));
        assert_eq!(
            disk.check(Op::Discard, 0, total).unwrap().len_bytes(),
            MAX_DISK_BYTES
        );
        // What the kernel takes as a position and as a position behind the last byte.
        assert!(i64::try_from(MAX_DISK_BYTES).is_ok());
    }

    #[test]
    fn without_discards_zeroes_keep_their_space() {
        let mut disk = small_disk(1 << 20);
        let unmaps = |disk: &Limits| disk.write_zeroes(true, true);
        assert_eq!(
            unmaps(&disk),
            Op::WriteZeroes {
                unmap: true,
                fua: true
            }
        );
        disk.max_discard_bytes = 0;
        assert_eq!(
            unmaps(&disk),
            Op::WriteZeroes {
                unmap: false,
                fua: true
            }
        );
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
    fn ranges_longer_than_advertised_are_granted_as_far_as_the_disk_reaches() {
        let mut disk = small_disk(1 << 20);
        (disk.max_discard_bytes, disk.max_write_zeroes_bytes) = (4096, 4096);
        let zeroes = Op::WriteZeroes {
            unmap: true,
            fua: false,
        };
        for op in [Op::Discard, zeroes] {
            let whole = disk.check(op, 0, 2048).map(Range::len_bytes);
            assert_eq!(whole, Ok(1 << 20));
            assert_eq!(disk.check(op, 0, 2049), Err(IoError::Io));
        }
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
