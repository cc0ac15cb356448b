//! The device's side of a split virtqueue (virtio 1.3, 2.7).
//!
//! Ring addresses are translated once per memory map, not once per access. The driver is hostile:
//! everything in shared memory is read once, with volatile or atomic loads, and checked before it
//! is used.

mod chain;

use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::inflight::InflightQueue;
use super::memory::{HeldMap, MemoryMap, Purpose};
use crate::engine::crash;
use chain::descriptor_at;
pub(super) use chain::{Chain, Descriptor};

/// Largest queue (virtio 1.3, 2.7).
pub(super) const MAX_QUEUE_SIZE: u32 = 32768;

/// Most descriptors in an indirect table. The specification says the queue's size; drivers of
/// small queues are known to go beyond it.
const MAX_INDIRECT: u32 = 1024;

/// Used entries that the driver is shown at once while a batch goes on: one that looks for them need
/// not wait for the whole batch, and the cache line of the index does not travel for each.
const SHOW_EVERY: u16 = 4;

/// Chains whose memory is asked for before it is their turn, at most.
const LOOK_AHEAD: u16 = 32;

const DESCRIPTOR_BYTES: u64 = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_INDIRECT: u16 = 4;
const USED_NO_NOTIFY: u16 = 1;
const AVAIL_NO_INTERRUPT: u16 = 1;

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
    #[error("the record of requests under way contradicts it")]
    Inflight,
}

/// Ring memory as it is mapped here.
#[derive(Clone, Copy, Debug)]
struct Pointers {
    descriptors: *const u8,
    /// `flags`, `idx`, `ring[size]`, `used_event`.
    available: *mut u16,
    /// `flags`, `idx`, `ring[size]` of two `u32` each, `avail_event`.
    used: *mut u16,
}

/// The device's side of one virtqueue. Whoever owns it keeps the memory map it was given alive.
#[derive(Debug)]
pub(super) struct Virtqueue {
    options: RingOptions,
    addresses: RingAddresses,
    memory: Pointers,
    /// What of an index names an entry of a ring.
    index_mask: usize,
    /// Index of the next chain to take.
    next_available: u16,
    /// The driver's index as last read.
    seen_available: u16,
    /// Index of the next used entry to write.
    next_used: u16,
    /// The used index as the driver sees it.
    shown_used: u16,
    /// The used index when the driver was last asked whether it wants a notification.
    published_used: u16,
    /// Used entries before this index are marked in the log of dirty pages, if there is one.
    logged_used: u16,
    /// Whether the driver was notified since the start; the first time it always is.
    notified: bool,
    /// Where the client remembers what is under way.
    inflight: Option<InflightQueue>,
    /// Chains that a server before this one took and did not return, last one first.
    again: Vec<u16>,
}

impl Virtqueue {
    /// A queue that goes on at available index `base`, or where the record of requests under way
    /// says.
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
            memory: translate(options.size, addresses, map)?,
            index_mask: usize::from(options.size) - 1,
            next_available: base,
            seen_available: base,
            next_used: 0,
            shown_used: 0,
            published_used: 0,
            logged_used: 0,
            notified: false,
            inflight,
            again: Vec::new(),
        };
        // Used entries go on where the ring in memory stands (vhost-user has no message for it).
        let used = u16::from_le(queue.used_word(1).load(Ordering::Acquire));
        queue.next_used = used;
        queue.shown_used = used;
        queue.published_used = used;
        queue.logged_used = used;
        queue.used_word(0).store(0, Ordering::Relaxed);
        if let Some(inflight) = &mut queue.inflight {
            let mut again = inflight.recover(used).map_err(|_| RingError::Inflight)?;
            again.reverse();
            // There are at most as many as the queue is long.
            let taken = u16::try_from(again.len()).unwrap_or(u16::MAX);
            queue.again = again;
            queue.next_available = used.wrapping_add(taken);
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
        self.memory = translate(self.options.size, self.addresses, map)?;
        Ok(())
    }

    /// Looks whether the driver made more chains available than [`pop`](Self::pop) knows of. Returns
    /// whether there is a chain to take.
    ///
    /// # Errors
    ///
    /// When the driver broke the ring. There is no way on from there.
    pub(super) fn look(&mut self) -> Result<bool, RingError> {
        let seen = u16::from_le(self.available_word(1).load(Ordering::Acquire));
        if seen.wrapping_sub(self.next_available) > self.options.size {
            return Err(RingError::AvailableIndex);
        }
        let news = seen.wrapping_sub(self.seen_available).min(LOOK_AHEAD);
        for ahead in 0..news {
            let entry = self.seen_available.wrapping_add(ahead);
            if let Some(descriptor) = self.first_descriptor(entry) {
                prefetch(descriptor.cast());
            }
        }
        self.seen_available = seen;
        Ok(self.has_chains())
    }

    /// The first descriptor of the chain at an available index, if there is one of that number.
    #[inline]
    fn first_descriptor(&self, index: u16) -> Option<*const u64> {
        let entry = 2 + (usize::from(index) & self.index_mask);
        let head = u16::from_le(self.available_word(entry).load(Ordering::Relaxed));
        let at = self.memory.descriptors;
        let at = at.wrapping_add(usize::from(head) * 16).cast::<u64>();
        (head < self.options.size).then_some(at)
    }

    /// Lets the processor fetch what the chain after the next begins with (the header or the
    /// indirect table) while the next one is being worked on.
    #[inline]
    pub(super) fn look_ahead(&self, map: &HeldMap) {
        let index = self.next_available.wrapping_add(1);
        if self.seen_available.wrapping_sub(index).wrapping_sub(1) >= LOOK_AHEAD {
            return;
        }
        if let Some(descriptor) = self.first_descriptor(index) {
            // SAFETY: `translate` checked that the table is mapped and aligned; the owner of the
            // queue keeps the map.
            let address = u64::from_le(unsafe { descriptor.read_volatile() });
            if let Some(at) = map.guest(Purpose::Control, address, 1) {
                prefetch(at.as_ptr());
            }
        }
    }

    /// Whether the driver made chains available that [`look`](Self::look) has not seen.
    pub(super) fn has_news(&self) -> bool {
        u16::from_le(self.available_word(1).load(Ordering::Relaxed)) != self.seen_available
    }

    /// Whether there is a chain to take.
    pub(super) fn has_chains(&self) -> bool {
        self.next_available != self.seen_available || !self.again.is_empty()
    }

    /// The next chain of those that the last [`look`](Self::look) saw.
    ///
    /// # Errors
    ///
    /// As for [`look`](Self::look).
    #[inline(always)]
    pub(super) fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if !self.again.is_empty() {
            return Ok(self.again.pop());
        }
        if self.next_available == self.seen_available {
            return Ok(None);
        }
        let entry = 2 + (usize::from(self.next_available) & self.index_mask);
        let head = u16::from_le(self.available_word(entry).load(Ordering::Relaxed));
        if head >= self.options.size {
            return Err(RingError::Head);
        }
        self.next_available = self.next_available.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.take(head);
        }
        Ok(Some(head))
    }

    /// Whether the client took away the record of requests under way.
    pub(super) fn lost_its_record(&self) -> bool {
        self.inflight
            .as_ref()
            .is_some_and(InflightQueue::is_poisoned)
    }

    /// Whether another server has served the ring, perhaps. What that one returned the driver may not have
    /// been notified of.
    pub(super) fn has_past(&self) -> bool {
        self.inflight.is_some() || self.published_used != 0
    }

    /// Whether chains are to be done again that were taken before this queue began: they are not
    /// on the ring any more, so a stop must not leave them.
    pub(super) fn has_old_chains(&self) -> bool {
        !self.again.is_empty()
    }

    /// Where the queue stands: what `GET_VRING_BASE` answers.
    pub(super) fn next_available(&self) -> u16 {
        self.next_available
    }

    /// The descriptors of a chain.
    #[inline]
    pub(super) fn chain<'a>(&'a self, head: u16, map: &'a HeldMap) -> Chain<'a> {
        Chain::new(self, head, map)
    }

    /// The descriptors of a chain that has three of them, in the ring or in one indirect table. `None`
    /// for any other, also for a broken one.
    #[inline(always)]
    pub(super) fn three(&self, head: u16, map: &HeldMap) -> Option<[Descriptor; 3]> {
        let mut table = self.memory.descriptors;
        let mut count = u32::from(self.options.size);
        // SAFETY: whoever calls it names a table of `count` descriptors, mapped and aligned, and an
        // index below that.
        let read = |table: *const u8, index: u16| unsafe { descriptor_at(table, index) };
        if u32::from(head) >= count {
            return None;
        }
        let mut first = read(table, head);
        if first.flags & FLAG_INDIRECT != 0 {
            let at = self.indirect(first).and_then(|_| {
                let len_bytes = u64::from(first.len_bytes);
                let at = map.guest(Purpose::Control, first.address, len_bytes)?;
                at.cast::<u64>().is_aligned().then_some(at)
            });
            (table, count) = (at?.as_ptr(), first.len_bytes / 16);
            first = read(table, 0);
        }
        let goes_on = |descriptor: Descriptor| {
            descriptor.flags & (FLAG_NEXT | FLAG_INDIRECT) == FLAG_NEXT
                && u32::from(descriptor.next) < count
        };
        if !goes_on(first) {
            return None;
        }
        let second = read(table, first.next);
        if !goes_on(second) {
            return None;
        }
        let third = read(table, second.next);
        (third.flags & (FLAG_NEXT | FLAG_INDIRECT) == 0).then_some([first, second, third])
    }

    /// How many descriptors the indirect table has that a descriptor names; `None` when it may not.
    fn indirect(&self, descriptor: Descriptor) -> Option<u32> {
        let count = descriptor.len_bytes / 16;
        let fits = self.options.indirect
            && descriptor.flags & FLAG_NEXT == 0
            && descriptor.len_bytes.is_multiple_of(16)
            && (1..=MAX_INDIRECT.max(u32::from(self.options.size))).contains(&count)
            && (descriptor.address)
                .checked_add(u64::from(descriptor.len_bytes))
                .is_some();
        fits.then_some(count)
    }

    /// Returns a chain to the driver, who sees it after [`publish`](Self::publish) at the latest.
    pub(super) fn push_used(&mut self, head: u16, written_bytes: u32) {
        if let Some(inflight) = &mut self.inflight {
            inflight.put_back(head);
        }
        let entry = 2 + 4 * (usize::from(self.next_used) & self.index_mask);
        // Two u16 words hold a u32.
        let entry = self.memory.used.wrapping_add(entry).cast::<u32>();
        // SAFETY: `translate` checked that the whole used ring is mapped and aligned; the owner of
        // the queue keeps the map.
        unsafe {
            entry.write_volatile(u32::from(head).to_le());
            entry.wrapping_add(1).write_volatile(written_bytes.to_le());
        }
        if self.inflight.is_some() {
            crash::request_point("answer-written");
        }
        self.next_used = self.next_used.wrapping_add(1);
        if self.next_used.wrapping_sub(self.shown_used) >= SHOW_EVERY {
            self.show();
        }
    }

    /// Whether [`publish`](Self::publish) has something to do.
    pub(super) fn has_unpublished(&self) -> bool {
        self.next_used != self.published_used
    }

    /// Shows the driver what was returned, without a thought for notifications: to be called in
    /// between, so that a driver that looks can go on.
    pub(super) fn show(&mut self) {
        self.shown_used = self.next_used;
        self.used_word(1)
            .store(self.next_used.to_le(), Ordering::Release);
        if let Some(inflight) = &mut self.inflight {
            crash::request_point("answers-shown");
            inflight.shown(self.next_used);
        }
    }

    /// Shows the driver what was returned. Says whether it wants to be notified of that, or of what
    /// it was [shown](Self::show) since the last time.
    pub(super) fn publish(&mut self) -> bool {
        if self.shown_used != self.next_used {
            self.show();
        }
        let old = self.published_used;
        let new = self.next_used;
        self.published_used = new;
        // The driver stores its event index and then reads ours; we do the reverse (2.7.10).
        fence(Ordering::SeqCst);
        if self.options.event_index {
            let word = 2 + usize::from(self.options.size);
            let event = u16::from_le(self.available_word(word).load(Ordering::Relaxed));
            let first = !std::mem::replace(&mut self.notified, true);
            return first || crossed(event, new, old);
        }
        let flags = u16::from_le(self.available_word(0).load(Ordering::Relaxed));
        flags & AVAIL_NO_INTERRUPT == 0
    }

    /// Asks for a kick at the next chain. Returns whether one is there already, in which case no
    /// kick may come for it.
    #[must_use]
    pub(super) fn enable_kicks(&mut self) -> bool {
        if self.options.event_index {
            let word = 2 + 4 * usize::from(self.options.size);
            self.used_word(word)
                .store(self.next_available.to_le(), Ordering::Relaxed);
        } else {
            self.used_word(0).store(0, Ordering::Relaxed);
        }
        // The driver stores its index and then reads whether to kick; we do the reverse.
        fence(Ordering::SeqCst);
        u16::from_le(self.available_word(1).load(Ordering::Acquire)) != self.next_available
    }

    /// Asks for no kicks while the queue is being worked on.
    pub(super) fn disable_kicks(&mut self) {
        // With event index a kick comes only for the index last asked for.
        if !self.options.event_index {
            self.used_word(0)
                .store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// From now on used entries are to be marked: those of this round too.
    pub(super) fn start_logging(&mut self) {
        self.logged_used = self.published_used;
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

    fn available_word(&self, word: usize) -> &AtomicU16 {
        // SAFETY: `translate` checked that all words of the ring are mapped and aligned; the owner
        // of the queue keeps the map, and the client's own accesses are atomic or its own problem.
        unsafe { AtomicU16::from_ptr(self.memory.available.wrapping_add(word)) }
    }

    fn used_word(&self, word: usize) -> &AtomicU16 {
        // SAFETY: as for `available_word`.
        unsafe { AtomicU16::from_ptr(self.memory.used.wrapping_add(word)) }
    }
}

/// Asks the processor for the cache line of `at`, which need not be mapped.
#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; it has no effect on what the program sees, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Whether `event` was passed on the way from `old` to `new` (2.7.10.1), with wrap-around.
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn translate(size: u16, addresses: RingAddresses, map: &MemoryMap) -> Result<Pointers, RingError> {
    let part = |address: u64, len_bytes: u64, align: usize| {
        let at = map.user(address, len_bytes).ok_or(RingError::Address)?;
        // The parts are aligned in the guest (2.7); a region mapped askew must not break that.
        if (at as usize).is_multiple_of(align) {
            Ok(at)
        } else {
            Err(RingError::Address)
        }
    };
    let used_bytes = used_ring_bytes(size);
    let size = u64::from(size);
    Ok(Pointers {
        descriptors: part(addresses.descriptors, DESCRIPTOR_BYTES * size, 16)?,
        available: part(addresses.available, 6 + 2 * size, 2)?.cast(),
        used: part(addresses.used, used_bytes, 4)?.cast(),
    })
}

/// Bytes of the used ring of a queue.
pub(super) fn used_ring_bytes(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

#[cfg(test)]
#[path = "virtqueue_tests.rs"]
mod tests;
