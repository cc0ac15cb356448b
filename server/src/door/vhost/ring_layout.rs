//! The layout of a split virtqueue (virtio 1.3, 2.7), and what a session and a queue tell each other about one.

use vm_memory::{VolatileMemory, VolatileSlice};

use super::access;

/// Largest queue (virtio 1.3, 2.7).
pub(super) const MAX_QUEUE_SIZE: u32 = 32768;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();

pub(super) use virtio_queue::desc::split::Descriptor;

/// Where the parts of a ring are, in the client's own address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// What a queue needs to know besides its addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingOptions {
    pub size: u16,
    pub event_index: bool,
    pub indirect: bool,
}

/// Why a ring cannot be used (any more).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingError {
    #[error("its size is not a power of two up to {MAX_QUEUE_SIZE}")]
    Size,
    #[error("a part of it is not aligned or does not lie in one memory region")]
    Address,
    #[error("its available index is further ahead than the queue is long")]
    AvailableIndex,
    #[error("a chain begins at a descriptor that does not exist")]
    Head,
    #[error("the record of requests in flight contradicts it")]
    Inflight,
}

/// Bytes of the descriptor table of a queue.
pub(super) fn descriptor_table_bytes(size: u16) -> u64 {
    DESCRIPTOR_BYTES as u64 * u64::from(size)
}

/// Bytes of the available ring of a queue: `flags`, `idx`, `ring[size]`, `used_event`.
pub(super) fn available_ring_bytes(size: u16) -> u64 {
    6 + 2 * u64::from(size)
}

/// Bytes of the used ring of a queue: `flags`, `idx`, `ring[size]` of two `u32` each, `avail_event`.
pub(super) fn used_ring_bytes(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

/// Reads a descriptor of a table once, whatever the driver does to it meanwhile. `None`: the table has no such
/// index.
///
/// In words: a volatile load of the structure would be one of each of its bytes.
#[inline(always)]
pub(super) fn descriptor(table: VolatileSlice<'_>, index: u16) -> Option<Descriptor> {
    access::point();
    let at = DESCRIPTOR_BYTES * usize::from(index);
    let entry = table.subslice(at, DESCRIPTOR_BYTES).ok()?;
    let word = |at| Some(u64::from_le(entry.get_ref(at).ok()?.load()));
    let (address, rest): (u64, u64) = (word(0)?, word(8)?);
    // The fields of the second word are 32, 16 and 16 bits.
    #[expect(clippy::cast_possible_truncation)]
    let (len_bytes, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
    Some(Descriptor::new(address, len_bytes, flags, next))
}
