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

/// Whether the next end of the connection loses what was answered and not flushed, when that is not known at once: the server is
/// ended on purpose, and whether it has flushed is said later, by another thread.
#[derive(Debug, Default)]
pub(super) struct Pause {
    state: State,
    /// The connection has ended, and whether that has lost something is not settled.
    is_unsettled: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    None,
    /// The server is being ended.
    Begun,
    /// It had flushed all that it had answered, and has taken no request since.
    Flushed,
}

/// What is known of answered writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing yet, or nothing new.
    Nothing,
    /// Those that no flush came after may be lost.
    Lost,
    /// All are flushed.
    Flushed,
}

impl Pause {
    /// The server is about to be ended. False if it is already.
    pub(super) fn begin(&mut self) -> bool {
        let is_new = !self.is_begun();
        if is_new {
            self.state = State::Begun;
        }
        is_new
    }

    /// Whether it has begun and not ended.
    pub(super) fn is_begun(&self) -> bool {
        self.state != State::None
    }

    /// Who has begun it says whether the server has flushed.
    pub(super) fn settle(&mut self, is_flushed: bool) -> Known {
        if self.state != State::Begun {
            // There was another connection meanwhile, which has seen to it.
            return Known::Nothing;
        }
        self.state = match is_flushed {
            true => State::Flushed,
            false => State::None,
        };
        match !is_flushed && std::mem::take(&mut self.is_unsettled) {
            true => Known::Lost,
            false => Known::Nothing,
        }
    }

    /// The connection has ended.
    pub(super) fn disconnected(&mut self) -> Known {
        self.is_unsettled = self.is_begun();
        match self.is_unsettled {
            true => Known::Nothing,
            false => Known::Lost,
        }
    }

    /// There is another connection.
    pub(super) fn end(&mut self) -> Known {
        let Self {
            state,
            is_unsettled,
        } = std::mem::take(self);
        match (state, is_unsettled) {
            (State::Flushed, _) => Known::Flushed,
            (State::Begun, true) => Known::Lost,
            _ => Known::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_told_once_whichever_thread_is_first() {
        let begun = || {
            let mut pause = Pause::default();
            assert!(pause.begin() && !pause.begin());
            pause
        };
        // The connection ends before it is said that nothing was flushed, or after it, or there is another one first.
        let mut pause = begun();
        assert_eq!(pause.disconnected(), Known::Nothing);
        assert_eq!(pause.settle(false), Known::Lost);
        assert_eq!(pause.end(), Known::Nothing);
        let mut pause = begun();
        assert_eq!(pause.settle(false), Known::Nothing);
        assert_eq!(pause.disconnected(), Known::Lost);
        assert_eq!(pause.end(), Known::Nothing);
        let mut pause = begun();
        assert_eq!(pause.disconnected(), Known::Nothing);
        assert_eq!(pause.end(), Known::Lost);
        assert_eq!(pause.settle(false), Known::Nothing);
    }

    #[test]
    fn what_was_flushed_is_no_loss() {
        for is_settled_first in [true, false] {
            let mut pause = Pause::default();
            assert!(pause.begin());
            if is_settled_first {
                assert_eq!(pause.settle(true), Known::Nothing);
            }
            assert_eq!(pause.disconnected(), Known::Nothing);
            if !is_settled_first {
                assert_eq!(pause.settle(true), Known::Nothing);
            }
            assert!(!pause.begin(), "it has not ended");
            assert_eq!(pause.end(), Known::Flushed);
            assert_eq!(pause.disconnected(), Known::Lost, "the next one is as ever");
        }
    }
}
