//! Lines of the log that come again and again: the first few of a kind in an interval, then how many more there were.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the same is logged again.
const INTERVAL: Duration = Duration::from_secs(10);

/// Kinds that are told apart; what clients cause has no limit.
const MAX_KINDS: usize = 64;

/// The lines of one source, by kind.
#[derive(Debug)]
pub struct Repeats {
    /// Lines of a kind in an interval.
    each: u32,
    kinds: Mutex<BTreeMap<String, Kind>>,
}

#[derive(Debug)]
struct Kind {
    since: Instant,
    logged: u32,
    omitted: u64,
}

/// How many lines of a kind were not logged before this one; empty as text if there were none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Omitted(u64);

impl fmt::Display for Omitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            more => write!(f, " ({more} more like it before)"),
        }
    }
}

impl Repeats {
    /// Lets pass `each` lines of each kind in ten seconds.
    #[must_use]
    pub const fn new(each: u32) -> Self {
        Self {
            each,
            kinds: Mutex::new(BTreeMap::new()),
        }
    }

    /// If a line of this kind is to be logged now, what is to be said of those that were not.
    pub fn due(&self, kind: &str) -> Option<Omitted> {
        self.due_at(kind, Instant::now())
    }

    /// [`due`](Self::due) for a kind that has numbers in it, any numbers.
    pub fn due_whatever_numbers(&self, kind: &str) -> Option<Omitted> {
        self.due(&kind.replace(|letter: char| letter.is_ascii_hexdigit(), ""))
    }

    fn due_at(&self, kind: &str, now: Instant) -> Option<Omitted> {
        // Each entry is whole after any panic.
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        if !kinds.contains_key(kind) {
            let is_over = |kind: &Kind| now.duration_since(kind.since) >= INTERVAL;
            if kinds.len() >= MAX_KINDS {
                kinds.retain(|_, kind| !is_over(kind));
            }
            if kinds.len() >= MAX_KINDS {
                return None;
            }
        }
        let entry = kinds.entry(kind.to_owned()).or_insert(Kind {
            since: now,
            logged: 0,
            omitted: 0,
        });
        if now.duration_since(entry.since) >= INTERVAL {
            (entry.since, entry.logged) = (now, 0);
        }
        if entry.logged >= self.each {
            entry.omitted += 1;
            return None;
        }
        entry.logged += 1;
        Some(Omitted(std::mem::take(&mut entry.omitted)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_logged_a_few_times_in_an_interval_and_then_with_how_many_there_were() {
        let repeats = Repeats::new(2);
        let start = Instant::now();
        let due = |kind, at| repeats.due_at(kind, at).map(|omitted| omitted.0);
        assert_eq!(due("a", start), Some(0));
        assert_eq!(due("a", start), Some(0));
        assert_eq!(due("a", start), None);
        assert_eq!(due("b", start), Some(0), "another kind");
        assert_eq!(due("a", start + INTERVAL / 2), None);
        assert_eq!(due("a", start + INTERVAL), Some(2));
        assert_eq!(due("a", start + INTERVAL), Some(0));
        assert_eq!(due("a", start + INTERVAL), None);
    }

    #[test]
    fn the_number_of_kinds_is_limited() {
        let repeats = Repeats::new(1);
        let start = Instant::now();
        let due = |number: usize, at| repeats.due_at(&number.to_string(), at).is_some();
        assert!((0..MAX_KINDS).all(|number| due(number, start)));
        assert!(!due(MAX_KINDS, start));
        assert!(due(MAX_KINDS, start + INTERVAL), "the others are over");
    }

    #[test]
    fn numbers_make_no_kind_of_their_own() {
        let repeats = Repeats::new(1);
        let due = |kind| repeats.due_whatever_numbers(kind).is_some();
        assert!(due("number 17 is unknown"));
        assert!(!due("number 18 is unknown"));
        assert!(due("flags 0x18 are wrong"));
        assert!(!due("flags 0xff are wrong"));
    }
}
