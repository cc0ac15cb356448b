//! The disk of another vhost-user-blk server: SPDK, `qemu-storage-daemon`, another server of this program.
//!
//! | file            | tells                                                              |
//! |-----------------|--------------------------------------------------------------------|
//! | `disk.rs`       | what a server says of its disk                                     |
//! | `connection.rs` | the protocol, as its front-end                                     |
//! | `control.rs`    | the thread that connects, again and again, and hears of changes    |
//! | `table.rs`      | what memory the server has mapped                                  |
//! | `lock.rs`       | that no other export has the same disk                             |
//! | `shared.rs`     | what that thread and the queues share                              |
//! | `memory.rs`     | the memory of requests, as the server sees it                      |
//! | `vring.rs`      | the driver's side of a virtqueue in shared memory                  |
//! | `virtqueue.rs`  | which requests the server has, and which wait for one              |
//! | `flushes.rs`    | which writes a flush has to answer for                             |
//! | `queue.rs`      | one request from start to end                                      |
//!
//! Data is not copied here: the memory that requests lie in is handed on to the server. When the server goes away,
//! requests wait, and are submitted again to the one that comes back.

mod connection;
mod control;
mod disk;
mod error;
mod flushes;
mod lock;
mod memory;
mod queue;
mod shared;
mod table;
mod virtqueue;
mod vring;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

pub use error::VhostUserError;
pub use queue::VhostUserQueue;

use crate::engine::{Changed, Sharing, Storage, StorageControl};
use crate::io::Ring;
use crate::request::{Limits, Serial, format_size};
use connection::{Peer, REPLY_LIMIT};
use control::Control;
use flushes::Flushes;
use lock::{Lock, lock};
use memory::BounceMemory;
use shared::{Memory, Order, Shared};
use virtqueue::Virtqueue;

/// How long a server that is there, and does not take a client, is tried again when an export is opened: it may keep the
/// disk for a client that has died.
const OPEN_LIMIT: Duration = Duration::from_secs(15);
const OPEN_PAUSE: Duration = Duration::from_millis(250);

/// How long an answer is waited for when a person asks how large the disk is, or whether there is a server.
const LOOK_LIMIT: Duration = Duration::from_secs(3);

/// How long the server may keep the control thread from its end.
const END_LIMIT: Duration = Duration::from_secs(4);
const END_INTERVAL: Duration = Duration::from_millis(2);

/// Virtqueues at most. Threads beyond that share them.
pub(super) const MAX_QUEUES: u16 = 16;

/// A server's disk, and how it is to be served.
#[derive(Clone, Debug)]
pub struct VhostUserOptions {
    /// The export, for the log.
    pub export: String,
    /// The server's socket.
    pub socket: PathBuf,
    /// Folder with the locks of such disks. `None`: the disk is not locked.
    pub locks: Option<PathBuf>,
    /// Without writes.
    pub read_only: bool,
    /// Size of the disk's blocks.
    pub block_bytes: Option<u32>,
    /// The disk's serial number.
    pub serial: Serial,
    /// Threads that are expected to use it.
    pub queues: u16,
}

/// A disk that another server has.
pub struct VhostUser {
    limits: Limits,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Until the server is left.
    lock: Mutex<Option<Lock>>,
}

impl VhostUser {
    /// Connects to the server. One that takes no client at present is tried again for a while.
    ///
    /// # Errors
    ///
    /// One line that names the socket, what is wrong and what to do.
    pub fn open(options: &VhostUserOptions) -> Result<Self, VhostUserError> {
        let deadline = Instant::now() + OPEN_LIMIT;
        let mut is_told = false;
        loop {
            match Self::connect(options) {
                Err(error) if error.may_pass() && Instant::now() < deadline => {
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::warn!(
                            export = options.export,
                            "{error}; trying again for a while"
                        );
                    }
                    thread::sleep(OPEN_PAUSE);
                }
                opened => return opened,
            }
        }
    }

    /// Locks the disk, so that no other export of the runtime directory has it.
    fn lock(options: &VhostUserOptions) -> Result<Option<Lock>, VhostUserError> {
        let Some(folder) = &options.locks else {
            return Ok(None);
        };
        match lock(folder, &options.socket, options.read_only) {
            // The attempt to connect says it better.
            Err(_) if !options.socket.exists() => Ok(None),
            Err(error) => Err(VhostUserError::Step {
                socket: options.socket.clone(),
                what: "lock the disk",
                why: match error.kind() {
                    io::ErrorKind::WouldBlock => "another export of this host has it".into(),
                    _ => format!("{error} (lock file in {})", folder.display()),
                },
            }),
            locked => Ok(locked.ok()),
        }
    }

    fn connect(options: &VhostUserOptions) -> Result<Self, VhostUserError> {
        let lock = Self::lock(options)?;
        let peer = Peer::connect(&options.socket, REPLY_LIMIT, drop)?;
        let unusable = |why: String| VhostUserError::Disk {
            socket: options.socket.clone(),
            why,
        };
        let block_bytes = options.block_bytes.unwrap_or(peer.disk.block_bytes);
        if block_bytes < peer.disk.block_bytes {
            return Err(unusable(format!(
                "blocks of {block_bytes} bytes were asked for (option block-size), and the server's disk has {}",
                peer.disk.block_bytes
            )));
        }
        let failed = |error: io::Error| unusable(error.to_string());
        let limits = peer
            .disk
            .limits(block_bytes, options.read_only, options.serial);
        let count = peer.queues.min(options.queues.clamp(1, MAX_QUEUES));
        let flushes = peer.disk.has_cache().then(Arc::<Flushes>::default);
        let queues: io::Result<Vec<_>> = (0..count)
            .map(|_| Virtqueue::new(flushes.clone()).map(Arc::new))
            .collect();
        let (orders, for_thread) = mpsc::channel();
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = Arc::new(bell.map_err(|error| failed(error.into()))?);
        let shared = Arc::new(Shared::new(
            (options.export.clone(), options.socket.clone()),
            (peer.disk.clone(), limits.capacity.clone()),
            (queues.map_err(failed)?.into(), flushes),
            // Clients of before may be about to end.
            BounceMemory::new(2 * usize::from(options.queues.max(MAX_QUEUES))).map_err(failed)?,
            (orders, Arc::clone(&bell)),
        ));
        let mut control = Control::new(Arc::clone(&shared), for_thread, bell);
        control.begin(peer)?;
        let thread = Builder::new()
            .name("vhost-storage".into())
            .spawn(|| control.run())
            .map_err(failed)?;
        Ok(Self {
            limits,
            shared,
            thread: Mutex::new(Some(thread)),
            lock: Mutex::new(lock),
        })
    }

    /// Asks a server how large its disk is, without using it.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn examine(socket: &Path) -> Result<u64, VhostUserError> {
        Peer::connect(socket, LOOK_LIMIT, drop).map(|peer| peer.disk.size_bytes)
    }

    /// How many requests had their data copied: those in memory that the server does not have mapped.
    #[must_use]
    pub fn copies(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.shared.copied)
    }

    /// What identifies the disk of the server at a socket: no more than that.
    #[must_use]
    pub fn identity(socket: &Path) -> String {
        format!("vhost-user:{}", socket.display())
    }
}

impl VhostUser {
    /// The server is about to be ended by who started it, after a flush. [`settle`](Self::settle) has to follow, unless this
    /// is false: it is so already.
    pub(super) fn pause(&self) -> bool {
        self.shared.pause()
    }

    /// Whether requests wait for the end of what [`pause`](Self::pause) has begun.
    pub(super) fn is_paused(&self) -> bool {
        self.shared.is_paused()
    }

    /// Whether the server has flushed all that it had answered before it ended. If not, the next flush fails.
    pub(super) fn settle(&self, is_flushed: bool) {
        self.shared.settle(is_flushed);
    }

    /// Leaves the server. Nothing is submitted after it.
    fn leave(&self) {
        self.shared.ask(Order::End);
        // An `Option` is valid whatever its holder panicked about.
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(thread) = thread.take() else {
            return;
        };
        let deadline = Instant::now() + END_LIMIT;
        while !thread.is_finished() {
            thread::sleep(END_INTERVAL);
            if Instant::now() >= deadline {
                // It waits for the server.
                self.shared.hang_up();
            }
        }
        let is_broken = thread.join().is_err();
        drop((self.lock.lock().unwrap_or_else(PoisonError::into_inner)).take());
        if is_broken {
            tracing::error!(
                export = self.shared.export,
                "the thread of {} panicked",
                self.shared.name()
            );
        }
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.leave();
    }
}

impl StorageControl for VhostUser {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn identity(&self) -> Option<String> {
        Some(Self::identity(&self.shared.socket))
    }

    fn last_error(&self) -> Option<String> {
        self.waits_for()
            .map(|why| format!("requests wait: {why}"))
            .or_else(|| self.shared.failures.last())
    }

    fn sharing(&self) -> Option<Arc<dyn Sharing>> {
        Some(Arc::new(Memory(Arc::clone(&self.shared))))
    }

    fn waits_for(&self) -> Option<String> {
        self.shared.waits_for()
    }

    fn on_change(&self, tell: Changed) {
        // Set once, when the export is opened.
        let _ = self.shared.on_change.set(tell);
    }

    fn grow(&self, wanted_bytes: Option<u64>) -> io::Result<u64> {
        let block_bytes = u64::from(self.limits.block_bytes);
        // What changes from here on is told again.
        self.shared
            .is_told_of_change
            .store(false, Ordering::Release);
        let found = match (self.shared.look(LOOK_LIMIT), wanted_bytes) {
            (Ok(found), _) => found,
            (Err(_), None) => self.shared.size_bytes.load(Ordering::Relaxed),
            (Err(why), Some(_)) => return Err(io::Error::other(why)),
        };
        let found = found - found % block_bytes;
        match wanted_bytes {
            Some(wanted) if wanted != found => {
                if found != self.shared.capacity.bytes() {
                    self.shared.tell_change();
                }
                Err(io::Error::other(format!(
                    "{} has {}: its size is changed at its server, and the disk follows",
                    self.shared.name(),
                    format_size(found)
                )))
            }
            _ => Ok(found),
        }
    }

    fn end(&self) {
        self.leave();
    }

    fn cut(&self, _: u64) -> io::Result<()> {
        Err(io::Error::other(format!(
            "{} cannot shrink: its size is its server's",
            self.shared.name()
        )))
    }
}

impl Storage for VhostUser {
    type Queue = VhostUserQueue;

    const RING_OPERATIONS: u32 = VhostUserQueue::RING_OPERATIONS;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _: &mut Ring, slots: u32) -> io::Result<VhostUserQueue> {
        VhostUserQueue::new(Arc::clone(&self.shared), slots)
    }
}
