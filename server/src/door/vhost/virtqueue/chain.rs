//! The descriptors of one chain (virtio 1.3, 2.7.5).

use super::super::memory::{HeldMap, Purpose};
use super::{DESCRIPTOR_BYTES, FLAG_INDIRECT, FLAG_NEXT, Virtqueue};

pub(super) const FLAG_WRITE: u16 = 2;

/// Why a chain cannot be followed to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::door::vhost) enum ChainError {
    /// A loop, or more descriptors than there are.
    TooLong,
    /// A next index outside the table.
    Next,
    /// An indirect table that is nested, not offered, continued, empty, absurdly long or not a
    /// whole number of descriptors, or that does not lie in the client's memory.
    Indirect,
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::door::vhost) struct Descriptor {
    pub address: u64,
    pub len_bytes: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    /// Whether the device may write to it (it must not read it then).
    pub(in crate::door::vhost) fn is_writable(self) -> bool {
        self.flags & FLAG_WRITE != 0
    }
}

/// Where a chain's descriptors are.
#[derive(Clone, Copy)]
enum Table {
    /// The ring's own, or an indirect one that lies in one memory region, in words.
    Here(*const u8),
    /// An indirect one that lies anyhow: it has no alignment, and memory may be split anywhere.
    Split { guest: u64 },
}

/// Walks the descriptors of one chain; ends after the first error.
pub(in crate::door::vhost) struct Chain<'a> {
    queue: &'a Virtqueue,
    map: &'a HeldMap,
    table: Table,
    /// Descriptors in the table.
    count: u32,
    is_indirect: bool,
    next: Option<u16>,
    /// Descriptors the table can still have without a loop.
    left: u32,
}

impl<'a> Chain<'a> {
    /// The one that begins at descriptor `head` of the ring.
    #[inline]
    pub(super) fn new(queue: &'a Virtqueue, head: u16, map: &'a HeldMap) -> Self {
        Self {
            queue,
            map,
            table: Table::Here(queue.memory.descriptors),
            count: u32::from(queue.options.size),
            is_indirect: false,
            next: Some(head),
            left: u32::from(queue.options.size),
        }
    }
}

impl Chain<'_> {
    #[inline]
    fn read(&self, index: u16) -> Result<Descriptor, ChainError> {
        if u32::from(index) >= self.count {
            return Err(ChainError::Next);
        }
        match self.table {
            Table::Here(table) => {
                // SAFETY: `translate` (for the ring's own) or `enter` checked that the whole table is
                // mapped and aligned; the owner of the queue keeps the map.
                Ok(unsafe { descriptor_at(table, index) })
            }
            Table::Split { guest } => self.read_split(guest, index),
        }
    }

    #[cold]
    fn read_split(&self, guest: u64, index: u16) -> Result<Descriptor, ChainError> {
        let offset = DESCRIPTOR_BYTES * u64::from(index);
        let mut bytes = [0u8; 16];
        let mut filled = 0;
        let copied = self.map.pieces(guest + offset, 16, |at, len| {
            // SAFETY: `pieces` names mapped bytes, at most the 16 it was asked for, and `map` is
            // borrowed meanwhile. The driver may change them under the copy; what was copied is
            // checked afterwards.
            unsafe { at.copy_to_nonoverlapping(bytes.as_mut_ptr().add(filled), len) };
            filled += len;
            Some(())
        });
        copied.ok_or(ChainError::Indirect)?;
        let word = |from: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[from..from + 8]);
            u64::from_ne_bytes(word)
        };
        Ok(parse([word(0), word(8)]))
    }

    #[inline]
    fn step(&mut self, mut index: u16) -> Result<Descriptor, ChainError> {
        loop {
            self.left = self.left.checked_sub(1).ok_or(ChainError::TooLong)?;
            let descriptor = self.read(index)?;
            if descriptor.flags & FLAG_INDIRECT == 0 {
                if descriptor.flags & FLAG_NEXT != 0 {
                    self.next = Some(descriptor.next);
                }
                return Ok(descriptor);
            }
            self.enter(descriptor)?;
            index = 0;
        }
    }

    /// Goes on in an indirect table.
    fn enter(&mut self, descriptor: Descriptor) -> Result<(), ChainError> {
        let count = match self.queue.indirect(descriptor) {
            Some(count) if !self.is_indirect => count,
            _ => return Err(ChainError::Indirect),
        };
        let guest = descriptor.address;
        let len_bytes = u64::from(descriptor.len_bytes);
        self.table = match self.map.guest(Purpose::Control, guest, len_bytes) {
            Some(at) if at.cast::<u64>().is_aligned() => Table::Here(at.as_ptr()),
            _ => Table::Split { guest },
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

/// Reads a descriptor.
///
/// # Safety
///
/// `table` is mapped as far as `index`, and aligned to words.
#[inline]
pub(super) unsafe fn descriptor_at(table: *const u8, index: u16) -> Descriptor {
    let at = table.wrapping_add(usize::from(index) * 16).cast::<u64>();
    // SAFETY: as the caller promised. The driver may change it at any time: it is read once.
    parse(unsafe { [at.read_volatile(), at.wrapping_add(1).read_volatile()] })
}

#[inline]
fn parse([address, rest]: [u64; 2]) -> Descriptor {
    let rest = u64::from_le(rest);
    // The fields are 32, 16 and 16 bits of one little-endian word.
    #[expect(clippy::cast_possible_truncation)]
    Descriptor {
        address: u64::from_le(address),
        len_bytes: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}
