//! How the two sides of a ring tell each other of progress, and how neither misses it
//! (virtio 1.3, 2.7.6 to 2.7.10).
//!
//! No notification is lost, because each side first stores, then executes a full fence, then loads the other's
//! word:
//!
//! ```text
//! after progress:    store own index;       full fence; load whether the other side wants a notification
//! before a sleep:    store the wish for one; full fence; load the other side's index
//! ```
//!
//! At least one of the two loads sees the other side's store.
//!
//! The steps are generic over the words they work on: the queue's are in memory shared with the driver, and
//! those of the model in `notify_tests.rs` are loom's.

use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release, SeqCst};

/// `VIRTQ_USED_F_NO_NOTIFY`.
pub(super) const USED_NO_NOTIFY: u16 = 1;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
pub(super) const AVAIL_NO_INTERRUPT: u16 = 1;

/// The words of a ring that notifications depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// The driver's: [`AVAIL_NO_INTERRUPT`].
    AvailableFlags,
    /// The driver's: chains made available so far.
    AvailableIndex,
    /// The driver's: notify when this entry is used.
    UsedEvent,
    /// The device's: [`USED_NO_NOTIFY`].
    UsedFlags,
    /// The device's: chains used so far.
    UsedIndex,
    /// The device's: kick when this chain is available.
    AvailableEvent,
}

/// Access to the words of a ring.
pub(super) trait Words {
    /// Loads a word of the driver's.
    fn load(&self, word: Word, order: Ordering) -> u16;
    /// Stores a word of the device's.
    fn store(&self, word: Word, value: u16, order: Ordering);
    /// Orders the accesses before it and those after it.
    fn fence(&self, order: Ordering);
}

/// The driver's index. The entries before it are there to be read.
#[inline(always)]
pub(super) fn available_index(words: &impl Words) -> u16 {
    words.load(Word::AvailableIndex, Acquire)
}

/// Whether the driver's index is another than `seen`.
#[inline(always)]
pub(super) fn has_moved(words: &impl Words, seen: u16) -> bool {
    words.load(Word::AvailableIndex, Relaxed) != seen
}

/// Publishes the entries before `used`, without notifying.
#[inline(always)]
pub(super) fn publish(words: &impl Words, used: u16) {
    words.store(Word::UsedIndex, used, Release);
}

/// Whether the driver wants a notification of what was published: the entries from `old` to `new`.
#[inline(always)]
pub(super) fn wants_notification(
    words: &impl Words,
    event_index: bool,
    old: u16,
    new: u16,
) -> bool {
    words.fence(SeqCst);
    if event_index {
        crossed(words.load(Word::UsedEvent, Relaxed), new, old)
    } else {
        words.load(Word::AvailableFlags, Relaxed) & AVAIL_NO_INTERRUPT == 0
    }
}

/// Asks for a kick at the chain `next`. Returns whether it is available already, in which case no kick may come
/// for it.
#[inline(always)]
pub(super) fn enable_kicks(words: &impl Words, event_index: bool, next: u16) -> bool {
    if event_index {
        words.store(Word::AvailableEvent, next, Relaxed);
    } else {
        words.store(Word::UsedFlags, 0, Relaxed);
    }
    words.fence(SeqCst);
    has_moved(words, next)
}

/// Asks for no kicks while the queue is being worked on.
#[inline(always)]
pub(super) fn disable_kicks(words: &impl Words, event_index: bool) {
    // With event index a kick comes only for the index last asked for.
    if !event_index {
        words.store(Word::UsedFlags, USED_NO_NOTIFY, Relaxed);
    }
}

/// Whether `event` was passed on the way from `old` to `new` (2.7.10.1), with wrap-around.
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "notify_tests.rs"]
mod tests;
