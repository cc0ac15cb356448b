//! The log of dirty pages: which guest memory the server wrote (vhost-user, "Migration").
//!
//! The client shares a bitmap, one bit for each 4 KiB of guest addresses, looks at it now and then,
//! and takes out the bits that are set. A bit is set after its page was written: the other way round
//! the client could take it out, and copy the page, before the data is there.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserLog;

use super::memory::{MemoryMap, Region, RegionAddress};
use super::shared::Shared;
use crate::request::Buffer;

/// `VHOST_LOG_PAGE`, whatever the pages of the machine are.
const PAGE_SHIFT: u32 = 12;

/// The bitmap that a client shares.
#[derive(Debug)]
pub(super) struct DirtyLog {
    bitmap: Shared,
}

impl DirtyLog {
    /// Maps the bitmap.
    ///
    /// # Errors
    ///
    /// When the file is shorter than it should be or cannot be mapped for writing.
    pub(super) fn map(told: &VhostUserLog, file: &File) -> io::Result<Self> {
        let address = RegionAddress {
            guest: 0,
            len_bytes: told.mmap_size,
            user: 0,
        };
        let region = Region::map(address, file, told.mmap_offset)?;
        Ok(Self {
            bitmap: region.memory().clone(),
        })
    }

    /// Pages that there is a bit for.
    fn pages(&self) -> u64 {
        8 * self.bitmap.len_bytes() as u64
    }

    /// Whether there is a bit for each page of a range.
    pub(super) fn covers(&self, guest: u64, len_bytes: u64) -> bool {
        let last = guest.checked_add(len_bytes.saturating_sub(1));
        last.is_some_and(|last| last >> PAGE_SHIFT < self.pages())
    }

    /// Marks the pages of a range that was written. What lies outside is left out: the session
    /// checks that the log [covers](Self::covers) the memory before it switches it on.
    pub(super) fn mark(&self, guest: u64, len_bytes: u64) {
        if len_bytes == 0 {
            return;
        }
        // A range in memory that was taken away meanwhile may begin inside and end outside.
        let last = guest.saturating_add(len_bytes - 1) >> PAGE_SHIFT;
        let (mut page, last) = (guest >> PAGE_SHIFT, last.min(self.pages() - 1));
        while page <= last {
            let (from, to) = (page & 7, (last - (page & !7)).min(7));
            // Bits `from` to `to`.
            let bits = (0xff << from) & (0xff >> (7 - to));
            // After the data, also for a client on another processor that takes the bit out. No truncation: the
            // byte lies in the bitmap, which is mapped.
            self.bitmap.set_bits((page >> 3) as usize, bits);
            page = (page | 7) + 1;
        }
    }

    /// Marks memory that lies in `map`, by its address here.
    fn mark_memory(&self, map: &MemoryMap, at: *const u8, len_bytes: usize) {
        map.guest_ranges(at, len_bytes, |guest, len_bytes| {
            self.mark(guest, len_bytes);
        });
    }

    /// Whether the client took the bitmap away.
    pub(super) fn is_poisoned(&self) -> bool {
        self.bitmap.is_poisoned()
    }
}

/// What is to be marked, and where.
#[derive(Clone, Debug)]
pub(super) struct Logging {
    pub log: Arc<DirtyLog>,
    /// Whether requests mark what they write (`VHOST_F_LOG_ALL`). Used rings have a flag of their own.
    pub requests: bool,
}

impl Logging {
    /// Marks what a request wrote, if requests are to be marked: buffers and status, which lie in `map`.
    #[cold]
    pub(super) fn mark_request(
        &self,
        map: &MemoryMap,
        written: &[Buffer],
        status: Option<NonNull<u8>>,
    ) {
        if !self.requests {
            return;
        }
        for buffer in written {
            self.log
                .mark_memory(map, buffer.iov_base.cast(), buffer.iov_len);
        }
        if let Some(status) = status {
            self.log.mark_memory(map, status.as_ptr(), 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::memfd;
    use super::*;
    use std::os::unix::fs::FileExt;

    fn log(len_bytes: u64, offset: u64) -> (DirtyLog, File) {
        let file = memfd(0x4000);
        let log = DirtyLog::map(&VhostUserLog::new(len_bytes, offset), &file).unwrap();
        (log, file)
    }

    /// The pages that are marked.
    fn marked(file: &File, offset: u64, len: usize) -> Vec<usize> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset).unwrap();
        (0..8 * len)
            .filter(|page| bytes[page / 8] & (1 << (page % 8)) != 0)
            .collect()
    }

    #[test]
    fn exactly_the_pages_of_a_range_are_marked() {
        for (first, last) in [
            (0, 0),
            (7, 7),
            (7, 8),
            (3, 5),
            (0, 63),
            (9, 40),
            (16, 23),
            (127, 127),
        ] {
            let (log, file) = log(16, 0x1008);
            let (start, end) = ((first << 12) + 0xfff, (last << 12) + 1);
            let len = if first == last { 1 } else { end - start };
            log.mark(start, len);
            let (first, last) = (
                usize::try_from(first).unwrap(),
                usize::try_from(last).unwrap(),
            );
            assert_eq!(marked(&file, 0x1008, 16), Vec::from_iter(first..=last));
            assert_eq!(marked(&file, 0x1000, 8), [0; 0], "before the bitmap");
        }
    }

    #[test]
    fn what_is_outside_the_bitmap_is_left_alone() {
        let (log, file) = log(16, 0);
        for (guest, len) in [(128 << 12, 1), (u64::MAX, 1), (u64::MAX, u64::MAX), (0, 0)] {
            assert!(len == 0 || !log.covers(guest, len), "{guest:#x}+{len:#x}");
            log.mark(guest, len);
        }
        assert!(log.covers(0, 128 << 12));
        assert_eq!(marked(&file, 0, 0x1000), [0; 0]);
    }

    #[test]
    fn of_what_is_partly_outside_the_bitmap_the_part_inside_is_marked() {
        for (guest, len, first) in [
            ((128 << 12) - 1, 2, 127),
            (100 << 12, 0x10_0000, 100),
            (126 << 12, u64::MAX, 126),
            (0, u64::MAX, 0),
        ] {
            let (log, file) = log(16, 0);
            assert!(!log.covers(guest, len), "{guest:#x}+{len:#x}");
            log.mark(guest, len);
            assert_eq!(marked(&file, 0, 0x1000), Vec::from_iter(first..128));
        }
    }

    #[test]
    fn bits_that_were_set_stay() {
        let (log, file) = log(16, 0);
        for page in [3, 1, 3] {
            log.mark(page << 12, 1);
        }
        assert_eq!(marked(&file, 0, 16), [1, 3]);
    }

    #[test]
    fn bitmaps_that_are_not_there_are_refused() {
        let file = memfd(0x2000);
        let map = |size, offset| DirtyLog::map(&VhostUserLog::new(size, offset), &file).is_ok();
        assert!(map(0x2000, 0) && map(0x1000, 0x1000) && map(1, 0x1fff));
        for (size, offset) in [
            (0x2001, 0),
            (0x1000, 0x1001),
            (0, 0),
            (u64::MAX, 1),
            (1, 0x2000),
        ] {
            assert!(!map(size, offset), "{size:#x} at {offset:#x}");
        }
        let pipe = File::from(rustix::pipe::pipe().unwrap().0);
        assert!(DirtyLog::map(&VhostUserLog::new(0x1000, 0), &pipe).is_err());
        let readable = File::open("/proc/self/exe").unwrap();
        assert!(DirtyLog::map(&VhostUserLog::new(0x1000, 0), &readable).is_err());
    }
}
