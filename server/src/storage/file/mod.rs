//! A disk in a regular file or on a block device.
//!
//! | file        | tells                                                       |
//! |-------------|-------------------------------------------------------------|
//! | `open.rs`   | what the storage is, what it takes, who else has it          |
//! | `queue.rs`  | one request from start to end, step by step                  |
//! | `resize.rs` | another size for a disk that is being served               |
//! | `claim.rs`  | that nobody else writes to it                                |
//! | `bounce.rs` | buffers for data that does not lie as `O_DIRECT` wants it    |

mod bounce;
mod claim;
mod open;
mod queue;
mod resize;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use open::OpenError;
pub use queue::FileQueue;

use crate::engine::{RingBuffers, Storage, StorageControl};
use crate::io::Ring;
use crate::request::{Limits, Serial};

/// How a file disk uses the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Around it where the file system can, else through it.
    #[default]
    Auto,
    /// Around it (`O_DIRECT`) or not at all.
    Direct,
    /// Through it.
    Buffered,
}

/// Which file, and how.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// A regular file or a block device.
    pub path: PathBuf,
    /// How the page cache is used.
    pub cache: CacheMode,
    /// Open it for reading only; writes are refused.
    pub read_only: bool,
    /// Logical block size to advertise; what the storage takes when there is none.
    pub block_bytes: Option<u32>,
    /// What the disk calls itself.
    pub serial: Serial,
    /// Do not claim it, so that others may have it until [`Storage::claim`].
    pub claim_later: bool,
}

/// A disk in a file. Holds the file, and a lock on it, until the last queue is gone.
#[derive(Debug)]
pub struct File {
    limits: Limits,
    shared: Arc<Shared>,
}

/// What all queues of a file disk use.
#[derive(Debug)]
struct Shared {
    /// For messages.
    path: PathBuf,
    file: fs::File,
    is_device: bool,
    /// The file has no storage but memory.
    is_in_memory: bool,
    alignment: Option<Alignment>,
    /// Whether it is claimed only while somebody wants it so.
    claims_later: bool,
    /// A claim that comes and goes.
    claim: Mutex<Option<claim::Claim>>,
    /// What the storage turned out not to know; each is tried until then.
    lacks: Lacks,
}

/// What `O_DIRECT` asks of a transfer. Both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alignment {
    /// Of addresses.
    memory_bytes: usize,
    /// Of lengths and positions.
    block_bytes: usize,
}

#[derive(Debug, Default)]
struct Lacks {
    /// `RWF_DSYNC`.
    forced_writes: AtomicBool,
    /// `FALLOC_FL_PUNCH_HOLE`.
    punch_hole: AtomicBool,
    /// `FALLOC_FL_ZERO_RANGE`.
    zero_range: AtomicBool,
    /// `BLOCK_URING_CMD_DISCARD` (Linux 6.12).
    discard_command: AtomicBool,
}

impl File {
    /// Opens the file and finds out what it takes.
    ///
    /// # Errors
    ///
    /// One line that names the file, what is wrong and what to do.
    pub fn open(options: FileOptions) -> Result<Self, OpenError> {
        let (limits, shared) = open::open(options)?;
        Ok(Self {
            limits,
            shared: Arc::new(shared),
        })
    }

    /// Whether I/O goes around the page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.shared.alignment.is_some()
    }
}

impl StorageControl for File {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn ring_buffers(&self) -> RingBuffers {
        if self.shared.is_in_memory {
            return RingBuffers::No;
        }
        let alignment_bytes = (self.shared.alignment)
            .and_then(|alignment| u32::try_from(alignment.memory_bytes).ok())
            .unwrap_or(1);
        RingBuffers::Better { alignment_bytes }
    }

    fn grow(&self, wanted_bytes: Option<u64>) -> io::Result<u64> {
        resize::grow(&self.shared, &self.limits, wanted_bytes)
    }

    fn cut(&self, capacity_bytes: u64) -> io::Result<()> {
        resize::cut(&self.shared, capacity_bytes)
    }

    fn claim(&self, limit: Duration) -> Result<(), String> {
        self.shared.claim(&self.limits, limit)
    }

    fn release(&self) {
        self.shared.release();
    }
}

impl Storage for File {
    type Queue = FileQueue;

    fn queue(&self, ring: &mut Ring, slots: u32) -> io::Result<FileQueue> {
        FileQueue::new(Arc::clone(&self.shared), ring, slots)
    }
}
