//! What all queues of an image use: the image, its lock, and what became of requests that failed.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
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

/// How often to try to take a lost lock again.
const REGAIN_ATTEMPTS: u32 = 100;

/// Called once by a thread that does not wait for it.
pub(super) type Wake = Box<dyn FnOnce() + Send>;

/// Writes down who has the lock, for the server that comes after this one.
pub type NoteOwner = Box<dyn Fn(&str) -> io::Result<()> + Send + Sync>;

pub(super) struct Shared {
    pub(super) image: OpenImage,
    export: String,
    /// The name that this server's client has as owner of the lock, while it has it.
    lock: Mutex<Option<String>>,
    /// What waits to learn whether a lost lock is had again, while that is being found out.
    waiting: Mutex<Option<Vec<Wake>>>,
    /// The client that had the lock when the server before this one died.
    predecessor: Option<String>,
    note_owner: NoteOwner,
    fenced: AtomicBool,
    told: AtomicBool,
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
            lock: Mutex::new(None),
            waiting: Mutex::new(None),
            predecessor,
            note_owner,
            fenced: AtomicBool::new(false),
            told: AtomicBool::new(false),
            on_fenced: OnceLock::new(),
            failures: Failures::default(),
        }
    }

    fn locked(&self) -> MutexGuard<'_, Option<String>> {
        // An option is whole whatever panicked.
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the image, and returns whether it was not locked before. The lock of the server before this one, which is
    /// dead, is taken from it, and that of a client that the cluster has lost; another client's is waited for, for at most
    /// `limit`.
    ///
    /// The library is not asked to lock it before: it would ask the other client to give the lock away, and some do while
    /// they go on using the image.
    pub(super) fn lock(&self, limit: Duration) -> Result<bool, RbdError> {
        self.take_lock(&mut self.locked(), limit)
    }

    fn take_lock(&self, locked: &mut Option<String>, limit: Duration) -> Result<bool, RbdError> {
        if locked.is_some() {
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
        let owner = self.image.lock_owner();
        // It may have been taken at once: the first write finds out.
        let owner = owner.map(Option::unwrap_or_default);
        *locked = Some(owner.as_ref().cloned().unwrap_or_default());
        let noted = owner.map_err(|error| error.to_string()).and_then(|owner| {
            let in_image = self.image.note_writer(&owner);
            let in_folder = (self.note_owner)(&owner);
            in_image.and(in_folder).map_err(|error| error.to_string())
        });
        if let Err(error) = noted {
            let image = self.image.name();
            tracing::warn!(
                "rbd:{image}: cannot note who has the lock, so that a server that comes after a crash of this one may have to \
                 wait half a minute for it: {error}"
            );
        }
        Ok(true)
    }

    /// Gives the image another size. The library takes the lock for that: one that this server did not have is given back.
    /// Another client that has it is asked to do it.
    pub(super) fn resize(&self, size_bytes: u64, may_shrink: bool) -> io::Result<()> {
        let mut locked = self.locked();
        let is_new = match self.take_lock(&mut locked, Duration::ZERO) {
            Ok(is_new) => is_new,
            Err(RbdError::InUse { .. }) => false,
            Err(error) => return Err(io::Error::other(error)),
        };
        let resized = self.image.resize(size_bytes, may_shrink);
        // The other client may have given it back in between.
        let is_unseen = locked.is_none() && matches!(self.image.is_lock_owner(), Ok(true));
        if is_unseen {
            *locked = Some(String::new());
        }
        if is_new || is_unseen {
            self.give_lock_back(&mut locked);
        }
        resized
    }

    /// Flushes and gives the lock back.
    pub(super) fn unlock(&self) {
        self.give_lock_back(&mut self.locked());
    }

    fn give_lock_back(&self, locked: &mut Option<String>) {
        if locked.is_none() {
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
            Ok(()) => *locked = None,
            Err(error) => {
                tracing::error!("rbd:{image}: cannot be unlocked: {error}");
                // Another client may have taken it away meanwhile; then it is locked anew for the next client.
                if matches!(self.image.lock_owner(), Ok(None)) {
                    *locked = None;
                }
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

    fn fence(&self) {
        self.fenced.store(true, Ordering::Relaxed);
        if !self.told.swap(true, Ordering::Relaxed) {
            self.image.abandon();
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

    /// A request failed because this client does not have the lock. That need not be for good: after a time without the
    /// cluster the library gives a lock back that it cannot renew, and takes it again. Has `wake` called, from any thread,
    /// when it is had again, or the image is lost to another client.
    #[cold]
    pub(super) fn regain(self: &Arc<Self>, wake: Wake) {
        let mut waiting = self.waiting();
        if let Some(waiting) = &mut *waiting {
            return waiting.push(wake);
        }
        *waiting = Some(vec![wake]);
        drop(waiting);
        let this = Arc::clone(self);
        let regain = move || this.end_waiting(this.take_lost_lock());
        let thread = thread::Builder::new().name("rbd-lock".into());
        if let Err(error) = thread.spawn(regain) {
            tracing::error!("rbd:{}: cannot start a thread: {error}", self.image.name());
            self.end_waiting(false);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Vec<Wake>>> {
        // As for the lock.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_waiting(&self, is_back: bool) {
        // A request that finds this is answered before the doors are told to close.
        self.fenced.fetch_or(!is_back, Ordering::Relaxed);
        let waiting = self.waiting().take();
        for wake in waiting.into_iter().flatten() {
            wake();
        }
        if !is_back {
            // Their client may have gone.
            thread::sleep(PAUSE);
            self.fence();
        }
    }

    /// Takes the lock again that the library has lost, unless another client has it, or had it.
    fn take_lost_lock(&self) -> bool {
        let locked = self.locked();
        let (Some(own), image) = (&*locked, self.image.name()) else {
            return false;
        };
        for _ in 0..REGAIN_ATTEMPTS {
            match self.image.lock_owner() {
                Ok(Some(owner)) if owner != *own => return false,
                // Done at once if the library has it again by itself.
                Ok(_) => match self.image.lock() {
                    Ok(()) => {
                        // The one that had it meanwhile may have written, which a guest of this server does not know.
                        let is_last = self.image.writer().is_ok_and(|writer| writer == *own);
                        match is_last {
                            true => {
                                tracing::warn!("rbd:{image}: the lock was lost, and is had again")
                            }
                            false => drop(self.image.unlock()),
                        }
                        return is_last;
                    }
                    Err(error) if error.raw_os_error() == Some(libc::ESHUTDOWN) => return false,
                    Err(error) => tracing::warn!("rbd:{image}: cannot be locked again: {error}"),
                },
                Err(error) => tracing::warn!("{error}"),
            }
            thread::sleep(PAUSE);
        }
        false
    }

    /// The answer to a request that failed.
    #[cold]
    pub(super) fn failed(&self, request: &Request, errno: i32) -> IoError {
        // The first when this client is barred from the cluster, the second when its lock is gone.
        let is_barred = errno == libc::ESHUTDOWN || errno == libc::EROFS;
        if is_barred {
            self.fence();
        }
        let place = format!("rbd:{}", self.image.name());
        self.failures.note(&self.export, &place, request, errno);
        match is_barred {
            true => IoError::Io,
            false => IoError::from_errno(errno),
        }
    }
}
