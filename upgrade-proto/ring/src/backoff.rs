//! How long an end polls before it sleeps, and when it asks for a coalesced wake-up.

use crate::counters::Counters;

/// Loads of the peer's position before a sleep: at most, and at least.
const SPIN_MAX: u32 = 2_000;
const SPIN_MIN: u32 = 20;

/// Yields before a sleep on a single processor, at most. Meanwhile the peer fills or empties the ring without
/// having to wake this end; woken for each record, the two would switch for each record.
const YIELDS_MAX: u32 = 4;

/// After so many sleeps the spin has its full length again: the peer may be faster now.
const SLEEPS_PER_TRY: u32 = 32;

/// Sleeps between two tries of a coalesced wake-up: at first, and at most. Doubled when a try did not pay.
const PAUSE_MIN: u32 = 8;
const PAUSE_MAX: u32 = 4096;

/// Whether this thread has a single processor, so that the peer cannot run while it spins.
pub(crate) fn is_alone() -> bool {
    std::thread::available_parallelism().map_or(1, usize::from) == 1
}

/// An adaptive spin before a sleep: longer when the last one helped, shorter when it did not.
#[derive(Debug)]
pub(crate) struct Spin {
    alone: bool,
    limit: u32,
    max: u32,
    sleeps: u32,
}

impl Spin {
    pub(crate) fn new(allowed: bool, alone: bool) -> Self {
        let max = match (allowed, alone) {
            (false, _) => 0,
            (true, true) => YIELDS_MAX,
            (true, false) => SPIN_MAX,
        };
        Self {
            alone,
            limit: max,
            max,
            sleeps: 0,
        }
    }

    /// Polls `moved` for a while; whether it came true.
    pub(crate) fn until(&mut self, moved: impl Fn() -> bool, counters: &mut Counters) -> bool {
        for _ in 0..self.limit {
            if moved() {
                self.limit = (self.limit * 2).min(self.max);
                return true;
            }
            match self.alone {
                true => {
                    counters.system_calls += 1;
                    rustix::thread::sched_yield();
                }
                false => std::hint::spin_loop(),
            }
        }
        self.sleeps = self.sleeps.wrapping_add(1);
        let least = if self.alone { 1 } else { SPIN_MIN };
        self.limit = match self.sleeps.is_multiple_of(SLEEPS_PER_TRY) {
            true => self.max,
            false => (self.limit / 2).max(least).min(self.max),
        };
        moved()
    }
}

/// Whether a consumer asks for a coalesced wake-up. Each wake-up holds a producer of a stream up, and a fast
/// consumer sleeps again after each record; with fewer wake-ups the producer fills much of the ring. But in a
/// ping-pong the consumer would wait for its timeout. So it is tried, and kept while the ring was filled up to
/// the mark before the timeout.
#[derive(Debug)]
pub(crate) struct Coalescing {
    is_on: bool,
    /// The last try paid.
    pays: bool,
    /// Sleeps until the next try.
    left: u32,
    pause: u32,
}

impl Coalescing {
    pub(crate) fn new(is_on: bool) -> Self {
        Self {
            is_on,
            pays: false,
            left: PAUSE_MIN,
            pause: PAUSE_MIN,
        }
    }

    /// Whether the next sleep is a coalesced one. [`Coalescing::learn`] follows, if it showed anything.
    pub(crate) fn is_due(&mut self) -> bool {
        if !self.is_on {
            return false;
        }
        self.left = self.left.saturating_sub(1);
        self.pays || self.left == 0
    }

    /// Takes the result of a coalesced sleep.
    pub(crate) fn learn(&mut self, pays: bool) {
        self.pays = pays;
        self.pause = match pays {
            true => PAUSE_MIN,
            false => (self.pause * 2).min(PAUSE_MAX),
        };
        self.left = self.pause;
    }
}

#[cfg(test)]
mod tests;
