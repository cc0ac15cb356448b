//! Whether a thread that has nothing to do looks for work, or sleeps until it is woken.
//!
//! A wake-up costs the client a system call and both sides the way through the scheduler: some
//! microseconds on bare metal, tens of them on a virtual machine. Whoever looks for work all the
//! time answers at once and needs no notification, and pays with a processor. The adaptive way looks
//! only where the work that came of late came soon enough.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// What a thread does when it has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// Sleeps.
    Never,
    /// Looks for work for as long as this at most, where that has paid off lately; then sleeps.
    Adaptive(Duration),
    /// Looks for work, and never sleeps.
    Always,
}

/// Longest `--poll-us` that is accepted. Beyond it a wake-up is not worth mentioning.
const MAX_POLL_US: u32 = 1_000_000;

/// The longest time that an idle thread looks for work when nobody says: two wake-ups on a virtual
/// machine, so that a client that sleeps at depth 1 finds the thread awake (docs/benchmarks.md).
const DEFAULT_POLL_US: u32 = 100;

impl Default for Polling {
    fn default() -> Self {
        Self::Adaptive(Duration::from_micros(DEFAULT_POLL_US.into()))
    }
}

/// Why a text says nothing about polling.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is neither a number of microseconds (0 to {MAX_POLL_US}) nor 'always'")]
pub struct BadPolling(String);

impl FromStr for Polling {
    type Err = BadPolling;

    fn from_str(text: &str) -> Result<Self, BadPolling> {
        if text == "always" {
            return Ok(Self::Always);
        }
        match text.parse::<u32>() {
            Ok(0) => Ok(Self::Never),
            Ok(longest @ ..=MAX_POLL_US) => {
                Ok(Self::Adaptive(Duration::from_micros(longest.into())))
            }
            _ => Err(BadPolling(text.to_owned())),
        }
    }
}

impl fmt::Display for Polling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("0"),
            Self::Adaptive(longest) => write!(f, "{}", longest.as_micros()),
            Self::Always => f.write_str("always"),
        }
    }
}

impl<'de> serde::Deserialize<'de> for Polling {
    /// A number of microseconds, or a text like on the command line.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged, expecting = "a number of microseconds or \"always\"")]
        enum Either {
            Number(u32),
            Text(String),
        }
        let text = match Either::deserialize(deserializer)? {
            Either::Number(number) => number.to_string(),
            Either::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Confidence that looking pays off: what it is at most, and from where on it is acted upon.
const SURE: u8 = 8;
const LIKELY: u8 = 4;

/// What one late arrival costs of it.
const DOUBT: u8 = 2;

/// Requests under way up to which an adaptive thread looks. With more of them nobody waits for this
/// thread alone, and a nap collects several completions for one wake-up.
const FEW: usize = 1;

/// Decides for one thread; learns from how long it was idle each time.
#[derive(Debug)]
pub(crate) struct Poller {
    polling: Polling,
    idle_since: Option<Instant>,
    confidence: u8,
}

impl Poller {
    pub(crate) fn new(polling: Polling) -> Self {
        // SAFETY: asks for a number. Not for those that this thread may use: a client has others.
        let alone = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) } == 1;
        Self {
            // Whoever has the only processor keeps away what it looks for.
            polling: match polling {
                Polling::Adaptive(_) if alone => Polling::Never,
                other => other,
            },
            idle_since: None,
            confidence: 0,
        }
    }

    /// There was work.
    pub(crate) fn worked(&mut self) {
        if let Some(since) = self.idle_since.take() {
            self.learn(since.elapsed());
        }
    }

    fn learn(&mut self, idle: Duration) {
        let Polling::Adaptive(longest) = self.polling else {
            return;
        };
        self.confidence = if idle <= longest {
            SURE.min(self.confidence + 1)
        } else {
            self.confidence.saturating_sub(DOUBT)
        };
    }

    /// There is nothing to do, and `under_way` requests are with the storage: until when to look for
    /// work.
    pub(crate) fn look(&mut self, under_way: usize) -> Look {
        match self.polling {
            Polling::Never => Look::Sleep,
            Polling::Always => Look::ForEver,
            Polling::Adaptive(longest) => {
                let since = *self.idle_since.get_or_insert_with(Instant::now);
                if self.confidence < LIKELY || under_way > FEW {
                    Look::Sleep
                } else {
                    Look::Until(since + longest)
                }
            }
        }
    }

    /// Somebody else needed the processor while this thread was looking.
    pub(crate) fn was_interrupted(&mut self) {
        self.confidence = 0;
    }
}

/// What an idle thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    Sleep,
    Until(Instant),
    ForEver,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(100);
    const SOON: Duration = Duration::from_micros(99);
    const LATE: Duration = Duration::from_micros(101);

    fn poller(polling: Polling) -> Poller {
        Poller {
            polling,
            idle_since: None,
            confidence: 0,
        }
    }

    fn looks(poller: &mut Poller, under_way: usize) -> bool {
        poller.look(under_way) != Look::Sleep
    }

    #[test]
    fn what_people_write_is_understood_and_written_back() {
        for text in ["0", "1", "1000000", "always"] {
            assert_eq!(text.parse::<Polling>().unwrap().to_string(), text);
        }
        for text in ["", "-1", "1000001", "Always", "1.5"] {
            assert!(text.parse::<Polling>().is_err(), "{text}");
        }
        assert_eq!("0".parse(), Ok(Polling::Never));
    }

    #[test]
    fn a_thread_looks_once_work_came_soon_several_times_and_stops_when_it_comes_late() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        assert!(!looks(&mut poller, 0));
        for _ in 0..LIKELY {
            assert!(!looks(&mut poller, 0));
            poller.learn(SOON);
        }
        assert!(looks(&mut poller, 0));
        for _ in 0..100 {
            poller.learn(SOON);
        }
        // However sure it was: the core is given back after a few times in vain.
        for _ in 0..(SURE - LIKELY) / DOUBT + 1 {
            assert!(looks(&mut poller, 0));
            poller.learn(LATE);
        }
        assert!(!looks(&mut poller, 0));
    }

    #[test]
    fn work_that_comes_late_as_often_as_soon_is_slept_for() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        for _ in 0..100 {
            poller.learn(SOON);
            poller.learn(LATE);
            assert!(!looks(&mut poller, 0));
        }
    }

    #[test]
    fn a_thread_sleeps_while_the_storage_has_much_to_do() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        (0..SURE).for_each(|_| poller.learn(SOON));
        assert!(looks(&mut poller, FEW));
        assert!(!looks(&mut poller, FEW + 1));
    }

    #[test]
    fn a_thread_whose_processor_others_need_begins_anew() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        (0..SURE).for_each(|_| poller.learn(SOON));
        poller.was_interrupted();
        assert!(!looks(&mut poller, 0));
    }

    #[test]
    fn the_time_without_work_counts_from_its_beginning_whatever_happens_in_between() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        (0..SURE).for_each(|_| poller.learn(SOON));
        let first = poller.look(0);
        assert_eq!(poller.look(0), first);
        std::thread::sleep(LATE);
        poller.worked();
        assert_eq!(poller.confidence, SURE - DOUBT);
        poller.worked();
        assert_eq!(
            poller.confidence,
            SURE - DOUBT,
            "there was no time without work"
        );
        assert_ne!(poller.look(0), first);
    }

    #[test]
    fn never_and_always_learn_nothing() {
        let mut never = poller(Polling::Never);
        let mut always = poller(Polling::Always);
        for poller in [&mut never, &mut always] {
            (0..SURE).for_each(|_| poller.learn(SOON));
        }
        assert_eq!(never.look(0), Look::Sleep);
        assert_eq!(always.look(1000), Look::ForEver);
    }
}
