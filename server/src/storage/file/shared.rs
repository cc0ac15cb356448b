//! What all queues of a file disk use.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// What all queues of a file disk use.
#[derive(Debug)]
pub(super) struct Shared {
    /// For messages.
    pub(super) path: PathBuf,
    pub(super) file: fs::File,
    pub(super) is_device: bool,
    /// The file has no storage but memory.
    pub(super) is_in_memory: bool,
    pub(super) alignment: Option<Alignment>,
    /// Whether it is claimed only while somebody wants it so.
    pub(super) claims_later: bool,
    /// A claim that comes and goes.
    pub(super) claim: Mutex<Option<Claim>>,
    /// What the storage turned out not to know; each is tried until then.
    pub(super) lacks: Lacks,
}

/// What `O_DIRECT` asks of a transfer. Both are powers of two.
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

/// A claim that comes and goes.
#[derive(Debug)]
pub(super) enum Claim {
    /// A lock on the file that is served.
    Lock,
    /// The device, opened once more: `O_EXCL` holds until it is closed.
    Device { _exclusive: fs::File },
}
