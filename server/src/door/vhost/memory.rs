//! The client's memory, as it shared it: regions of files, mapped here.
//!
//! A [`MemoryMap`] never changes; a change makes a new one that shares the mappings of the regions
//! that stay. A user of a map keeps it alive, and with it the mappings.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{FileType, fstat, fstatfs};
use vm_memory::VolatileSlice;

use super::access;
use super::shared::Shared;
use crate::engine::{MappedFile, SharedMemory, Sharing};

/// `f_type` of hugetlbfs (`HUGETLBFS_MAGIC` in linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Memory regions one client may have (what QEMU uses at most is 509).
pub(super) const MAX_REGIONS: usize = 512;

/// Mappings of one client: those of its regions, and of regions that it took away and that requests under
/// way still use.
pub(super) const MAX_MAPPINGS: usize = 2 * MAX_REGIONS;

/// A region as the client describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionAddress {
    /// Where the guest sees it.
    pub guest: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Where the client itself has it mapped; ring addresses are given so.
    pub user: u64,
}

/// A region that is mapped here.
#[derive(Clone, Debug)]
pub(super) struct Region {
    address: RegionAddress,
    /// Where the storage hands it on. Before the memory: that is unmapped after it.
    shared: Option<Arc<SharedMemory>>,
    memory: Shared,
}

impl Region {
    /// Maps a region of `file`, which may be closed afterwards.
    ///
    /// # Errors
    ///
    /// When the file is shorter than the region, cannot be mapped for reading and writing, or the
    /// region wraps around an address space.
    pub(super) fn map(address: RegionAddress, file: &File, offset: u64) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let RegionAddress {
            guest,
            len_bytes,
            user,
        } = address;
        let end = offset.checked_add(len_bytes);
        let ends = [
            guest.checked_add(len_bytes),
            user.checked_add(len_bytes),
            end,
        ];
        if len_bytes == 0 || ends.contains(&None) {
            return Err(invalid("a memory region is empty or wraps around"));
        }
        let stat = fstat(file)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && end > u64::try_from(stat.st_size).ok()
        {
            return Err(invalid("a memory region is longer than its file"));
        }
        // Huge pages are mapped whole.
        let fs = fstatfs(file)?;
        let page_bytes = if fs.f_type == HUGETLBFS_MAGIC {
            u64::try_from(fs.f_bsize).unwrap_or(4096).max(4096)
        } else {
            rustix::param::page_size() as u64
        };
        let before = offset % page_bytes;
        let map_bytes = (before + len_bytes)
            .checked_next_multiple_of(page_bytes)
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or_else(|| invalid("a memory region is too long"))?;
        let mapping = Shared::map(file, offset - before, map_bytes)?;
        let memory = mapping
            .part(before, len_bytes)
            .ok_or_else(|| invalid("a memory region is too long"))?;
        Ok(Self {
            address,
            shared: None,
            memory,
        })
    }

    /// Shares it, the part of `file` from `offset`, with a storage that hands it on: before a request lies in it.
    pub(super) fn share(
        &mut self,
        sharing: &dyn Sharing,
        file: &File,
        offset: u64,
    ) -> io::Result<()> {
        let shared = sharing.share(MappedFile {
            file: file.as_fd(),
            offset_bytes: offset,
            address: self.memory.start().as_ptr().addr(),
            len_bytes: self.address.len_bytes,
        })?;
        self.shared = Some(Arc::new(shared));
        Ok(())
    }

    /// What the client said about it.
    pub(super) fn address(&self) -> RegionAddress {
        self.address
    }

    /// The memory.
    pub(super) fn memory(&self) -> &Shared {
        &self.memory
    }

    /// `len_bytes` from `offset` on, as far as they lie in the region.
    fn slice(&self, offset: u64, len_bytes: u64) -> Option<VolatileSlice<'_>> {
        let (offset, len_bytes) = (
            usize::try_from(offset).ok()?,
            usize::try_from(len_bytes).ok()?,
        );
        self.memory.slice().subslice(offset, len_bytes).ok()
    }
}

/// All regions of a client at one time, in the order of guest addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct MemoryMap {
    regions: Vec<Region>,
}

impl MemoryMap {
    /// A map of these regions.
    ///
    /// # Errors
    ///
    /// When two of them overlap in the guest's or the client's view, or there are too many.
    pub(super) fn new(mut regions: Vec<Region>) -> io::Result<Self> {
        if regions.len() > MAX_REGIONS {
            return Err(io::Error::other("too many memory regions"));
        }
        let overlap = |regions: &[Region], start: fn(&RegionAddress) -> u64| {
            regions.windows(2).any(|two| {
                start(&two[0].address) + two[0].address.len_bytes > start(&two[1].address)
            })
        };
        regions.sort_by_key(|region| region.address.user);
        let by_user = overlap(&regions, |address| address.user);
        regions.sort_by_key(|region| region.address.guest);
        if by_user || overlap(&regions, |address| address.guest) {
            return Err(io::Error::other("memory regions overlap"));
        }
        Ok(Self { regions })
    }

    /// The regions.
    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Whether the client took memory away that it had shared.
    pub(super) fn is_poisoned(&self) -> bool {
        self.regions
            .iter()
            .any(|region| region.memory.is_poisoned())
    }

    /// The region that holds a guest address.
    #[inline]
    fn region(&self, guest: u64) -> Option<(&Region, u64)> {
        let after = self
            .regions
            .partition_point(|region| region.address.guest <= guest);
        let region = &self.regions[after.checked_sub(1)?];
        let offset = guest - region.address.guest;
        (offset < region.address.len_bytes).then_some((region, offset))
    }

    /// Hands the parts of a guest range to `take`; several when it straddles regions.
    ///
    /// Returns `None`, perhaps after some parts, when one is not mapped or `take` returns it.
    #[cold]
    pub(super) fn parts(
        &self,
        mut guest: u64,
        mut len_bytes: u64,
        mut take: impl FnMut(VolatileSlice<'_>) -> Option<()>,
    ) -> Option<()> {
        while len_bytes > 0 {
            let (region, offset) = self.region(guest)?;
            let here = len_bytes.min(region.address.len_bytes - offset);
            take(region.slice(offset, here)?)?;
            len_bytes -= here;
            guest = guest.checked_add(here)?;
        }
        Some(())
    }

    /// Hands the guest ranges that are mapped from `at` on to `take`; memory that is not of this map is left
    /// out.
    pub(super) fn guest_ranges(
        &self,
        mut at: *const u8,
        mut len_bytes: usize,
        mut take: impl FnMut(u64, u64),
    ) {
        while len_bytes > 0 {
            let found = self.regions.iter().find_map(|region| {
                let offset = (at.addr()).checked_sub(region.memory.start().as_ptr().addr())? as u64;
                let left = region.address.len_bytes.checked_sub(offset)?;
                (left > 0).then_some((region.address.guest + offset, left))
            });
            let Some((guest, left)) = found else {
                return;
            };
            let here = usize::try_from(left).unwrap_or(len_bytes).min(len_bytes);
            take(guest, here as u64);
            at = at.wrapping_add(here);
            len_bytes -= here;
        }
    }

    /// The memory at a range of the client's own addresses, if it lies in one region.
    pub(super) fn user(&self, user: u64, len_bytes: u64) -> Option<Shared> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.address.user)?;
            region.memory.part(offset, len_bytes)
        })
    }
}

/// What a range of guest memory is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    /// Headers, status bytes, indirect tables: what the driver keeps by the queue.
    Control,
    /// What is read and written, which others often own.
    Data,
}

/// A map as one thread uses it: for each purpose it remembers the region where it found something
/// last, which is where it finds the next thing. Requests hold it by `Rc`, so that holding it costs no
/// atomic operation.
#[derive(Debug)]
pub(super) struct HeldMap {
    map: Arc<MemoryMap>,
    last: [Cell<Found>; 2],
}

/// A region in short. It stays where it is as long as the map.
#[derive(Clone, Copy, Debug)]
struct Found {
    guest: u64,
    len_bytes: u64,
    /// Mapped for `len_bytes`.
    start: NonNull<u8>,
}

impl Default for HeldMap {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}

impl HeldMap {
    pub(super) fn new(map: Arc<MemoryMap>) -> Self {
        let nothing = Found {
            guest: 0,
            len_bytes: 0,
            start: NonNull::dangling(),
        };
        Self {
            map,
            last: [Cell::new(nothing), Cell::new(nothing)],
        }
    }

    /// The map itself.
    pub(super) fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// A guest range, if it lies in one region.
    #[inline]
    pub(super) fn guest(
        &self,
        purpose: Purpose,
        guest: u64,
        len_bytes: u64,
    ) -> Option<VolatileSlice<'_>> {
        let last = &self.last[purpose as usize];
        if guest.wrapping_sub(last.get().guest) >= last.get().len_bytes {
            self.find(purpose, guest)?;
        }
        // Made in one place, remembered or found: so the compiler knows the slice's length.
        // SAFETY: `find` had the region from the map, which `self` keeps.
        unsafe { last.get().slice(guest, len_bytes) }
    }

    /// Finds the region of a guest address, and remembers it.
    #[cold]
    fn find(&self, purpose: Purpose, guest: u64) -> Option<()> {
        let (region, _) = self.map.region(guest)?;
        self.last[purpose as usize].set(Found {
            guest: region.address.guest,
            len_bytes: region.address.len_bytes,
            start: region.memory.start(),
        });
        Some(())
    }
}

impl Found {
    /// A range that begins in the region, if it lies in it.
    ///
    /// # Safety
    ///
    /// The region is mapped for as long as the slice lives.
    #[inline(always)]
    unsafe fn slice<'a>(&self, guest: u64, len_bytes: u64) -> Option<VolatileSlice<'a>> {
        let offset = guest.wrapping_sub(self.guest);
        if len_bytes > self.len_bytes - offset {
            return None;
        }
        access::point();
        // The region is mapped, so that every offset in it fits an address.
        #[expect(clippy::cast_possible_truncation)]
        let (offset, len_bytes) = (offset as usize, len_bytes as usize);
        // SAFETY: the range is inside of the region, as was just checked.
        Some(unsafe { VolatileSlice::new(self.start.add(offset).as_ptr(), len_bytes) })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::door::vhost::sigbus;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::sync::atomic::Ordering;

    /// A memory file of `len_bytes` zeroes.
    pub(crate) fn memfd(len_bytes: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, len_bytes).unwrap();
        file
    }

    fn region(guest: u64, len_bytes: u64, user: u64, file: &File, offset: u64) -> Region {
        let address = RegionAddress {
            guest,
            len_bytes,
            user,
        };
        Region::map(address, file, offset).unwrap()
    }

    #[test]
    fn addresses_are_translated_in_both_views_and_across_regions() {
        let file = memfd(0x4000);
        let low = region(0x1000, 0x2000, 0x10_0000, &file, 0);
        let high = region(0x3000, 0x1000, 0x80_0000, &file, 0x2800);
        let start = |region: &Region| region.memory.start().as_ptr();
        let (low_base, high_base) = (start(&low), start(&high));
        let map = MemoryMap::new(vec![high, low]).unwrap();
        let user = |user, len| map.user(user, len).map(|part| part.start().as_ptr());
        assert_eq!(user(0x80_0010, 8), Some(high_base.wrapping_add(0x10)));
        for (user, len) in [(0xf_ffff, 1), (0x10_0000, 0x2001), (0, 0), (u64::MAX, 1)] {
            assert!(map.user(user, len).is_none(), "{user:#x}+{len:#x}");
        }
        let held = HeldMap::new(Arc::new(map.clone()));
        let address = |slice: VolatileSlice<'_>| slice.ptr_guard_mut().as_ptr();
        let guest = |purpose, guest, len| held.guest(purpose, guest, len).map(address);
        for purpose in [Purpose::Control, Purpose::Data, Purpose::Control] {
            // Each from the region of the one before.
            assert_eq!(guest(purpose, 0x1000, 0x2000), Some(low_base));
            assert_eq!(guest(purpose, 0x1010, 8), Some(low_base.wrapping_add(0x10)));
            let high = high_base.wrapping_add(0xff8);
            assert_eq!(guest(purpose, 0x3ff8, 8), Some(high));
            for (address, len) in [
                (0x3ff8, 9),
                (0xfff, 1),
                (0x2fff, 2),
                (0x4000, 1),
                (0x3000, u64::MAX),
            ] {
                assert_eq!(guest(purpose, address, len), None, "{address:#x}+{len:#x}");
            }
        }
        assert!(HeldMap::default().guest(Purpose::Data, 0, 0).is_none());
        let mut seen = Vec::new();
        let mut note = |part: VolatileSlice<'_>| {
            seen.push((address(part), part.len()));
            Some(())
        };
        assert_eq!(map.parts(0x2ff0, 0x20, &mut note), Some(()));
        assert_eq!(map.parts(0x3ff0, 0x20, &mut note), None);
        let straddled = (low_base.wrapping_add(0x1ff0), 0x10);
        assert_eq!(seen[..2], [straddled, (high_base, 0x10)]);
        // And back.
        let guest = |at: *mut u8, len| {
            let mut seen = Vec::new();
            map.guest_ranges(at, len, |guest, len| seen.push((guest, len)));
            seen
        };
        assert_eq!(guest(low_base, 0x2000), [(0x1000, 0x2000)]);
        assert_eq!(guest(high_base.wrapping_add(8), 8), [(0x3008, 8)]);
        let past = guest(high_base.wrapping_add(0xff0), 0x11);
        assert_eq!(past[..1], [(0x3ff0, 0x10)]);
        assert!(guest(std::ptr::null_mut(), 8).is_empty());
    }

    #[test]
    fn regions_that_overlap_or_lie_are_refused() {
        let file = memfd(0x4000);
        let a = region(0x1000, 0x2000, 0x1000, &file, 0);
        let guest = region(0x2000, 0x1000, 0x9000, &file, 0);
        let user = region(0x9000, 0x1000, 0x2000, &file, 0);
        assert!(MemoryMap::new(vec![a.clone(), guest]).is_err());
        assert!(MemoryMap::new(vec![a, user]).is_err());
        for (guest, len_bytes, offset) in [
            (0, 0x5000, 0),
            (0, 0x1000, 0x3001),
            (0, 0, 0),
            (u64::MAX, 2, 0),
            (0, 0x1000, u64::MAX),
        ] {
            let address = RegionAddress {
                guest,
                len_bytes,
                user: 0,
            };
            assert!(Region::map(address, &file, offset).is_err());
        }
    }

    #[test]
    fn memory_that_the_client_takes_away_reads_as_zeroes_and_is_marked() {
        let (file, other) = (memfd(0x4000), memfd(0x1000));
        let cut = region(0, 0x4000, 0, &file, 0);
        let whole = region(0, 0x1000, 0, &other, 0);
        let (first, second) = (cut.memory.clone(), whole.memory.clone());
        first.store(0, 7u8, Ordering::Relaxed);
        second.store(0, 8u8, Ordering::Relaxed);
        let map = MemoryMap::new(vec![cut.clone()]).unwrap();
        assert!(!map.is_poisoned());
        let before = sigbus::poisonings();
        ftruncate(&file, 0).unwrap();
        let read = |shared: &Shared, at| shared.load::<u8>(at, Ordering::Relaxed);
        assert_eq!(read(&first, 0x3000), 0);
        first.store(0, 1u8, Ordering::Relaxed);
        assert_eq!(read(&second, 0), 8);
        assert!(map.is_poisoned() && sigbus::poisonings() > before);
        assert!(!MemoryMap::new(vec![whole]).unwrap().is_poisoned());
    }
}
