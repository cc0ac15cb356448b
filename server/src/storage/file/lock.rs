//! Locks on regular files that keep out other servers and QEMU.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::engine::wait::repeat_while;

/// How often a lock is tried again while another process has the file.
const INTERVAL: Duration = Duration::from_millis(20);

/// A lock on a regular file.
///
/// A writer locks every byte, so that programs which lock some bytes of their images (QEMU locks
/// bytes 100 to 203) and this server keep each other out. Readers lock the first byte and keep out
/// our writers only. Block devices are not locked: writers claim them with `O_EXCL`, and a
/// `flock(2)` would collide with udev, which takes one whenever it looks at a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    Read,
    Write,
    None,
}

/// Replaces the lock of this open file.
///
/// # Errors
///
/// When another open file has a conflicting lock for longer than `limit` ([`is_taken`]), or the file
/// system has no locks.
pub(super) fn lock(file: &fs::File, lock: Lock, limit: Duration) -> io::Result<()> {
    // Lock types are small constants; the field is narrower than they are.
    #[expect(clippy::cast_possible_truncation, reason = "0 to 2")]
    let (kind, len) = match lock {
        Lock::Read => (libc::F_RDLCK as libc::c_short, 1),
        Lock::Write => (libc::F_WRLCK as libc::c_short, 0),
        Lock::None => (libc::F_UNLCK as libc::c_short, 0),
    };
    // SAFETY: all zeroes is a valid `flock`: from the start of the file.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind;
    range.l_len = len;
    let try_lock = || {
        // SAFETY: `range` is a whole `struct flock` that lives through the call.
        match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
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
