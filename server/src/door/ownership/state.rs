//! The states of ownership and the ways between them.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::types::{BlockDoor, Client, OwnershipState, Refused};
use crate::engine::StorageControl;
use crate::engine::event_loop::EventLoop;

/// How long a client waits for another one that is already gone, and for the doors to open.
pub(super) const SUCCESSION_LIMIT: Duration = Duration::from_secs(10);

/// How long the writes under way at the ublk door may take to end.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(30);

pub(super) enum State {
    Opening,
    Block,
    Draining,
    Upgraded(Client),
    /// Stopped for migration: either this client resumes or its successor takes over.
    Moving(Client),
    /// For a client to reconnect; the number tells one wait from another.
    Waiting(u64),
    Closed,
}

pub(super) struct Inner {
    pub(super) state: State,
    /// The lease that has the disk, or is getting it.
    pub(super) owner: u64,
    pub(super) leases: u64,
    pub(super) block: Option<Arc<dyn BlockDoor>>,
    /// Whether a client that has stopped may be succeeded by another.
    pub(super) moves: bool,
    /// What is claimed while a client has the disk.
    pub(super) storage: Option<Arc<dyn StorageControl>>,
    pub(super) waits: u64,
}

/// The right to write to one export. No door has it before [`Ownership::open`].
pub struct Ownership {
    pub(super) export: String,
    pub(super) grace: Duration,
    pub(super) shared: bool,
    /// A file that is there while a client has the disk, or is waited for.
    pub(super) note: Option<PathBuf>,
    pub(super) inner: Mutex<Inner>,
    pub(super) changed: Condvar,
}

impl Ownership {
    /// For a disk that is `read_only` or not; `grace` is how long it is kept for a client that
    /// crashed. The file `note` is there while a client has the disk: a server that comes after a crash reads
    /// it.
    #[must_use]
    pub fn new(export: &str, read_only: bool, grace: Duration, note: Option<PathBuf>) -> Arc<Self> {
        Arc::new(Self {
            export: export.to_owned(),
            grace,
            shared: read_only,
            note,
            inner: Mutex::new(Inner {
                state: State::Opening,
                owner: 0,
                leases: 0,
                block: None,
                moves: false,
                storage: None,
                waits: 0,
            }),
            changed: Condvar::new(),
        })
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change is one assignment, so a panic leaves a state that is one.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, state: State) {
        self.inner().state = state;
        self.changed.notify_all();
    }

    /// From now on a client that stops while its memory is being migrated may be succeeded by another.
    /// `storage` is claimed only while a client has the disk, so that another server can claim it
    /// otherwise; there must be no ublk door then.
    pub fn allow_moves(&self, storage: Option<Arc<dyn StorageControl>>) {
        let mut inner = self.inner();
        inner.moves = true;
        inner.storage = storage;
    }

    /// Opens the export for clients, with the ublk door if there is one.
    pub fn open(&self, block: Option<Arc<dyn BlockDoor>>) {
        let mut inner = self.inner();
        inner.block = block;
        // Before a client may take the disk, which is noted again then.
        self.unnote();
        inner.state = State::Block;
        drop(inner);
        self.changed.notify_all();
    }

    /// Opens the export of a server that died while a client had the disk: the client may come
    /// back. The ublk door is refusing writes already.
    pub fn open_for_return(self: &Arc<Self>, block: Arc<dyn BlockDoor>) {
        self.inner().block = Some(block);
        Arc::clone(self).await_return("the last server died while a client had the disk");
    }

    pub(super) fn note(&self) -> std::io::Result<()> {
        match &self.note {
            Some(path) => {
                File::create(path)?.sync_all()?;
                // The file is empty: that it is there is all it says.
                path.parent()
                    .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
            }
            None => Ok(()),
        }
    }

    pub(super) fn unnote(&self) {
        if let Some(path) = &self.note
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            let path = path.display();
            tracing::warn!(export = self.export, "cannot remove {path}: {error}");
        }
    }

    /// The ublk door has gone.
    pub fn forget_block_door(&self) {
        self.inner().block = None;
    }

    /// No client gets the disk any more.
    pub fn close(&self) {
        self.set(State::Closed);
    }

    /// What `stat` shows.
    #[must_use]
    pub fn state(&self) -> OwnershipState {
        let inner = self.inner();
        match inner.state {
            _ if self.shared => OwnershipState::Shared,
            State::Draining => OwnershipState::Draining,
            State::Upgraded(_) => OwnershipState::Upgraded,
            State::Waiting(_) => OwnershipState::Waiting,
            State::Moving(_) => OwnershipState::Moving,
            _ if inner.block.is_some() => OwnershipState::Block,
            _ => OwnershipState::Free,
        }
    }

    /// The connected client that has the disk for itself, if there is one.
    #[must_use]
    pub fn holder(&self) -> Option<String> {
        match &self.inner().state {
            State::Upgraded(client) | State::Moving(client) if !(client.gone)() => {
                Some(client.name.clone())
            }
            _ => None,
        }
    }

    /// The client because of which another one is refused as soon as it connects.
    #[must_use]
    pub fn obstacle(&self) -> Option<String> {
        let moves = self.inner().moves;
        self.holder().filter(|_| !moves)
    }

    /// Claims the storage for the lease of this number. If that fails everything is as before.
    pub(super) fn pass_on(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        number: u64,
    ) -> Result<(), Refused> {
        let Some(storage) = inner.storage.clone() else {
            inner.owner = number;
            inner.state = State::Draining;
            return Ok(());
        };
        let owner = std::mem::replace(&mut inner.owner, number);
        let state = std::mem::replace(&mut inner.state, State::Draining);
        drop(inner);
        let claimed = storage.claim(SUCCESSION_LIMIT);
        if claimed.is_err() {
            let mut inner = self.inner();
            if let State::Draining = inner.state {
                (inner.owner, inner.state) = (owner, state);
            }
            drop(inner);
            self.changed.notify_all();
        }
        claimed.map_err(Refused::Storage)
    }

    /// The end of a take.
    pub(super) fn give_to(&self, client: Client) -> Result<(), Refused> {
        let mut inner = self.inner();
        if let State::Closed = inner.state {
            return Err(Refused::NotOpen);
        }
        inner.state = State::Upgraded(client);
        drop(inner);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits while the disk is being passed on, and returns when it can be taken.
    pub(super) fn wait_for_turn(&self) -> Result<MutexGuard<'_, Inner>, Refused> {
        let deadline = Instant::now() + SUCCESSION_LIMIT + DRAIN_LIMIT;
        let mut inner = self.inner();
        loop {
            let refused = match &inner.state {
                State::Block | State::Waiting(_) | State::Moving(_) => return Ok(inner),
                State::Closed => return Err(Refused::NotOpen),
                State::Upgraded(client) if !(client.gone)() => {
                    return Err(Refused::Taken(client.name.clone()));
                }
                State::Upgraded(client) => Refused::Taken(client.name.clone()),
                State::Opening | State::Draining => Refused::NotOpen,
            };
            let now = Instant::now();
            if now >= deadline {
                return Err(refused);
            }
            inner = self
                .changed
                .wait_timeout(inner, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Gives the disk back to the ublk door. A closed export stays closed.
    pub(super) fn give_back<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) {
        if let State::Closed = inner.state {
            return;
        }
        if let Some(storage) = inner.storage.clone() {
            inner.state = State::Draining;
            drop(inner);
            storage.release();
            inner = self.inner();
            if let State::Closed = inner.state {
                return;
            }
        }
        self.unnote();
        if let Some(block) = &inner.block {
            block.open();
        }
        inner.state = State::Block;
        drop(inner);
        self.changed.notify_all();
    }

    /// Keeps the disk for a client that may reconnect, and gives it back if none did in time.
    pub(super) fn await_return(self: Arc<Self>, why: &str) {
        let mut inner = self.inner();
        if let State::Closed = inner.state {
            return;
        }
        // No block device to return to, or no grace period configured.
        if inner.block.is_none() || self.grace.is_zero() {
            return self.give_back(inner);
        }
        inner.waits += 1;
        let wait = inner.waits;
        inner.state = State::Waiting(wait);
        drop(inner);
        self.changed.notify_all();
        let seconds = self.grace.as_secs_f32();
        tracing::warn!(export = self.export, "{why}: it is kept for {seconds} s");
        // An export that is gone needs no end of its wait.
        let waiting = Arc::downgrade(&self);
        let end = move || {
            if let Some(ownership) = waiting.upgrade() {
                ownership.end_wait(wait);
            }
        };
        match EventLoop::get() {
            Ok(events) => events.call_after(self.grace, end),
            Err(error) => {
                tracing::error!(export = self.export, %error, "cannot wait for the client");
                self.give_back(self.inner());
            }
        }
    }

    /// Gives the disk back when the time of this wait is over, if it still lasts.
    fn end_wait(&self, wait: u64) {
        let inner = self.inner();
        if matches!(inner.state, State::Waiting(current) if current == wait) {
            tracing::info!(
                export = self.export,
                "the client did not come back: the block device is writable again"
            );
            self.give_back(inner);
        }
    }
}

impl fmt::Debug for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ownership({}: {})", self.export, self.state())
    }
}
