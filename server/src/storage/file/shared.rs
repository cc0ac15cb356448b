//! What all queues of a file disk use.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::engine::events::{self, What};
use crate::storage::failures::Failures;

/// What all queues of a file disk use.
#[derive(Debug)]
pub(super) struct Shared {
    /// For those who watch events.
    pub(super) export: String,
    /// For messages.
    pub(super) path: PathBuf,
    pub(super) file: fs::File,
    pub(super) is_device: bool,
    /// The file system has no storage but memory (tmpfs).
    pub(super) is_in_memory: bool,
    pub(super) alignment: Option<Alignment>,
    /// Whether the file is claimed only while a client has the disk (`--migration`).
    pub(super) claims_later: bool,
    /// The claim, while there is one.
    pub(super) claim: Mutex<Option<Claim>>,
    /// Operations that the storage turned out not to support.
    pub(super) lacks: Lacks,
    /// Requests that failed.
    pub(super) failures: Failures,
    /// A flush of the page cache failed: see [`Shared::flush_failed`].
    pub(super) has_lost_writes: AtomicBool,
}

impl Shared {
    /// Notes that a flush failed with `errno`. Through the page cache that is final: the kernel reports a
    /// failed write-back once and then takes the pages for clean, so that a later fsync(2) succeeds
    /// although the data is lost. All later flushes fail until the export is opened again.
    pub(super) fn flush_failed(&self, errno: i32) {
        if self.alignment.is_some() || self.has_lost_writes.swap(true, Ordering::Relaxed) {
            return;
        }
        let why = format!(
            "{}: a flush failed: {}: writes may be lost, and all flushes fail from now on; check the \
             storage, then restart the export",
            self.path.display(),
            std::io::Error::from_raw_os_error(errno)
        );
        tracing::error!("{why}");
        events::tell(&self.export, What::Fenced { why });
    }
}

/// Alignment that `O_DIRECT` requires of a transfer. Both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses.
    pub(super) memory_bytes: usize,
    /// Of lengths and positions.
    pub(super) block_bytes: usize,
}

#[derive(Debug, Default)]
pub(super) struct Lacks {
    /// `RWF_DSYNC`.
    pub(super) forced_writes: AtomicBool,
    /// `FALLOC_FL_PUNCH_HOLE`.
    pub(super) punch_hole: AtomicBool,
    /// `FALLOC_FL_ZERO_RANGE`.
    pub(super) zero_range: AtomicBool,
    /// `BLOCK_URING_CMD_DISCARD` (Linux 6.12).
    pub(super) discard_command: AtomicBool,
}

/// Exclusive write access that comes and goes.
#[derive(Debug)]
pub(super) enum Claim {
    /// A lock on the file that is served.
    Lock,
    /// The device, opened once more: `O_EXCL` holds until it is closed.
    Device { _exclusive: fs::File },
}
