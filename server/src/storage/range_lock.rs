//! Locks on ranges of a file that belong to the open file (open-file-description locks, fcntl(2)): they end with its last
//! descriptor, however the process ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A lock on a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    Read,
    Write,
    None,
}

/// Replaces the lock of this open file on so many bytes from `start` on.
///
/// # Errors
///
/// `EAGAIN` when another open file has a conflicting lock; otherwise the file system has no locks.
pub(super) fn set(file: &File, lock: Lock, (start, len): (i64, i64)) -> io::Result<()> {
    let range = described(lock, (start, len));
    // SAFETY: `range` is a whole `struct flock` that lives through the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether another open file has a lock for writing on this range.
///
/// # Errors
///
/// When the file system has no locks.
pub(super) fn is_locked_for_writing(file: &File, range: (i64, i64)) -> io::Result<bool> {
    // Locks for reading do not conflict with this one.
    let mut range = described(Lock::Read, range);
    // SAFETY: as above; the kernel writes a whole one.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut range) } {
        0 => Ok(i32::from(range.l_type) == libc::F_WRLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

fn described(lock: Lock, (start, len): (i64, i64)) -> libc::flock {
    // Lock types are small constants; the field is narrower than they are.
    #[expect(clippy::cast_possible_truncation, reason = "0 to 2")]
    let kind = match lock {
        Lock::Read => libc::F_RDLCK as libc::c_short,
        Lock::Write => libc::F_WRLCK as libc::c_short,
        Lock::None => libc::F_UNLCK as libc::c_short,
    };
    // SAFETY: all zeroes is a valid `flock`: from the start of the file.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = kind;
    (range.l_start, range.l_len) = (start, len);
    range
}
