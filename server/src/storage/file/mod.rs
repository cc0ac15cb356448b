//! A disk in a regular file or on a block device.
//!
//! | file        | tells                                                            |
//! |-------------|------------------------------------------------------------------|
//! | `open.rs`   | what the storage is, what it takes, and the claim on it          |
//! | `image_format.rs` | the warning that the file is an image of a format       |
//! | `device.rs` | what a block device says about itself                            |
//! | `queue.rs`  | one request from start to end, step by step                      |
//! | `operations.rs` | the steps, and the io_uring operation of each                |
//! | `resize.rs` | changing the size of a disk that is being served                 |
//! | `claim.rs`  | exclusive access, from opening on or while a client has the disk |
//! | `lock.rs`   | locks on regular files                                           |
//! | `bounce.rs` | buffers for data that is not aligned as `O_DIRECT` requires      |
//! | `shared.rs` | what all queues use                                              |

mod bounce;
mod claim;
mod device;
mod error;
mod image_format;
mod lock;
mod open;
mod operations;
mod queue;
mod resize;
mod shared;

use std::io;
use std::sync::Arc;
use std::time::Duration;

pub use error::OpenError;
pub use image_format::ImageFormat;
pub use open::{CacheMode, FileOptions, identity, open_file};
pub use queue::FileQueue;
use shared::Shared;

use crate::engine::{RingBuffers, Storage, StorageControl};
use crate::io::Ring;
use crate::request::Limits;

/// A disk in a file. Holds the file, and a lock on it, until the last queue is gone.
#[derive(Debug)]
pub struct File {
    limits: Limits,
    shared: Arc<Shared>,
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

    /// As [`open`](Self::open), for a file that another process has opened with [`open_file`].
    ///
    /// # Errors
    ///
    /// As for `open`.
    pub fn adopt(options: FileOptions, file: std::fs::File) -> Result<Self, OpenError> {
        open::check_opened(&options, &file)?;
        let (limits, shared) = open::examine(options, file)?;
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

    fn identity(&self) -> Option<String> {
        identity(&self.shared.file)
    }

    fn last_error(&self) -> Option<String> {
        self.shared.failures.last()
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

    fn claim(&self, limit: Duration) -> Result<bool, String> {
        self.shared.claim(&self.limits, limit)
    }

    fn release(&self) {
        self.shared.release();
    }
}

impl Storage for File {
    type Queue = FileQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, ring: &mut Ring, slots: u32) -> io::Result<FileQueue> {
        FileQueue::new(Arc::clone(&self.shared), ring, slots)
    }
}
