//! Clients that are turned away: what they see of it, and what `stat` shows.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How long a client that was turned away may take to hang up.
const LIMIT: Duration = Duration::from_secs(5);

/// Clients that are waited for at once. More of them are not seen off but cut off.
const MAX_WAITED_FOR: usize = 16;

/// A client that was turned away: it was not admitted, or its session ended with an error.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The client's process, if the kernel told.
    pub peer_pid: Option<i32>,
    /// When.
    pub at: SystemTime,
    /// Why.
    pub why: String,
}

/// The clients that a door has turned away.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    last: Mutex<Option<Refusal>>,
    waited_for: AtomicUsize,
}

impl Refusals {
    /// Notes why a client is turned away.
    pub(super) fn note(&self, peer_pid: Option<i32>, why: &io::Error) {
        let refusal = Refusal {
            peer_pid,
            at: SystemTime::now(),
            why: why.to_string(),
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
    }

    /// The last one.
    pub(super) fn last(&self) -> Option<Refusal> {
        // It is replaced as a whole.
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.clone()
    }

    /// Ends a connection so that the client reads an end of file after what was sent to it, whatever it has sent
    /// itself: to close a socket with unread messages in it is a connection reset to the other side, or a broken pipe,
    /// depending on who was faster. Returns when the client has hung up, or after a time.
    pub(super) fn see_off(&self, mut stream: &UnixStream) {
        let now_waited_for = self.waited_for.fetch_add(1, Ordering::Relaxed) + 1;
        let deadline = Instant::now() + LIMIT;
        let mut left = deadline.saturating_duration_since(Instant::now());
        let begun = now_waited_for <= MAX_WAITED_FOR && stream.shutdown(Shutdown::Write).is_ok();
        while begun && !left.is_zero() && stream.set_read_timeout(Some(left)).is_ok() {
            match stream.read(&mut [0; 4096]) {
                Ok(len) if len > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
            left = deadline.saturating_duration_since(Instant::now());
        }
        self.waited_for.fetch_sub(1, Ordering::Relaxed);
    }
}
