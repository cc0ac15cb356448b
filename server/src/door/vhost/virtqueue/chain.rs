//! The descriptors of one chain (virtio 1.3, 2.7.5).

use vm_memory::{ByteValued, VolatileSlice};

use crate::door::vhost::memory::{HeldMap, Purpose};
use crate::door::vhost::ring_layout::{DESCRIPTOR_BYTES, Descriptor, RingOptions, descriptor};

/// Why a chain cannot be followed to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// A loop, or more descriptors than there are.
    TooLong,
    /// A next index outside the table.
    Next,
    /// An indirect table that is nested, not offered, continued, empty, absurdly long or not a
    /// whole number of descriptors, or that does not lie in the client's memory.
    Indirect,
}

/// Where a chain's descriptors are.
#[derive(Clone, Copy)]
enum Table<'a> {
    /// The ring's own, or an indirect one that lies in one memory region.
    Whole(VolatileSlice<'a>),
    /// An indirect one that straddles regions.
    Split { guest: u64 },
}

/// Most descriptors in an indirect table. The specification says the queue's size; drivers of
/// small queues are known to go beyond it.
const MAX_INDIRECT: u32 = 1024;

/// Walks the descriptors of one chain; ends after the first error.
pub struct Chain<'a> {
    options: RingOptions,
    map: &'a HeldMap,
    table: Table<'a>,
    /// Descriptors in the table.
    count: u32,
    is_indirect: bool,
    next: Option<u16>,
    /// Descriptors the table can still have without a loop.
    left: u32,
}

impl<'a> Chain<'a> {
    /// The chain that begins at descriptor `head` of the ring's table.
    #[inline]
    pub(super) fn new(
        table: VolatileSlice<'a>,
        options: RingOptions,
        head: u16,
        map: &'a HeldMap,
    ) -> Self {
        Self {
            options,
            map,
            table: Table::Whole(table),
            count: u32::from(options.size),
            is_indirect: false,
            next: Some(head),
            left: u32::from(options.size),
        }
    }

    #[inline]
    fn read(&self, index: u16) -> Result<Descriptor, ChainError> {
        if u32::from(index) >= self.count {
            return Err(ChainError::Next);
        }
        match self.table {
            Table::Whole(table) => descriptor(table, index).ok_or(ChainError::Next),
            Table::Split { guest } => self.read_split(guest, index),
        }
    }

    #[cold]
    fn read_split(&self, guest: u64, index: u16) -> Result<Descriptor, ChainError> {
        let offset = DESCRIPTOR_BYTES * usize::from(index);
        let mut read = Descriptor::default();
        let mut rest = read.as_mut_slice();
        // No overflow: `indirect_count` checked that the table does not wrap around.
        let copied = self
            .map
            .map()
            .parts(guest + offset as u64, rest.len() as u64, |part| {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(part.len());
                part.copy_to(now);
                rest = later;
                Some(())
            });
        copied.ok_or(ChainError::Indirect)?;
        Ok(read)
    }

    #[inline]
    fn step(&mut self, mut index: u16) -> Result<Descriptor, ChainError> {
        loop {
            self.left = self.left.checked_sub(1).ok_or(ChainError::TooLong)?;
            let descriptor = self.read(index)?;
            if !descriptor.refers_to_indirect_table() {
                if descriptor.has_next() {
                    self.next = Some(descriptor.next());
                }
                return Ok(descriptor);
            }
            self.enter(descriptor)?;
            index = 0;
        }
    }

    /// Continues in an indirect table.
    fn enter(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let count = match indirect_count(self.options, descriptor) {
            Some(count) if !self.is_indirect => count,
            _ => return Err(ChainError::Indirect),
        };
        let (guest, len_bytes) = (descriptor.addr().0, u64::from(descriptor.len()));
        self.table = match self.map.guest(Purpose::Control, guest, len_bytes) {
            Some(table) => Table::Whole(table),
            None => Table::Split { guest },
        };
        self.is_indirect = true;
        self.count = count;
        self.left = count;
        Ok(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Result<Descriptor, ChainError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next.take()?;
        Some(self.step(index))
    }
}

/// How many descriptors the indirect table has that a descriptor names; `None` when it may not name one.
pub fn indirect_count(options: RingOptions, descriptor: Descriptor) -> Option<u32> {
    let (address, len_bytes) = (descriptor.addr().0, u64::from(descriptor.len()));
    let each_bytes = DESCRIPTOR_BYTES as u64;
    let count = u32::try_from(len_bytes / each_bytes).ok()?;
    let fits = options.indirect
        && !descriptor.has_next()
        && len_bytes.is_multiple_of(each_bytes)
        && (1..=MAX_INDIRECT.max(u32::from(options.size))).contains(&count)
        && address.checked_add(len_bytes).is_some();
    fits.then_some(count)
}
