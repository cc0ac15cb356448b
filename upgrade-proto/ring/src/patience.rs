//! How an end waits before it sleeps, and how soon it asks to be woken.

use crate::counters::Counters;

/// Looks at the peer's position before going to sleep, at most.
const SPIN_MAX: u32 = 2_000;
const SPIN_MIN: u32 = 20;

/// On one processor: times it lets others run before going to sleep. A peer that need not wake us fills or
/// empties the ring meanwhile; woken for each record, we would take turns with it.
const YIELDS_MAX: u32 = 4;

/// After so many sleeps it looks that long again: the peer may be quicker now.
const SLEEPS_PER_TRY: u32 = 32;

/// How often a consumer that is woken at once tries what it is like to be woken late: after so many
/// sleeps, twice as many each time it did not pay.
const PAUSE_MIN: u32 = 8;
const PAUSE_MAX: u32 = 4096;

/// Whether there is only one processor for this thread: the peer cannot move while we look.
pub(crate) fn is_alone() -> bool {
    std::thread::available_parallelism().map_or(1, usize::from) == 1
}

/// How long this end looks before it sleeps: longer when that helped, shorter when it did not.
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

    /// Looks for a while; whether something moved.
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

/// Whether a consumer asks to be woken late. A producer that is in full flight is held up by each wake-up,
/// and a quick consumer sleeps again after each record. Left alone the producer fills much of the ring. But
/// one that has no more to say for now must not be waited for: so it is tried, and kept while the producer
/// did fill the ring before the sleeper looked by itself.
#[derive(Debug)]
pub(crate) struct Lateness {
    is_on: bool,
    /// It paid the last time.
    pays: bool,
    /// Sleeps until the next try.
    left: u32,
    pause: u32,
}

impl Lateness {
    pub(crate) fn new(is_on: bool) -> Self {
        Self {
            is_on,
            pays: false,
            left: PAUSE_MIN,
            pause: PAUSE_MIN,
        }
    }

    /// Whether the next sleep is to be a late one. If so, [`Lateness::learn`] follows, if there is anything
    /// to be learned.
    pub(crate) fn is_due(&mut self) -> bool {
        if !self.is_on {
            return false;
        }
        self.left = self.left.saturating_sub(1);
        self.pays || self.left == 0
    }

    /// What came of it.
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
mod tests {
    use super::*;

    /// Of so many sleeps, how many are late ones if each of those pays or does not.
    fn late(lateness: &mut Lateness, sleeps: usize, pays: bool) -> usize {
        let mut count = 0;
        for _ in 0..sleeps {
            if lateness.is_due() {
                lateness.learn(pays);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn who_talks_in_turns_is_hardly_ever_woken_late() {
        let mut lateness = Lateness::new(true);
        let first = late(&mut lateness, 10_000, false);
        assert!((2..=12).contains(&first), "{first}");
        let later = late(&mut lateness, 100_000, false);
        assert!((10..=30).contains(&later), "{later}");
    }

    #[test]
    fn a_stream_is_woken_late_from_early_on_and_until_it_ends() {
        let mut lateness = Lateness::new(true);
        assert!(late(&mut lateness, 1000, true) > 980);
        assert!(late(&mut lateness, 100, false) < 5);
        // A stream that comes later is found, too.
        late(&mut lateness, 10_000, false);
        assert!(late(&mut lateness, 20_000, true) > 10_000);
    }

    #[test]
    fn an_end_that_never_tries_is_never_woken_late() {
        assert_eq!(late(&mut Lateness::new(false), 100_000, true), 0);
    }

    #[test]
    fn looking_helps_more_when_it_helped() {
        let mut counters = Counters::default();
        let mut spin = Spin::new(true, false);
        for _ in 0..20 {
            assert!(!spin.until(|| false, &mut counters));
        }
        assert_eq!(spin.limit, SPIN_MIN);
        for _ in 0..20 {
            assert!(spin.until(|| true, &mut counters));
        }
        assert_eq!((spin.limit, counters.system_calls), (SPIN_MAX, 0));
        let mut yields = Spin::new(true, true);
        assert!(!yields.until(|| false, &mut counters));
        assert_eq!(counters.system_calls, u64::from(YIELDS_MAX));
        assert!(Spin::new(false, true).until(|| true, &mut counters));
    }
}
