//! The states of ownership and the ways between them.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::identity::Identity;
use super::note::{ClientNote, Folder, Holder, Machine, Note};
use super::types::{BlockDoor, Client, KeptFor, OwnershipState, Refused};
use crate::engine::StorageControl;
use crate::engine::events::{self, What};
use crate::engine::repeats::{Omitted, Repeats};

/// How long a client waits for another one that is already gone, for the end of a grace, and for the doors to open.
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
    Waiting(Wait),
    Closed,
}

/// A disk that is kept for a client that may come back.
pub(super) struct Wait {
    /// Tells one wait from another.
    number: u64,
    until: Instant,
    pub(super) holder: Holder,
    /// Ends it when its time is over.
    _alarm: Box<dyn Send>,
}

impl Wait {
    /// Whether a client that presents `identity` may have the disk.
    ///
    /// # Errors
    ///
    /// For which client it is kept, and how long.
    fn admits(&self, identity: &Identity, machine: &dyn Machine) -> Result<(), Refused> {
        let kept = &self.holder.identity;
        let admits = match kept {
            _ if kept.is_unknown() => true,
            // The source starts its vrings whenever it reconnects, whether the guest is still there or not.
            // Without memory it cannot be told from a target in the same process.
            _ if self.holder.moving => kept.memory.is_none() || !kept.is(identity),
            _ if kept.is(identity) => true,
            // Only in-flight memory could be with another process.
            Identity {
                memory: None,
                process: Some(process),
            } => !machine.is_running(*process),
            _ => false,
        };
        let seconds = self.seconds_left();
        match self.holder.moving {
            _ if admits => Ok(()),
            true => Err(Refused::Moving { seconds }),
            false => Err(Refused::Kept {
                client: self.holder.to_string(),
                seconds,
            }),
        }
    }

    /// Whether another client waits for the end of this instead of being refused: a virtual machine that was killed and
    /// is started again is another client, and a driver that is refused at its first vring hangs.
    fn ends_soon(&self, machine: &dyn Machine) -> bool {
        let process = self.holder.identity.process;
        let has_ended = process.is_some_and(|process| !machine.is_running(process));
        has_ended && !self.holder.moving && self.until <= Instant::now() + SUCCESSION_LIMIT
    }

    fn seconds_left(&self) -> u64 {
        let left = self.until.saturating_duration_since(Instant::now());
        left.as_secs() + u64::from(left.subsec_nanos() > 0)
    }
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
    waits: u64,
    /// The last wait whose time is over.
    expired: u64,
    /// As it is on disk, unless the last attempt to change it failed.
    pub(super) note: Note,
    /// That one failed: what is on disk is not known.
    note_failed: bool,
}

/// The right to write to one export. No door has it before [`Ownership::open`].
pub struct Ownership {
    pub(super) export: String,
    grace: Mutex<Duration>,
    pub(super) shared: bool,
    machine: Box<dyn Machine>,
    /// What the log says of clients that get the disk and give it back, which a guest can make happen at will.
    log: Repeats,
    /// Whether the note stays as it is. Locked before `inner`, and for every change of the note: it takes
    /// time to make one durable, and nothing may wait for `inner`.
    notes: Mutex<Closed>,
    inner: Mutex<Inner>,
    pub(super) changed: Condvar,
}

/// Whether the export is closed.
pub(super) type Closed = bool;

impl Ownership {
    /// For a disk that is `read_only` or not; `grace` is how long it is kept for a client that
    /// crashed. The file `note` tells which client has the disk: a server that comes after a crash reads
    /// it.
    #[must_use]
    pub fn new(
        export: &str,
        read_only: bool,
        grace: Duration,
        note: Option<ClientNote>,
    ) -> Arc<Self> {
        Self::on(Box::new(Folder(note)), export, read_only, grace)
    }

    pub(super) fn on(
        machine: Box<dyn Machine>,
        export: &str,
        read_only: bool,
        grace: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            export: export.to_owned(),
            grace: Mutex::new(grace),
            shared: read_only,
            notes: Mutex::default(),
            inner: Mutex::new(Inner {
                state: State::Opening,
                owner: 0,
                leases: 0,
                block: None,
                moves: false,
                storage: None,
                waits: 0,
                expired: 0,
                note: machine.read_note(),
                note_failed: false,
            }),
            machine,
            log: Repeats::new(10),
            changed: Condvar::new(),
        })
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change is one assignment, so a panic leaves a state that is one.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notes(&self) -> MutexGuard<'_, Closed> {
        // A flag is whole after any panic.
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a line of this kind is due in the log.
    pub(super) fn due(&self, kind: &str) -> Option<Omitted> {
        self.log.due(kind)
    }

    /// From now on a client that stops while its memory is being migrated may be succeeded by another.
    /// `storage` is claimed only while a client has the disk, so that another server can claim it
    /// otherwise; there must be no ublk door then.
    pub fn allow_moves(&self, storage: Option<Arc<dyn StorageControl>>) {
        let mut inner = self.inner();
        inner.moves = true;
        inner.storage = storage;
    }

    /// Whether an earlier server ended while a client had the disk, which is to be kept for it: the
    /// ublk door must be opened refusing writes.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        !self.shared && !self.grace().is_zero() && self.inner().note.holder.is_some()
    }

    /// Opens the export for clients, with the ublk door if there is one.
    pub fn open(self: &Arc<Self>, block: Option<Arc<dyn BlockDoor>>) {
        let mut inner = self.inner();
        inner.block = block;
        let (mut note, storage) = (inner.note.clone(), inner.storage.clone());
        drop(inner);
        let Some(holder) = note.holder.take().filter(|_| self.is_kept()) else {
            let closed = self.notes();
            self.note_or_warn(note);
            self.inner().state = State::Block;
            drop(closed);
            return self.changed.notify_all();
        };
        // In a move it may be the server of the target that is to have it.
        if !holder.moving
            && let Some(storage) = storage
            && let Err(why) = storage.claim(Duration::ZERO)
        {
            tracing::warn!(
                export = self.export,
                "another server may get the disk: {why}"
            );
        }
        self.keep(
            self.inner(),
            holder,
            "the last server ended while a client had the disk",
        );
    }

    /// Makes `note` the note of this export. The caller holds the lock of [`Self::notes`].
    pub(super) fn write_note(&self, note: Note) -> std::io::Result<()> {
        let inner = self.inner();
        if inner.note == note && !inner.note_failed {
            return Ok(());
        }
        drop(inner);
        let written = self.machine.write_note(&note);
        let mut inner = self.inner();
        inner.note_failed = written.is_err();
        if written.is_ok() {
            inner.note = note;
        }
        written
    }

    /// As [`Self::write_note`], where it is enough to warn.
    fn note_or_warn(&self, note: Note) {
        if let Err(error) = self.write_note(note) {
            tracing::warn!(
                export = self.export,
                "cannot note in the runtime directory that no client has the disk: {error}"
            );
        }
    }

    /// How long the disk is kept for a client that crashes.
    fn grace(&self) -> Duration {
        *self.grace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the disk is kept so long for a client that crashes. One that is waited for has the time of before.
    pub fn set_grace(&self, grace: Duration) {
        *self.grace.lock().unwrap_or_else(PoisonError::into_inner) = grace;
    }

    /// The ublk door has gone.
    pub fn forget_block_door(&self) {
        self.inner().block = None;
    }

    /// No client gets the disk any more, and what is noted of it stays.
    pub fn close(&self) {
        let mut closed = self.notes();
        *closed = true;
        self.inner().state = State::Closed;
        drop(closed);
        self.changed.notify_all();
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

    /// The client that the disk is kept for, if it is.
    #[must_use]
    pub fn kept_for(&self) -> Option<KeptFor> {
        match &self.inner().state {
            State::Waiting(wait) => Some(KeptFor {
                client: match wait.holder.moving {
                    true => format!("the target of the migration of {}", wait.holder.name),
                    false => wait.holder.to_string(),
                },
                seconds: wait.seconds_left(),
            }),
            _ => None,
        }
    }

    /// The client because of which another one is refused as soon as it connects.
    #[must_use]
    pub fn obstacle(&self) -> Option<String> {
        let moves = self.inner().moves;
        self.holder().filter(|_| !moves)
    }

    /// Waits while the disk is being passed on, and returns when it can be taken by a client that presents
    /// `identity`.
    pub(super) fn wait_for_turn(
        &self,
        identity: &Identity,
    ) -> Result<MutexGuard<'_, Inner>, Refused> {
        let deadline = Instant::now() + SUCCESSION_LIMIT + DRAIN_LIMIT;
        let mut inner = self.inner();
        loop {
            if inner.note.is_succeeded(identity) {
                return Err(Refused::Succeeded);
            }
            let refused = match &inner.state {
                State::Waiting(wait) => match wait.admits(identity, &*self.machine) {
                    Ok(()) => return Ok(inner),
                    Err(refused) if wait.ends_soon(&*self.machine) => refused,
                    Err(refused) => return Err(refused),
                },
                State::Block | State::Moving(_) => return Ok(inner),
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
        inner.state = State::Draining;
        let storage = inner.storage.clone();
        drop(inner);
        if let Some(storage) = storage {
            storage.release();
        }
        let closed = self.notes();
        if *closed {
            return;
        }
        let mut note = self.inner().note.clone();
        note.holder = None;
        self.note_or_warn(note);
        let mut inner = self.inner();
        if let Some(block) = &inner.block {
            block.open();
        }
        inner.state = State::Block;
        drop(inner);
        drop(closed);
        events::tell(&self.export, What::Returned);
        self.changed.notify_all();
    }

    /// Keeps the disk for a client that may come back, and gives it back if that does not in time. The caller has
    /// read under the same lock which client had it.
    pub(super) fn keep<'a>(
        self: &'a Arc<Self>,
        mut inner: MutexGuard<'a, Inner>,
        holder: Holder,
        why: &str,
    ) {
        if let State::Closed = inner.state {
            return;
        }
        let grace = self.grace();
        if grace.is_zero() {
            return self.give_back(inner);
        }
        inner.waits += 1;
        let number = inner.waits;
        // An export that is gone needs no end of its wait.
        let waiting = Arc::downgrade(self);
        let end = Box::new(move || {
            if let Some(ownership) = waiting.upgrade() {
                ownership.end_wait(number);
            }
        });
        let alarm = match self.machine.call_after(grace, end) {
            Ok(alarm) => alarm,
            Err(error) => {
                tracing::error!(export = self.export, %error, "cannot wait for the client");
                return self.give_back(inner);
            }
        };
        let seconds = grace.as_secs_f32();
        match (self.due(why), holder.moving) {
            (Some(omitted), true) => tracing::warn!(
                export = self.export,
                "{why}: it had stopped for a migration, and the disk is kept for the target for {seconds} s{omitted}"
            ),
            (Some(omitted), false) => tracing::warn!(
                export = self.export,
                "{why}: it is kept for {holder} for {seconds} s{omitted}"
            ),
            (None, _) => {}
        }
        inner.state = State::Waiting(Wait {
            number,
            until: Instant::now() + grace,
            holder,
            _alarm: alarm,
        });
        drop(inner);
        self.changed.notify_all();
    }

    /// Gives the disk back when the time of this wait is over, if it still lasts.
    fn end_wait(&self, number: u64) {
        let mut inner = self.inner();
        inner.expired = inner.expired.max(number);
        if matches!(&inner.state, State::Waiting(wait) if wait.number == number) {
            let now = match inner.block {
                Some(_) => "the block device is writable again",
                None => "other clients may have the disk",
            };
            if let Some(omitted) = self.due("not back") {
                tracing::info!(
                    export = self.export,
                    "the client did not come back: {now}{omitted}"
                );
            }
            self.give_back(inner);
        }
    }

    /// Puts back the state and the owner of before a client was given the disk, which failed.
    pub(super) fn restore(&self, state: State, owner: u64) {
        let mut inner = self.inner();
        if !matches!(inner.state, State::Draining) {
            return;
        }
        inner.owner = owner;
        if matches!(&state, State::Waiting(wait) if wait.number <= inner.expired) {
            return self.give_back(inner);
        }
        inner.state = state;
        drop(inner);
        self.changed.notify_all();
    }
}

impl fmt::Debug for Ownership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ownership({}: {})", self.export, self.state())
    }
}
