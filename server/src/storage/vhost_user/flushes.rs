//! Which writes a flush has to answer for.
//!
//! A server with a write-back cache may keep what it has answered in its own memory (`qemu-storage-daemon` on qcow2 does).
//! When it goes away with writes that no flush came after, its successor cannot make them durable, so a flush must not
//! say that they are.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The account of answered writes, of all virtqueues.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    /// Writes that the server has answered.
    answered: AtomicU64,
    /// How many of them have been flushed.
    flushed: AtomicU64,
    /// Whether the next flush fails.
    is_lost: AtomicBool,
}

impl Flushes {
    /// The server has answered a write, discard or write-zeroes.
    pub(super) fn answered(&self) {
        self.answered.fetch_add(1, Ordering::AcqRel);
    }

    /// The server gets a flush. Returns what it covers.
    pub(super) fn begin(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    /// The server has done a flush that covers this.
    pub(super) fn ended(&self, covered: u64) {
        self.flushed.fetch_max(covered, Ordering::AcqRel);
    }

    /// The server had flushed all that it had answered, and is gone.
    pub(super) fn all_flushed(&self) {
        let answered = self.answered.load(Ordering::Acquire);
        self.flushed.store(answered, Ordering::Release);
    }

    /// The server is gone, and no virtqueue counts for it any more. Returns how many answered writes it may have lost: if
    /// there are any, the next flush fails.
    pub(super) fn lost(&self) -> u64 {
        let answered = self.answered.load(Ordering::Acquire);
        let lost = answered.saturating_sub(self.flushed.swap(answered, Ordering::AcqRel));
        if lost > 0 {
            self.is_lost.store(true, Ordering::Release);
        }
        lost
    }

    /// Flushes have failed because of that.
    pub(super) fn told(&self) {
        self.is_lost.store(false, Ordering::Release);
    }

    /// Whether a flush has to fail, which none after it has to for the same loss.
    pub(super) fn take_loss(&self) -> bool {
        self.is_lost.load(Ordering::Acquire) && self.is_lost.swap(false, Ordering::AcqRel)
    }
}
