//! The memory that requests lie in, as the server sees it.
//!
//! Clients' regions and the buffers of the block device are files that the server maps too, each at an address of its
//! own among those that the server calls guest-physical: regions of two clients may have the same address in both
//! guests. What the server has not mapped is copied, through a piece of a memory file of our own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;

use crate::engine::MappedFile;
use crate::io::AnonymousMemory;

/// Where the server sees the rings, the memory for copies, and everything else.
pub(super) const RINGS_GUEST: u64 = 1 << 30;
const BOUNCE_GUEST: u64 = 2 << 30;
const FIRST_GUEST: u64 = 4 << 30;

/// What regions begin at multiples of, so that a server may use huge pages.
const ALIGNMENT: u64 = 2 << 20;

/// How often a server is asked to map a region that it has gone away over. One that says no is not asked again.
const MAX_REFUSALS: u32 = 2;

/// A region of memory that the server is to map.
#[derive(Debug)]
pub(super) struct Region {
    pub id: u64,
    /// Where the server sees it.
    pub guest: u64,
    pub len_bytes: u64,
    file: OwnedFd,
    pub offset_bytes: u64,
    /// Where it is mapped here.
    address: usize,
}

impl Region {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Debug)]
struct Entry {
    region: Arc<Region>,
    /// Whether the server has it mapped, so that requests may name it.
    is_mapped: bool,
    /// Requests lie in it no more. Its addresses are free when the server has forgotten it.
    is_gone: bool,
    /// How often the server did not take it, or went away over it.
    refusals: u32,
}

impl Entry {
    fn is_refused(&self) -> bool {
        self.refusals >= MAX_REFUSALS
    }
}

/// All regions.
#[derive(Debug, Default)]
pub(super) struct Regions {
    /// In the order of guest addresses.
    entries: Mutex<Vec<Entry>>,
    last_id: AtomicU64,
    /// Changes with what requests may name.
    version: AtomicU64,
}

impl Regions {
    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Each change is one operation on the list.
        (self.entries.lock()).unwrap_or_else(PoisonError::into_inner)
    }

    /// Chooses addresses for memory, which the server does not have yet.
    pub(super) fn add(&self, memory: MappedFile<'_>) -> io::Result<Arc<Region>> {
        let file = memory.file.try_clone_to_owned()?;
        let mut entries = self.entries();
        let end = |entry: &Entry| entry.region.guest + entry.region.len_bytes;
        let mut guest = FIRST_GUEST;
        let mut place = 0;
        for entry in &*entries {
            if entry.region.guest >= guest && memory.len_bytes <= entry.region.guest - guest {
                break;
            }
            guest = (end(entry).checked_next_multiple_of(ALIGNMENT)).ok_or_else(no_addresses)?;
            place += 1;
        }
        guest
            .checked_add(memory.len_bytes)
            .ok_or_else(no_addresses)?;
        let region = Arc::new(Region {
            id: self.last_id.fetch_add(1, Ordering::Relaxed) + 1,
            guest,
            len_bytes: memory.len_bytes,
            file,
            offset_bytes: memory.offset_bytes,
            address: memory.address,
        });
        let entry = Entry {
            region: Arc::clone(&region),
            is_mapped: false,
            is_gone: false,
            refusals: 0,
        };
        entries.insert(place, entry);
        Ok(region)
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Entry)) {
        let mut entries = self.entries();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.region.id == id) {
            change(entry);
            self.version.fetch_add(1, Ordering::Release);
        }
    }

    /// The server has mapped it.
    pub(super) fn set_mapped(&self, id: u64) {
        self.change(id, |entry| entry.is_mapped = true);
    }

    /// The server does not map it: requests in it are copied.
    pub(super) fn set_refused(&self, id: u64) {
        self.change(id, |entry| entry.refusals = MAX_REFUSALS);
    }

    /// The server went away when it was to map it, perhaps because of it.
    pub(super) fn suspect(&self, id: u64) {
        self.change(id, |entry| entry.refusals += 1);
    }

    /// It is about to be unmapped here.
    pub(super) fn set_gone(&self, id: u64) {
        self.change(id, |entry| entry.is_gone = true);
    }

    /// The server does not have it any more.
    pub(super) fn forget(&self, id: u64) {
        self.entries().retain(|entry| entry.region.id != id);
    }

    /// The server has these and no others: what is gone of the rest is forgotten.
    pub(super) fn forget_gone(&self, mapped: &[Arc<Region>]) {
        let has = |id| mapped.iter().any(|region| region.id == id);
        (self.entries()).retain(|entry| !entry.is_gone || has(entry.region.id));
    }

    /// Those that requests lie in and that were not refused, each with whether the server had it mapped; those that are
    /// gone are forgotten. For a server that has none of them.
    pub(super) fn present(&self) -> Vec<(Arc<Region>, bool)> {
        let mut entries = self.entries();
        entries.retain(|entry| !entry.is_gone);
        entries
            .iter()
            .filter(|entry| entry.is_mapped || !entry.is_refused())
            .map(|entry| (Arc::clone(&entry.region), entry.is_mapped))
            .collect()
    }

    /// The region with this number, and whether the server has it mapped.
    pub(super) fn get(&self, id: u64) -> Option<(Arc<Region>, bool)> {
        let entries = self.entries();
        let entry = entries.iter().find(|entry| entry.region.id == id)?;
        Some((Arc::clone(&entry.region), entry.is_mapped))
    }

    /// A region that requests lie in and the server does not have.
    pub(super) fn not_mapped(&self) -> Option<u64> {
        let entries = self.entries();
        let mut left = entries
            .iter()
            .filter(|entry| !entry.is_mapped && !entry.is_gone && !entry.is_refused());
        left.next().map(|entry| entry.region.id)
    }

    /// What requests may name, in the order of addresses here.
    fn known(&self) -> Vec<Known> {
        let entries = self.entries();
        let known = entries
            .iter()
            .filter(|entry| entry.is_mapped && !entry.is_gone);
        let mut known: Vec<_> = known
            .map(|entry| Known {
                address: entry.region.address,
                len_bytes: entry.region.len_bytes,
                guest: entry.region.guest,
            })
            .collect();
        known.sort_by_key(|known| known.address);
        known
    }
}

fn no_addresses() -> io::Error {
    io::Error::other("no addresses are left for the memory of clients")
}

/// A region in short.
#[derive(Clone, Copy, Debug)]
struct Known {
    address: usize,
    len_bytes: u64,
    guest: u64,
}

/// The regions as one thread uses them.
#[derive(Debug)]
pub(super) struct View {
    regions: Arc<Regions>,
    version: u64,
    known: Vec<Known>,
    /// Where something was found last.
    last: usize,
}

impl View {
    pub(super) fn new(regions: Arc<Regions>) -> Self {
        Self {
            regions,
            version: u64::MAX,
            known: Vec::new(),
            last: 0,
        }
    }

    /// Takes note of what has changed. Memory that a request lies in was added before the request began.
    #[inline]
    pub(super) fn refresh(&mut self) {
        let version = self.regions.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            self.known = self.regions.known();
            self.last = 0;
        }
    }

    /// Where the server sees memory of this process, if it does.
    #[inline]
    pub(super) fn guest(&mut self, address: usize, len_bytes: usize) -> Option<u64> {
        let within = |known: &Known| {
            let offset = address.checked_sub(known.address)? as u64;
            let has_it = offset <= known.len_bytes && len_bytes as u64 <= known.len_bytes - offset;
            has_it.then(|| known.guest + offset)
        };
        if let Some(found) = self.known.get(self.last).and_then(within) {
            return Some(found);
        }
        let after = self.known.partition_point(|known| known.address <= address);
        self.last = after.checked_sub(1)?;
        within(&self.known[self.last])
    }
}

/// Bytes of a buffer for data that is copied, and how many each queue has.
pub(super) const BUFFER_BYTES: usize = 256 << 10;
const BUFFERS: usize = 4;

/// The memory for data that is copied, of all queues. Pages that are not used take no room.
#[derive(Debug)]
pub(super) struct BounceMemory {
    memory: AnonymousMemory,
    file: OwnedFd,
    taken: Mutex<Box<[bool]>>,
}

impl BounceMemory {
    /// For so many threads.
    pub(super) fn new(threads: usize) -> io::Result<Self> {
        let (memory, file) =
            AnonymousMemory::shareable("ublkup-bounce", threads * BUFFERS * BUFFER_BYTES)?;
        Ok(Self {
            memory,
            file,
            taken: Mutex::new(vec![false; threads].into()),
        })
    }

    fn taken(&self) -> MutexGuard<'_, Box<[bool]>> {
        // Each change is one store.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn guest(&self) -> u64 {
        BOUNCE_GUEST
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.memory.slice().len() as u64
    }
}

/// The buffers of one queue.
#[derive(Debug)]
pub(super) struct Bounce {
    memory: Arc<BounceMemory>,
    share: usize,
    free: Vec<usize>,
}

impl Bounce {
    pub(super) fn new(memory: &Arc<BounceMemory>) -> io::Result<Self> {
        let mut taken = memory.taken();
        let share = taken.iter().position(|taken| !taken).ok_or_else(|| {
            io::Error::other(format!(
                "the disk of another vhost-user server is used by {} threads already",
                taken.len()
            ))
        })?;
        taken[share] = true;
        drop(taken);
        Ok(Self {
            memory: Arc::clone(memory),
            share,
            free: (0..BUFFERS).collect(),
        })
    }

    /// The number of the thread that has it: no other one has the same.
    pub(super) fn number(&self) -> usize {
        self.share
    }

    pub(super) fn take(&mut self) -> Option<usize> {
        self.free.pop()
    }

    pub(super) fn give_back(&mut self, number: usize) {
        self.free.push(number);
    }

    fn offset(&self, number: usize) -> usize {
        (self.share * BUFFERS + number) * BUFFER_BYTES
    }

    /// Where the server sees a buffer.
    pub(super) fn guest(&self, number: usize) -> u64 {
        BOUNCE_GUEST + self.offset(number) as u64
    }

    /// A buffer.
    pub(super) fn memory(&self, number: usize) -> VolatileSlice<'_> {
        let memory = self.memory.memory.slice();
        (memory.subslice(self.offset(number), BUFFER_BYTES)).expect("it is inside")
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        self.memory.taken()[self.share] = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(regions: &Regions, address: usize, len_bytes: u64) -> Arc<Region> {
        let file = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let memory = MappedFile {
            file: file.as_fd(),
            offset_bytes: 0,
            address,
            len_bytes,
        };
        regions.add(memory).unwrap()
    }

    #[test]
    fn regions_have_addresses_of_their_own_which_are_used_again() {
        let regions = Regions::default();
        let all = [1, ALIGNMENT, ALIGNMENT + 1, 5].map(|len| add(&regions, 0x1000, len));
        for (number, one) in all.iter().enumerate() {
            assert_eq!(one.guest % ALIGNMENT, 0);
            for other in &all[number + 1..] {
                let apart = one.guest + one.len_bytes <= other.guest
                    || other.guest + other.len_bytes <= one.guest;
                assert!(apart, "{one:?} {other:?}");
            }
        }
        regions.set_gone(all[1].id);
        assert_ne!(add(&regions, 0, 1).guest, all[1].guest, "the server has it");
        regions.forget(all[1].id);
        assert_ne!(
            add(&regions, 0, ALIGNMENT + 1).guest,
            all[1].guest,
            "too long"
        );
        assert_eq!(add(&regions, 0, ALIGNMENT).guest, all[1].guest);
        assert_eq!(regions.present().len(), 6);
        regions.set_refused(all[0].id);
        regions.suspect(all[2].id);
        assert_eq!(regions.present().len(), 5);
        regions.suspect(all[2].id);
        assert_eq!(regions.present().len(), 4);
    }

    #[test]
    fn memory_is_found_where_the_server_has_it_mapped_and_nowhere_else() {
        let regions = Arc::new(Regions::default());
        let (low, high) = (add(&regions, 0x1000, 0x1000), add(&regions, 0x2000, 0x800));
        let mut view = View::new(Arc::clone(&regions));
        let mut guest = |address, len| {
            view.refresh();
            view.guest(address, len)
        };
        assert_eq!(guest(0x1000, 1), None);
        regions.set_mapped(low.id);
        regions.set_mapped(high.id);
        assert_eq!(guest(0x1000, 0x1000), Some(low.guest));
        assert_eq!(guest(0x27ff, 1), Some(high.guest + 0x7ff));
        assert_eq!(guest(0x1010, 0xff0), Some(low.guest + 0x10));
        for (address, len) in [
            (0xfff, 1),
            (0x1fff, 2),
            (0x2800, 1),
            (0x2000, 0x801),
            (0, 0),
        ] {
            assert_eq!(guest(address, len), None, "{address:#x}+{len:#x}");
        }
        regions.set_gone(low.id);
        assert_eq!(guest(0x1000, 1), None);
        assert_eq!(guest(0x2000, 1), Some(high.guest));
    }

    #[test]
    fn each_queue_has_buffers_of_its_own() {
        let memory = Arc::new(BounceMemory::new(2).unwrap());
        let mut all: Vec<_> = (0..2).map(|_| Bounce::new(&memory).unwrap()).collect();
        let mut seen = std::collections::BTreeSet::new();
        for bounce in &mut all {
            while let Some(number) = bounce.take() {
                assert!(seen.insert(bounce.guest(number)));
                assert_eq!(bounce.memory(number).len(), BUFFER_BYTES);
            }
        }
        assert_eq!(seen.len(), 2 * BUFFERS);
        assert!(Bounce::new(&memory).is_err());
        all.pop();
        assert!(Bounce::new(&memory).is_ok());
    }
}
