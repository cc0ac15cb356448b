//! What became of requests that the storage failed: a line in the log, and the last one for `stat`.

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};

use crate::engine::events::{self, What};
use crate::engine::repeats::Repeats;
use crate::request::{Op, Request};

/// The failures of a disk.
#[derive(Debug)]
pub(super) struct Failures {
    last: Mutex<Option<String>>,
    /// Those of one operation with one error are a kind.
    repeats: Repeats,
}

impl Default for Failures {
    fn default() -> Self {
        Self {
            last: Mutex::default(),
            repeats: Repeats::new(1),
        }
    }
}

impl Failures {
    /// Notes that a request of `export` failed with `errno`, and logs it, unless the same came lately.
    #[cold]
    pub(super) fn note(
        &self,
        export: &str,
        place: impl fmt::Display,
        request: &Request,
        errno: i32,
    ) {
        let op = name(request.op());
        let text = format!(
            "{place}: {op} of {} bytes at {} failed: {}",
            request.len_bytes(),
            request.offset_bytes(),
            io::Error::from_raw_os_error(errno)
        );
        if let Some(omitted) = self.repeats.due(&format!("{op} {errno}")) {
            tracing::error!(export, "{text}{omitted}");
            let error = text.clone();
            events::tell(export, What::Error { error });
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    /// The last one.
    pub(super) fn last(&self) -> Option<String> {
        // A text is whole after any panic.
        (self.last.lock())
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
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
