//! The device's side of a split virtqueue (virtio 1.3, 2.7).
//!
//! Ring addresses are translated once per memory map, not once per access. The driver is hostile:
//! everything in shared memory is read once, and checked before it is used.

mod chain;
mod notify;

use std::sync::atomic::{Ordering, fence};

use vm_memory::{VolatileMemory, VolatileSlice};

use super::inflight::InflightQueue;
use super::memory::{HeldMap, MemoryMap, Purpose};
use super::ring_layout::{
    DESCRIPTOR_BYTES, MAX_QUEUE_SIZE, RingAddresses, RingError, RingOptions, available_ring_bytes,
    descriptor_table_bytes, used_ring_bytes,
};
use super::shared::Shared;
use crate::engine::crash;
pub(super) use chain::{Chain, indirect_count};
use notify::{Word, Words};

/// Publish `used->idx` after this many completions within a batch: a driver that polls need not wait for the
/// whole batch, and the cache line of the index does not travel for each.
const PUBLISH_EVERY: u16 = 4;

/// Chains whose memory is prefetched before it is their turn, at most.
const LOOK_AHEAD: u16 = 32;

/// Ring memory as it is mapped here.
#[derive(Debug)]
struct Parts {
    size: u16,
    /// Mask that turns a free-running index into a ring slot.
    mask: u16,
    descriptors: Shared,
    /// `flags`, `idx`, `ring[size]`, `used_event`.
    available: Shared,
    /// `flags`, `idx`, `ring[size]` of two `u32` each, `avail_event`.
    used: Shared,
}

impl Parts {
    fn translate(size: u16, addresses: RingAddresses, map: &MemoryMap) -> Result<Self, RingError> {
        // The parts are aligned in the guest (2.7); a region mapped askew must not break that.
        let part = |address: u64, len_bytes: u64, alignment: usize| {
            map.user(address, len_bytes)
                .filter(|part| part.is_aligned(alignment))
                .ok_or(RingError::Address)
        };
        Ok(Self {
            size,
            mask: size - 1,
            descriptors: part(addresses.descriptors, descriptor_table_bytes(size), 16)?,
            available: part(addresses.available, available_ring_bytes(size), 2)?,
            used: part(addresses.used, used_ring_bytes(size), 4)?,
        })
    }

    /// The ring slot of a free-running index.
    #[inline(always)]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & self.mask)
    }

    /// The head of the chain at an available index, which may be none.
    #[inline(always)]
    fn head(&self, index: u16) -> u16 {
        let at = 4 + 2 * self.slot(index);
        // SAFETY: `translate` checked that the whole ring is there, which has all slots.
        u16::from_le(unsafe { self.available.read(at) })
    }

    /// Writes the used entry of an index: the head of a chain, and how many of its bytes were written.
    #[inline(always)]
    fn set_used(&self, index: u16, head: u16, written_bytes: u32) {
        let entry = 4 + 8 * self.slot(index);
        // SAFETY: as for `head`; the ring is aligned to words, and so are its entries.
        unsafe {
            self.used.write_u32(entry, u32::from(head).to_le());
            self.used.write_u32(entry + 4, written_bytes.to_le());
        }
    }
}

impl Words for Parts {
    #[inline(always)]
    fn load(&self, word: Word, order: Ordering) -> u16 {
        let (part, at) = self.word(word);
        u16::from_le(part.load_u16(at, order))
    }

    #[inline(always)]
    fn store(&self, word: Word, value: u16, order: Ordering) {
        let (part, at) = self.word(word);
        part.store_u16(at, value.to_le(), order);
    }

    #[inline(always)]
    fn fence(&self, order: Ordering) {
        fence(order);
    }
}

impl Parts {
    #[inline(always)]
    fn word(&self, word: Word) -> (&Shared, usize) {
        let size = usize::from(self.size);
        match word {
            Word::AvailableFlags => (&self.available, 0),
            Word::AvailableIndex => (&self.available, 2),
            Word::UsedEvent => (&self.available, 4 + 2 * size),
            Word::UsedFlags => (&self.used, 0),
            Word::UsedIndex => (&self.used, 2),
            Word::AvailableEvent => (&self.used, 4 + 8 * size),
        }
    }
}

/// The device's side of one virtqueue.
#[derive(Debug)]
pub(super) struct Virtqueue {
    options: RingOptions,
    addresses: RingAddresses,
    memory: Parts,
    /// Index of the next chain to take.
    next_available: u16,
    /// The driver's index as last read.
    seen_available: u16,
    /// Index of the next used entry to write.
    next_used: u16,
    /// The used index as it was last published.
    published_used: u16,
    /// The used index when the driver was last asked whether it wants a notification.
    notified_used: u16,
    /// Used entries before this index are marked in the log of dirty pages, if there is one.
    logged_used: u16,
    /// Whether the driver was notified since the start; the first time it always is.
    was_notified: bool,
    /// The record of chains in flight, which the client keeps.
    inflight: Option<InflightQueue>,
    /// Chains that were in flight when an earlier server ended, to be submitted again; last one first.
    resubmit: Vec<u16>,
}

impl Virtqueue {
    /// A queue that continues at available index `base`, or where the record of chains in flight says.
    ///
    /// # Errors
    ///
    /// When the size is invalid or the ring is not in `map`.
    pub(super) fn new(
        options: RingOptions,
        addresses: RingAddresses,
        base: u16,
        map: &MemoryMap,
        inflight: Option<InflightQueue>,
    ) -> Result<Self, RingError> {
        if !options.size.is_power_of_two() || u32::from(options.size) > MAX_QUEUE_SIZE {
            return Err(RingError::Size);
        }
        let mut queue = Self {
            options,
            addresses,
            memory: Parts::translate(options.size, addresses, map)?,
            next_available: base,
            seen_available: base,
            next_used: 0,
            published_used: 0,
            notified_used: 0,
            logged_used: 0,
            was_notified: false,
            inflight,
            resubmit: Vec::new(),
        };
        // Used entries go on where the ring in memory stands (vhost-user has no message for it).
        let used = queue.memory.load(Word::UsedIndex, Ordering::Acquire);
        queue.next_used = used;
        queue.published_used = used;
        queue.notified_used = used;
        queue.logged_used = used;
        queue.memory.store(Word::UsedFlags, 0, Ordering::Relaxed);
        if let Some(inflight) = &mut queue.inflight {
            let mut resubmit = inflight.recover(used).map_err(|_| RingError::Inflight)?;
            resubmit.reverse();
            // There are at most as many as the queue is long.
            let in_flight = u16::try_from(resubmit.len()).unwrap_or(u16::MAX);
            queue.resubmit = resubmit;
            queue.next_available = used.wrapping_add(in_flight);
            queue.seen_available = queue.next_available;
        }
        Ok(queue)
    }

    /// Finds the ring in a new memory map.
    ///
    /// # Errors
    ///
    /// When it is not there; the queue must not be used any more then.
    pub(super) fn remap(&mut self, map: &MemoryMap) -> Result<(), RingError> {
        self.memory = Parts::translate(self.options.size, self.addresses, map)?;
        Ok(())
    }

    /// Loads the driver's index: [`pop`](Self::pop) knows of the chains before it. Returns whether there is a
    /// chain to take.
    ///
    /// # Errors
    ///
    /// When the driver broke the ring. There is no way on from there.
    pub(super) fn poll(&mut self) -> Result<bool, RingError> {
        let seen = notify::available_index(&self.memory);
        if seen.wrapping_sub(self.next_available) > self.options.size {
            return Err(RingError::AvailableIndex);
        }
        let table = self.memory.descriptors.start().as_ptr();
        let more = seen.wrapping_sub(self.seen_available).min(LOOK_AHEAD);
        for ahead in 0..more {
            let head = self.memory.head(self.seen_available.wrapping_add(ahead));
            let at = DESCRIPTOR_BYTES * usize::from(head);
            prefetch(table.wrapping_add(at));
        }
        self.seen_available = seen;
        Ok(self.has_chains())
    }

    /// Where the first descriptor is of the chain at an available index, if there is such a descriptor.
    #[inline(always)]
    fn first_descriptor(&self, index: u16) -> Option<VolatileSlice<'_>> {
        let at = DESCRIPTOR_BYTES * usize::from(self.memory.head(index));
        let table = self.memory.descriptors.slice();
        table.subslice(at, DESCRIPTOR_BYTES).ok()
    }

    /// Prefetches what the chain after the next begins with (the header or the indirect table) while the next
    /// one is being worked on.
    #[inline(always)]
    pub(super) fn look_ahead(&self, map: &HeldMap) {
        let index = self.next_available.wrapping_add(1);
        if self.seen_available.wrapping_sub(index).wrapping_sub(1) >= LOOK_AHEAD {
            return;
        }
        if let Some(first) = self.first_descriptor(index)
            && let Ok(address) = first.get_ref::<u64>(0)
            && let Some(at) = map.guest(Purpose::Control, u64::from_le(address.load()), 1)
        {
            prefetch(at.ptr_guard().as_ptr());
        }
    }

    /// Whether the driver made chains available that [`poll`](Self::poll) has not seen.
    pub(super) fn has_unseen(&self) -> bool {
        notify::has_moved(&self.memory, self.seen_available)
    }

    /// Whether there is a chain to take.
    pub(super) fn has_chains(&self) -> bool {
        self.next_available != self.seen_available || !self.resubmit.is_empty()
    }

    /// How many chains there are to take.
    pub(super) fn waiting(&self) -> usize {
        usize::from(self.seen_available.wrapping_sub(self.next_available)) + self.resubmit.len()
    }

    /// The next chain of those that the last [`poll`](Self::poll) saw.
    ///
    /// # Errors
    ///
    /// As for [`poll`](Self::poll).
    #[inline(always)]
    pub(super) fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if !self.resubmit.is_empty() {
            return Ok(self.resubmit.pop());
        }
        if self.next_available == self.seen_available {
            return Ok(None);
        }
        let head = self.memory.head(self.next_available);
        if head >= self.options.size {
            return Err(RingError::Head);
        }
        self.next_available = self.next_available.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
        }
        Ok(Some(head))
    }

    /// Whether the client took away the record of chains in flight.
    pub(super) fn lost_its_record(&self) -> bool {
        self.inflight
            .as_ref()
            .is_some_and(InflightQueue::is_poisoned)
    }

    /// Whether an earlier server may have published entries without notifying the driver of them.
    pub(super) fn may_owe_notification(&self) -> bool {
        self.inflight.is_some() || self.published_used != 0
    }

    /// Whether chains that were in flight when an earlier server ended are still to be submitted. They are not on
    /// the ring any more, so a stop must not leave them.
    pub(super) fn has_chains_to_resubmit(&self) -> bool {
        !self.resubmit.is_empty()
    }

    /// Where the queue stands: what `GET_VRING_BASE` answers.
    pub(super) fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The descriptors of a chain.
    #[inline]
    pub(super) fn chain<'a>(&'a self, head: u16, map: &'a HeldMap) -> Chain<'a> {
        Chain::new(self.descriptor_table(), self.options, head, map)
    }

    /// The ring's descriptor table.
    #[inline(always)]
    pub(super) fn descriptor_table(&self) -> VolatileSlice<'_> {
        self.memory.descriptors.slice()
    }

    /// What the session said of the ring besides its addresses.
    #[inline(always)]
    pub(super) fn options(&self) -> RingOptions {
        self.options
    }

    /// Returns a chain to the driver, which sees it after [`publish_and_ask`](Self::publish_and_ask) at the latest.
    #[inline(always)]
    pub(super) fn push_used(&mut self, head: u16, written_bytes: u32) {
        if let Some(inflight) = &mut self.inflight {
            inflight.returned(head);
        }
        self.memory.set_used(self.next_used, head, written_bytes);
        if self.inflight.is_some() {
            crash::request_point("answer-written");
        }
        self.next_used = self.next_used.wrapping_add(1);
        if self.next_used.wrapping_sub(self.published_used) >= PUBLISH_EVERY {
            self.publish();
        }
    }

    /// Whether the driver has not been asked yet whether it wants a notification of all that was returned.
    pub(super) fn is_to_publish(&self) -> bool {
        self.next_used != self.notified_used
    }

    /// Publishes `used->idx` without notifying, so that a driver that polls can continue.
    fn publish(&mut self) {
        self.published_used = self.next_used;
        notify::publish(&self.memory, self.next_used);
        if let Some(inflight) = &mut self.inflight {
            crash::request_point("answers-published");
            inflight.published(self.next_used);
        }
    }

    /// Publishes what was returned. Returns whether the driver wants a notification of it, or of what was
    /// published since it was last asked.
    pub(super) fn publish_and_ask(&mut self) -> bool {
        if self.published_used != self.next_used {
            self.publish();
        }
        let old = std::mem::replace(&mut self.notified_used, self.next_used);
        let event_index = self.options.event_index;
        let wanted = notify::wants_notification(&self.memory, event_index, old, self.next_used);
        // With event index the driver's word may be from before a restart.
        let first = event_index && !std::mem::replace(&mut self.was_notified, true);
        first || wanted
    }

    /// Asks for a kick at the next chain. Returns whether one is there already, in which case no
    /// kick may come for it.
    #[must_use]
    pub(super) fn enable_kicks(&mut self) -> bool {
        notify::enable_kicks(&self.memory, self.options.event_index, self.next_available)
    }

    /// Asks for no kicks while the queue is being worked on.
    pub(super) fn disable_kicks(&mut self) {
        notify::disable_kicks(&self.memory, self.options.event_index);
    }

    /// From now on used entries are to be marked: those of this round too.
    pub(super) fn start_logging(&mut self) {
        self.logged_used = self.notified_used;
    }

    /// Hands the parts of the used ring to `mark` that may have been written since the last time:
    /// offset from its beginning, and length.
    pub(super) fn written(&mut self, mut mark: impl FnMut(u64, u64)) {
        let size = u64::from(self.options.size);
        // `flags` and `idx`, then `avail_event`.
        mark(0, 4);
        mark(4 + 8 * size, 2);
        let count = u64::from(self.next_used.wrapping_sub(self.logged_used)).min(size);
        let first = u64::from(self.logged_used) & (size - 1);
        let to_end = count.min(size - first);
        mark(4 + 8 * first, 8 * to_end);
        mark(4, 8 * (count - to_end));
        self.logged_used = self.next_used;
    }
}

/// Asks the processor for the cache line of an address, which need not be mapped.
#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it has no effect on what the program sees, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
#[path = "virtqueue_tests.rs"]
mod tests;
