//! What became of requests that the storage failed: a line in the log, and the last one for `stat`.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::request::{Op, Request};

/// How often failures of one operation with one error are logged.
const INTERVAL: Duration = Duration::from_secs(10);

/// The failures of a disk.
#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    last: Option<String>,
    /// For each operation and error: when it was logged, and how often it came since.
    kinds: BTreeMap<(&'static str, i32), (Instant, u64)>,
}

impl Failures {
    /// Notes that a request failed with `errno`, and logs it, unless the same came lately.
    #[cold]
    pub(super) fn note(&self, path: &Path, request: &Request, errno: i32) {
        let op = name(request.op());
        let text = format!(
            "{}: {op} of {} bytes at {} failed: {}",
            path.display(),
            request.len_bytes(),
            request.offset_bytes(),
            io::Error::from_raw_os_error(errno)
        );
        match self.inner().since_logged((op, errno), Instant::now()) {
            Some(0) => tracing::error!("{text}"),
            Some(more) => tracing::error!("{text} ({more} more like it before)"),
            None => {}
        }
        self.inner().last = Some(text);
    }

    /// The last one.
    pub(super) fn last(&self) -> Option<String> {
        self.inner().last.clone()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A text and a table of numbers are whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// If a failure is to be logged now, how many of its kind were not logged before.
    fn since_logged(&mut self, kind: (&'static str, i32), now: Instant) -> Option<u64> {
        match self.kinds.get_mut(&kind) {
            Some((logged, more)) if now.duration_since(*logged) < INTERVAL => {
                *more += 1;
                None
            }
            _ => {
                let before = self.kinds.insert(kind, (now, 0));
                Some(before.map_or(0, |(_, more)| more))
            }
        }
    }
}

fn name(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write { .. } => "write",
        Op::Flush => "flush",
        Op::Discard => "discard",
        Op::WriteZeroes { .. } => "write-zeroes",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_logged_once_in_a_while_with_how_many_there_were() {
        let mut inner = Inner::default();
        let (start, read, write) = (Instant::now(), ("read", 5), ("write", 5));
        assert_eq!(inner.since_logged(read, start), Some(0));
        assert_eq!(inner.since_logged(read, start), None);
        assert_eq!(inner.since_logged(write, start), Some(0));
        assert_eq!(inner.since_logged(read, start + INTERVAL / 2), None);
        assert_eq!(inner.since_logged(read, start + INTERVAL), Some(2));
        assert_eq!(inner.since_logged(read, start + INTERVAL * 2), Some(0));
    }
}
