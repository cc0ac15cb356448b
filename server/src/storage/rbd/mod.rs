//! A disk in an image of a Ceph cluster (RADOS block device).
//!
//! | file         | tells                                              |
//! |--------------|----------------------------------------------------|
//! | `library.rs` | Ceph's libraries, which are loaded when needed     |
//! | `name.rs`    | which image                                        |
//! | `cluster.rs` | the client of the cluster                          |
//! | `image.rs`   | the open image                                     |
//! | `shared.rs`  | the lock that keeps other writers out, and failures |
//! | `update_watch.rs` | learning that another client has changed the image |
//! | `header_watch.rs` | the same of one that is only read                |
//! | `queue.rs`   | one request from start to end                      |
//!
//! While a server has the image open for writing it holds the image's exclusive lock, so that no other client can write.
//! What is written is durable when it has ended: the client's cache is off.

mod cluster;
mod error;
mod header_watch;
mod image;
mod library;
mod name;
mod queue;
mod shared;
mod update_watch;

use std::io;
use std::sync::Arc;
use std::time::Duration;

pub use error::RbdError;
pub use name::ImageName;
pub use queue::RbdQueue;

use crate::engine::inbox::Inbox;
use crate::engine::{Changed, Fenced, Storage, StorageControl};
use crate::io::Ring;
use crate::request::{Limits, MAX_DISK_BYTES, Serial};
use image::OpenImage;
pub use shared::NoteOwner;
use shared::Shared;

/// How long another client may take to give the lock back: a server that hands over, for instance.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// Largest read or write: requests are copied.
const MAX_IO_BYTES: u32 = 1 << 20;

/// Largest discard and write-zeroes: the library makes one operation for each object.
const MAX_RANGE_BYTES: u64 = 1 << 30;

/// What smaller discards have no effect on (`rbd_discard_granularity_bytes`).
const DISCARD_GRANULARITY_BYTES: u32 = 64 << 10;

/// What a user without a cap is told.
const NO_BARRING: &str = "its user may not bar a dead server from the cluster, so that after a crash the image cannot be \
                          served again: it needs the caps mon 'profile rbd' osd 'profile rbd pool=POOL' (ceph auth caps)";

/// An image, and how it is to be served.
pub struct RbdOptions {
    /// The export, for the log.
    pub export: String,
    /// Which image.
    pub image: ImageName,
    /// Without writes, and without a lock.
    pub read_only: bool,
    /// Size of the disk's blocks.
    pub block_bytes: Option<u32>,
    /// The disk's serial number.
    pub serial: Serial,
    /// Lock it only when a client has the disk.
    pub claim_later: bool,
    /// The client that had it locked when the server before this one died.
    pub predecessor: Option<String>,
    /// Writes down who has the lock.
    pub note_owner: NoteOwner,
}

/// A disk in an image. Holds the image open until the last queue is gone.
pub struct Rbd {
    limits: Limits,
    shared: Arc<Shared>,
}

impl Rbd {
    /// Opens the image, and locks it unless it is only read or to be locked later.
    ///
    /// # Errors
    ///
    /// One line that names the image, what is wrong and what to do.
    pub fn open(options: RbdOptions) -> Result<Self, RbdError> {
        let read_only = options.read_only || options.image.snapshot.is_some();
        let image = OpenImage::open(&options.image, read_only)?;
        let len_bytes = image.size_bytes()?;
        let block_bytes = options.block_bytes.unwrap_or(512);
        let size_bytes = len_bytes / u64::from(block_bytes) * u64::from(block_bytes);
        if size_bytes != len_bytes {
            tracing::warn!(
                "rbd:{}: its last {} bytes are less than a block of {block_bytes} and are not served",
                options.image,
                len_bytes - size_bytes
            );
        }
        if size_bytes < block_bytes.into() || size_bytes > MAX_DISK_BYTES {
            let image = options.image.to_string();
            return Err(RbdError::Size { image, size_bytes });
        }
        if !read_only && !image.can_be_locked()? {
            return Err(RbdError::NoLock(options.image.to_string()));
        }
        if !read_only && !image.cluster().may_bar() {
            let (export, image) = (&options.export, &options.image);
            tracing::warn!("{export}: rbd:{image}: {NO_BARRING}");
        }
        let stripe_bytes = image.stripe_bytes()?;
        let limits = Limits {
            capacity: size_bytes.into(),
            block_bytes,
            physical_block_bytes: 4096,
            optimal_io_bytes: u32::try_from(stripe_bytes).unwrap_or(0),
            max_io_bytes: MAX_IO_BYTES,
            discard_granularity_bytes: DISCARD_GRANULARITY_BYTES,
            max_discard_bytes: MAX_RANGE_BYTES,
            max_write_zeroes_bytes: MAX_RANGE_BYTES,
            read_only,
            write_cache: false,
            serial: options.serial,
        };
        let (export, predecessor) = (options.export, options.predecessor);
        let shared = Shared::new(image, export, predecessor, options.note_owner);
        if !read_only && !options.claim_later {
            shared.lock(LOCK_LIMIT)?;
        }
        Ok(Self {
            limits,
            shared: Arc::new(shared),
        })
    }
}

/// What is found out about an image without using it.
#[derive(Clone, Debug)]
pub struct Examined {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The client that has it locked, if it is to be written.
    pub owner: Option<String>,
    /// What a server could not do with it.
    pub lacks: Option<&'static str>,
}

impl Rbd {
    /// Opens an image, which may be in use, and looks at it.
    ///
    /// # Errors
    ///
    /// As for [`Rbd::open`].
    pub fn check(name: &ImageName, read_only: bool) -> Result<Examined, RbdError> {
        let is_written = !read_only && name.snapshot.is_none();
        let image = OpenImage::open(name, !is_written)?;
        if is_written && !image.can_be_locked()? {
            return Err(RbdError::NoLock(name.to_string()));
        }
        Ok(Examined {
            size_bytes: image.size_bytes()?,
            owner: match is_written {
                true => image.lock_owner()?,
                false => None,
            },
            lacks: (is_written && !image.cluster().may_bar()).then_some(NO_BARRING),
        })
    }

    /// Size and identity of an image, which may be in use.
    ///
    /// # Errors
    ///
    /// As for [`Rbd::open`].
    pub fn examine(image: &ImageName) -> Result<(u64, Option<String>), RbdError> {
        let image = OpenImage::open(image, true)?;
        Ok((image.size_bytes()?, image.identity()))
    }
}

impl StorageControl for Rbd {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn identity(&self) -> Option<String> {
        self.shared.image.identity()
    }

    fn last_error(&self) -> Option<String> {
        self.shared.failures.last()
    }

    fn on_fenced(&self, tell: Fenced) {
        self.shared.on_fenced(tell);
    }

    fn on_change(&self, tell: Changed) {
        self.shared.image.on_change(tell);
    }

    fn grow(&self, wanted_bytes: Option<u64>) -> io::Result<u64> {
        let now = self
            .shared
            .image
            .size_bytes_now()
            .map_err(io::Error::other)?;
        let now = now - now % u64::from(self.limits.block_bytes);
        match wanted_bytes {
            Some(wanted) if wanted > now => self.shared.resize(wanted, false).map(|()| wanted),
            _ => Ok(now),
        }
    }

    fn cut(&self, capacity_bytes: u64) -> io::Result<()> {
        self.shared.resize(capacity_bytes, true)
    }

    fn claim(&self, limit: Duration) -> Result<bool, String> {
        let is_new = self.shared.lock(limit).map_err(|error| error.to_string())?;
        let size_bytes = self.shared.image.size_bytes();
        match size_bytes {
            Ok(size_bytes) if size_bytes >= self.limits.capacity.bytes() => Ok(is_new),
            Ok(_) => Err(format!(
                "rbd:{} has become smaller than the disk",
                self.shared.image.name()
            )),
            Err(error) => Err(error.to_string()),
        }
        .inspect_err(|_| self.shared.unlock())
    }

    fn release(&self) {
        self.shared.unlock();
    }
}

impl Storage for Rbd {
    type Queue = RbdQueue;

    const RING_OPERATIONS: u32 = Inbox::RING_OPERATIONS;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _: &mut Ring, slots: u32) -> io::Result<RbdQueue> {
        RbdQueue::new(Arc::clone(&self.shared), slots)
    }
}
