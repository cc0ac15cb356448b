//! What all queues of an image use: the image, its lock, and what became of requests that failed.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::cluster::CAPS;
use super::error::RbdError;
use super::image::OpenImage;
use crate::engine::Fenced;
use crate::request::{IoError, Request};
use crate::storage::failures::Failures;

/// How often to check whether another client has given the lock back.
const PAUSE: Duration = Duration::from_millis(100);

/// Writes down who has the lock, for the server that comes after this one.
pub type NoteOwner = Box<dyn Fn(&str) -> io::Result<()> + Send + Sync>;

pub(super) struct Shared {
    pub(super) image: OpenImage,
    export: String,
    /// Whether this server has the lock.
    lock: Mutex<bool>,
    /// The client that had the lock when the server before this one died.
    predecessor: Option<String>,
    note_owner: NoteOwner,
    fenced: AtomicBool,
    /// Called when the lock is lost.
    on_fenced: OnceLock<Fenced>,
    pub(super) failures: Failures,
}

impl Shared {
    pub(super) fn new(
        image: OpenImage,
        export: String,
        predecessor: Option<String>,
        note_owner: NoteOwner,
    ) -> Self {
        Self {
            image,
            export,
            lock: Mutex::new(false),
            predecessor,
            note_owner,
            fenced: AtomicBool::new(false),
            on_fenced: OnceLock::new(),
            failures: Failures::default(),
        }
    }

    fn is_locked(&self) -> MutexGuard<'_, bool> {
        // A boolean is whole whatever panicked.
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the image, and returns whether it was not locked before. The lock of the server before this one, which is
    /// dead, is taken from it, and that of a client that the cluster has lost; another client's is waited for, for at most
    /// `limit`.
    ///
    /// The library is not asked to lock it before: it would ask the other client to give the lock away, and some do while
    /// they go on using the image.
    pub(super) fn lock(&self, limit: Duration) -> Result<bool, RbdError> {
        self.take_lock(&mut self.is_locked(), limit)
    }

    fn take_lock(&self, locked: &mut bool, limit: Duration) -> Result<bool, RbdError> {
        if *locked {
            return Ok(false);
        }
        let deadline = Instant::now() + limit;
        loop {
            if !self.image.is_lock_owner()?
                && let Some(owner) = self.image.lock_owner()?
            {
                if self.predecessor.as_ref() == Some(&owner) || !self.image.is_watched_by(&owner)? {
                    self.image.break_lock(&owner)?;
                } else if Instant::now() < deadline {
                    thread::sleep(PAUSE);
                } else {
                    let image = self.image.name().to_string();
                    return Err(RbdError::InUse { image, owner });
                }
                // What there is now decides.
                continue;
            }
            match self.image.lock() {
                Ok(()) => break,
                // Another client was faster.
                Err(error)
                    if error.raw_os_error() == Some(libc::EROFS) && Instant::now() < deadline =>
                {
                    thread::sleep(PAUSE);
                }
                Err(source) => {
                    let hint = match source.raw_os_error() {
                        Some(libc::EPERM | libc::EACCES) => CAPS,
                        _ => "",
                    };
                    return Err(RbdError::Step {
                        image: format!("rbd:{}", self.image.name()),
                        what: "lock the image",
                        source,
                        hint,
                    });
                }
            }
        }
        *locked = true;
        let noted = match self.image.lock_owner() {
            Ok(Some(owner)) => (self.note_owner)(&owner).map_err(|error| error.to_string()),
            // It was taken at once: the first write finds out.
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = noted {
            let image = self.image.name();
            tracing::warn!(
                "rbd:{image}: a server that comes after a crash of this one has to wait half a minute for the lock: {error}"
            );
        }
        Ok(true)
    }

    /// Gives the image another size. The library takes the lock for that: one that this server did not have is given back.
    /// Another client that has it is asked to do it.
    pub(super) fn resize(&self, size_bytes: u64, may_shrink: bool) -> io::Result<()> {
        let mut locked = self.is_locked();
        let is_new = match self.take_lock(&mut locked, Duration::ZERO) {
            Ok(is_new) => is_new,
            Err(RbdError::InUse { .. }) => false,
            Err(error) => return Err(io::Error::other(error)),
        };
        let resized = self.image.resize(size_bytes, may_shrink);
        // The other client may have given it back in between.
        let is_unseen = !*locked && matches!(self.image.is_lock_owner(), Ok(true));
        *locked |= is_unseen;
        if is_new || is_unseen {
            self.give_lock_back(&mut locked);
        }
        resized
    }

    /// Flushes and gives the lock back.
    pub(super) fn unlock(&self) {
        self.give_lock_back(&mut self.is_locked());
    }

    fn give_lock_back(&self, locked: &mut bool) {
        if !*locked {
            return;
        }
        if self.is_fenced() {
            return;
        }
        let image = self.image.name();
        if let Err(error) = self.image.flush() {
            tracing::error!("rbd:{image}: cannot be flushed, so no other server gets it: {error}");
            return;
        }
        match self.image.unlock() {
            Ok(()) => *locked = false,
            Err(error) => {
                tracing::error!("rbd:{image}: cannot be unlocked: {error}");
                // Another client may have taken it away meanwhile; then it is locked anew for the next client.
                *locked = !matches!(self.image.lock_owner(), Ok(None));
            }
        }
    }

    /// Whether another client has taken the image from this server.
    pub(super) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }

    /// Has `tell` called when another client takes the image from this server.
    pub(super) fn on_fenced(&self, tell: Fenced) {
        // Set once, when the export is opened.
        let _ = self.on_fenced.set(tell);
        if self.is_fenced() {
            self.tell_fenced();
        }
    }

    fn tell_fenced(&self) {
        if let Some(tell) = self.on_fenced.get() {
            let image = self.image.name();
            tell(format!(
                "another client of the cluster has taken rbd:{image} from this server"
            ));
        }
    }

    /// The answer to a request that failed.
    #[cold]
    pub(super) fn failed(&self, request: &Request, errno: i32) -> IoError {
        // The first when this client is barred from the cluster, the second when its lock is gone.
        let is_barred = errno == libc::ESHUTDOWN || errno == libc::EROFS;
        if is_barred && !self.fenced.swap(true, Ordering::Relaxed) {
            self.image.abandon();
            self.tell_fenced();
        }
        let place = format!("rbd:{}", self.image.name());
        self.failures.note(&self.export, &place, request, errno);
        match is_barred {
            true => IoError::Io,
            false => IoError::from_errno(errno),
        }
    }
}
