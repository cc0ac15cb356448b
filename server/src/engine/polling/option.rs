//! The option `--poll-us`.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// What an idle queue thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// Sleep at once.
    Never,
    /// Poll for at most this long where polling has paid off lately, then sleep.
    Adaptive(Duration),
    /// Poll and never sleep.
    Always,
}

/// Longest `--poll-us` that is accepted: beyond it the cost of a wake-up does not matter.
const MAX_POLL_US: u32 = 1_000_000;

/// Default `--poll-us`: two wake-ups on a virtual machine, so that a client that sleeps at depth 1
/// finds the thread awake (docs/decisions.md).
const DEFAULT_POLL_US: u32 = 100;

impl Default for Polling {
    fn default() -> Self {
        Self::Adaptive(Duration::from_micros(DEFAULT_POLL_US.into()))
    }
}

/// A string that is not a polling time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("give a number of microseconds (0 to {MAX_POLL_US}) or 'always'")]
pub struct BadPolling;

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
            _ => Err(BadPolling),
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

serialize_as_text!(Polling);

/// What the queue threads of an export do, which can change while they run.
#[derive(Debug)]
pub struct SharedPolling(AtomicU32);

/// [`Polling::Always`] as a number; the others are their time in microseconds.
const ALWAYS: u32 = u32::MAX;

impl SharedPolling {
    /// Changes it. A queue thread follows when it has nothing to do the next time.
    pub fn set(&self, polling: Polling) {
        // Nothing else changes with it.
        self.0.store(to_number(polling), Ordering::Relaxed);
    }

    /// What it is now.
    #[must_use]
    pub fn get(&self) -> Polling {
        match self.0.load(Ordering::Relaxed) {
            0 => Polling::Never,
            ALWAYS => Polling::Always,
            longest => Polling::Adaptive(Duration::from_micros(longest.into())),
        }
    }
}

fn to_number(polling: Polling) -> u32 {
    match polling {
        Polling::Never => 0,
        Polling::Always => ALWAYS,
        Polling::Adaptive(longest) => {
            u32::try_from(longest.as_micros()).map_or(MAX_POLL_US, |us| us.clamp(1, MAX_POLL_US))
        }
    }
}

impl PartialEq for SharedPolling {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for SharedPolling {}

impl From<Polling> for SharedPolling {
    fn from(polling: Polling) -> Self {
        Self(AtomicU32::new(to_number(polling)))
    }
}

impl Default for SharedPolling {
    fn default() -> Self {
        Polling::default().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_polling_time_is_parsed_and_printed_as_it_was_written() {
        for text in ["0", "1", "1000000", "always"] {
            let polling = text.parse::<Polling>().unwrap();
            assert_eq!(polling.to_string(), text);
            assert_eq!(SharedPolling::from(polling).get(), polling);
        }
        for text in ["", "-1", "1000001", "Always", "1.5"] {
            assert!(text.parse::<Polling>().is_err(), "{text}");
        }
        assert_eq!("0".parse(), Ok(Polling::Never));
    }
}
