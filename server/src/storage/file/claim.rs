//! Exclusive write access to the storage that comes and goes while the disk is served.

use std::fs::OpenOptions;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{Advice, OFlags, fadvise};

use super::lock::{Lock, Part, is_taken, lock, unless_taken};
use super::shared::{Claim, Shared};
use crate::request::Limits;

impl Shared {
    pub(super) fn claim(&self, limits: &Limits, limit: Duration) -> Result<bool, String> {
        let path = self.path.display();
        let taken = || format!("{path} is in use by another process, whose guest still runs");
        let mut claim = self.claimed();
        if claim.is_some() {
            return Ok(false);
        }
        *claim = Some(if self.is_device {
            let mut how = OpenOptions::new();
            let flags = OFlags::EXCL | OFlags::NONBLOCK;
            how.read(true)
                .write(true)
                .custom_flags(flags.bits().cast_signed());
            // The path may name another device by now.
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
            match lock(&self.file, Lock::Write, Part::Data, limit) {
                Ok(()) => Claim::Lock,
                Err(error) if is_taken(&error) => return Err(taken()),
                Err(error) => return Err(format!("cannot lock {path}: {error}")),
            }
        });
        // Cached pages may be older than what other servers wrote since.
        if let Err(error) = fadvise(&self.file, 0, None, Advice::DontNeed) {
            tracing::warn!("{path}: old pages may stay in the cache: {error}");
        }
        let fits = match (&self.file).seek(SeekFrom::End(0)) {
            Ok(len_bytes) if len_bytes >= limits.capacity.bytes() => Ok(true),
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
        // The next server may be on another machine, which does not see this page cache.
        if let Err(error) = self.file.sync_data() {
            tracing::error!("{path}: cannot be flushed, so no other server gets it: {error}");
            self.flush_failed(error.raw_os_error().unwrap_or(libc::EIO));
            return;
        }
        if let Some(Claim::Lock) = claim.take()
            && let Err(error) = lock(&self.file, Lock::None, Part::Data, Duration::ZERO)
        {
            tracing::warn!("{path}: cannot be unlocked: {error}");
        }
    }

    /// Runs `change` on a regular file, locked meanwhile if it is not claimed anyway.
    pub(super) fn change<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        // Held to the end, so that a claim waits for the change.
        let claim = self.claimed();
        if !self.claims_later || claim.is_some() {
            return change();
        }
        lock(&self.file, Lock::Write, Part::Data, Duration::ZERO).map_err(
            |error| match is_taken(&error) {
                true => io::Error::other(format!(
                    "{} is in use by another process: give it another size there",
                    self.path.display()
                )),
                false => error,
            },
        )?;
        let changed = change().and_then(|changed| self.file.sync_all().map(|()| changed));
        lock(&self.file, Lock::None, Part::Data, Duration::ZERO)?;
        changed
    }

    fn claimed(&self) -> MutexGuard<'_, Option<Claim>> {
        // It is there or it is not.
        self.claim.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::atomic::Ordering;

    use super::super::open::{CacheMode, FileOptions, open};
    use super::*;
    use crate::request::Serial;

    #[test]
    fn storage_that_cannot_be_flushed_is_given_to_no_other_server() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let options = FileOptions {
            export: "test".into(),
            path: image.path().to_owned(),
            cache: CacheMode::Buffered,
            format: None,
            read_only: false,
            block_bytes: None,
            serial: Serial::new("test").unwrap(),
            claim_later: true,
        };
        let (_, mut shared) = open(options).unwrap();
        let file = shared.file.try_clone().unwrap();
        // A pipe has no flush.
        let (pipe, _other_end) = io::pipe().unwrap();
        shared.file = OwnedFd::from(pipe).into();
        *shared.claimed() = Some(Claim::Lock);
        shared.release();
        assert!(shared.claimed().is_some());
        assert!(shared.has_lost_writes.load(Ordering::Relaxed));
        shared.file = file;
        shared.release();
        assert!(shared.claimed().is_none());
    }
}
