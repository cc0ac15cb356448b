//! Locks on files that keep out other servers and QEMU.

use std::fs;
use std::io;
use std::time::Duration;

use crate::engine::wait::repeat_while;
use crate::storage::range_lock;
pub(super) use crate::storage::range_lock::Lock;

/// How often a lock is tried again while another process has the file.
const INTERVAL: Duration = Duration::from_millis(20);

/// What is locked.
///
/// A writer locks the [data](Part::Data), so that programs which lock some bytes of their images (QEMU locks
/// bytes 100 to 203) and this server keep each other out. Readers lock the first byte and keep out
/// our writers only. The data of block devices is not locked: writers claim them with `O_EXCL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The first byte.
    First,
    /// The first 2^62 bytes. A disk may be longer: every writer locks this range, whatever it writes to, and the
    /// bytes that other programs lock are near the beginning.
    Data,
    /// The byte behind that. A disk may have data there, which a lock does not concern: no program locks this byte
    /// for its data. A server whose guests may move to other servers has it locked for reading as long as
    /// it runs, any other writer for writing: so each sees when it starts whether the other would let go of
    /// the data.
    Turns,
}

impl Part {
    /// Where it begins, and its length.
    fn range(self) -> (i64, i64) {
        const TURNS: i64 = 1 << 62;
        match self {
            Self::First => (0, 1),
            Self::Data => (0, TURNS),
            Self::Turns => (TURNS, 1),
        }
    }
}

/// Replaces the lock of this open file on `part`.
///
/// # Errors
///
/// When another open file has a conflicting lock for longer than `limit` ([`is_taken`]), or the file
/// system has no locks.
pub(super) fn lock(file: &fs::File, lock: Lock, part: Part, limit: Duration) -> io::Result<()> {
    let try_lock = || range_lock::set(file, lock, part.range());
    unless_taken(limit, try_lock, is_taken)
}

/// Whether [`lock`] failed because of another lock.
pub(super) fn is_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Tries again until `limit` while another process has the file; the kernel has no timed wait for it.
pub(super) fn unless_taken<T>(
    limit: Duration,
    attempt: impl FnMut() -> io::Result<T>,
    is_taken: impl Fn(&io::Error) -> bool,
) -> io::Result<T> {
    repeat_while(
        limit,
        INTERVAL,
        attempt,
        |result| matches!(result, Err(error) if is_taken(error)),
    )
}
