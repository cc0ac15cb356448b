//! That nobody else writes to the storage: from its opening on, or while somebody wants it so.

use std::fs::{self, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, OFlags, fadvise};

use super::Shared;
use crate::request::Limits;

/// A claim that comes and goes.
#[derive(Debug)]
pub(super) enum Claim {
    /// A lock on the file that is served.
    Lock,
    /// The device, opened once more: `O_EXCL` holds until it is closed.
    Device { _exclusive: fs::File },
}

impl Shared {
    pub(super) fn claim(&self, limits: &Limits, limit: Duration) -> Result<(), String> {
        let path = self.path.display();
        let taken = || {
            format!(
                "{path} is in use by another process: its guest still runs, or its server does not \
                 let guests move (--migration)"
            )
        };
        let mut claim = self.claimed();
        if claim.is_some() {
            return Ok(());
        }
        *claim = Some(if self.is_device {
            let mut how = OpenOptions::new();
            let flags = OFlags::EXCL | OFlags::NONBLOCK;
            how.read(true)
                .write(true)
                .custom_flags(flags.bits().cast_signed());
            // The path may lead elsewhere by now.
            let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let busy = |error: &io::Error| error.raw_os_error() == Some(libc::EBUSY);
            let opened = unless_taken(limit, || how.open(&same), busy);
            Claim::Device {
                _exclusive: opened.map_err(|error| match busy(&error) {
                    true => taken(),
                    false => format!("cannot claim {path}: {error}"),
                })?,
            }
        } else {
            match lock(&self.file, Lock::Write, limit) {
                Ok(()) => Claim::Lock,
                Err(error) if is_taken(&error) => return Err(taken()),
                Err(error) => return Err(format!("cannot lock {path}: {error}")),
            }
        });
        // What was read before is not what others have written since.
        if let Err(error) = fadvise(&self.file, 0, None, Advice::DontNeed) {
            tracing::warn!("{path}: old pages may stay in the cache: {error}");
        }
        let fits = match (&self.file).seek(SeekFrom::End(0)) {
            Ok(len_bytes) if len_bytes >= limits.capacity.bytes() => Ok(()),
            Ok(_) => Err(format!("{path} has become shorter than the disk")),
            Err(error) => Err(format!("{path}: {error}")),
        };
        if fits.is_err() {
            drop(claim);
            self.release();
        }
        fits
    }

    pub(super) fn release(&self) {
        let mut claim = self.claimed();
        if claim.is_none() {
            return;
        }
        let path = self.path.display();
        // The next one may be another machine, to which this one's cache means nothing.
        if let Err(error) = self.file.sync_data() {
            tracing::error!("{path}: writes may be lost, it cannot be flushed: {error}");
        }
        if let Some(Claim::Lock) = claim.take()
            && let Err(error) = lock(&self.file, Lock::None, Duration::ZERO)
        {
            tracing::warn!("{path}: cannot be unlocked: {error}");
        }
    }

    /// Changes a regular file, which must be nobody else's meanwhile.
    pub(super) fn change<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        // Held to the end: who claims the file meanwhile waits for it.
        let claim = self.claimed();
        if !self.claims_later || claim.is_some() {
            return change();
        }
        lock(&self.file, Lock::Write, Duration::ZERO).map_err(|error| match is_taken(&error) {
            true => io::Error::other(format!(
                "{} is in use by another process: give it another size there",
                self.path.display()
            )),
            false => error,
        })?;
        let changed = change().and_then(|changed| self.file.sync_all().map(|()| changed));
        lock(&self.file, Lock::None, Duration::ZERO)?;
        changed
    }

    fn claimed(&self) -> MutexGuard<'_, Option<Claim>> {
        // It is there or it is not.
        self.claim.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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

/// Changes the lock that this open file has.
///
/// # Errors
///
/// When somebody else has a lock that does not go with it for longer than `limit`
/// ([`is_taken`]), or the file system knows no locks.
pub(super) fn lock(file: &fs::File, lock: Lock, limit: Duration) -> io::Result<()> {
    // Lock types are small constants; the field is narrower than they are.
    #[expect(clippy::cast_possible_truncation, reason = "0 to 2")]
    let (kind, len) = match lock {
        Lock::Read => (libc::F_RDLCK as libc::c_short, 1),
        Lock::Write => (libc::F_WRLCK as libc::c_short, 0),
        Lock::None => (libc::F_UNLCK as libc::c_short, 0),
    };
    // SAFETY: all zeroes is a valid `flock`: from the start of the file, by nobody.
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

/// Whether [`lock`] failed because somebody else has one.
pub(super) fn is_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Tries again for a short time while somebody else has the file.
pub(super) fn unless_taken<T>(
    limit: Duration,
    mut attempt: impl FnMut() -> io::Result<T>,
    is_taken: impl Fn(&io::Error) -> bool,
) -> io::Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt() {
            Err(error) if is_taken(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}
