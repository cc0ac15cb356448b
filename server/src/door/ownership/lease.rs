//! A client's lease of the right to write.

use std::sync::{Arc, MutexGuard, PoisonError};

use super::identity::Identity;
use super::state::{DRAIN_LIMIT, Inner, Ownership, SUCCESSION_LIMIT, State};
use super::taking::Taking;
use super::types::{Client, Refused};

/// A client's lease of the disk. Dropping it without [`leave`](Self::leave) is treated as a client crash.
#[derive(Debug)]
pub struct Lease {
    /// `None` when the disk is shared, or the lease has ended.
    pub(super) ownership: Option<Arc<Ownership>>,
    /// Tells one lease from another.
    pub(super) number: u64,
}

impl Lease {
    /// The client is gone and its last requests are being finished.
    pub fn drain(&self) {
        if let Some(ownership) = &self.ownership
            && let Some(mut inner) = self.owned(ownership)
            && let State::Upgraded(_) | State::Moving(_) = inner.state
        {
            inner.state = State::Draining;
        }
    }

    /// The client has stopped all its vrings, and nothing of it is under way. If it stopped for a live migration
    /// and clients may move, another one may take the disk over from now on, also one of another server.
    pub fn rest(&self, is_migrating: bool) {
        let Some(ownership) = &self.ownership else {
            return;
        };
        let Some(inner) = self.owned(ownership) else {
            return;
        };
        let State::Upgraded(client) = &inner.state else {
            return;
        };
        let client = client.clone();
        if is_migrating && inner.moves {
            return self.move_on(ownership, inner, client);
        }
        drop(inner);
        match self.note(ownership, client.identity.at_rest()) {
            Ok(()) | Err(Refused::NotOpen) => {}
            Err(error) => tracing::warn!(export = ownership.export, "{error}"),
        }
    }

    fn move_on(&self, ownership: &Ownership, mut inner: MutexGuard<'_, Inner>, client: Client) {
        inner.state = State::Draining;
        let storage = inner.storage.clone();
        drop(inner);
        // First, since another server may have the disk as soon as the storage is released.
        let closed = ownership.notes();
        if !*closed {
            let mut note = ownership.inner().note.clone();
            if let Some(holder) = &mut note.holder {
                holder.moving = true;
            }
            if let Err(error) = ownership.write_note(note) {
                tracing::warn!(
                    export = ownership.export,
                    "after a crash the disk would be kept for the source of the migration: {error}"
                );
            }
        }
        drop(closed);
        if let Some(storage) = storage {
            storage.release();
        }
        let mut inner = ownership.inner();
        if let State::Draining = inner.state {
            if let Some(omitted) = ownership.due("moving") {
                tracing::info!(
                    export = ownership.export,
                    "{} has stopped for a migration: another client may go on{omitted}",
                    client.name
                );
            }
            inner.state = State::Moving(client);
        }
        drop(inner);
        ownership.changed.notify_all();
    }

    /// The client, which presents `identity`, is about to start a vring. False when another one has taken the disk
    /// over, and this lease is void.
    ///
    /// # Errors
    ///
    /// When another server has the storage, or the identity cannot be noted.
    pub fn resume(&self, identity: Identity) -> Result<bool, Refused> {
        let Some(ownership) = &self.ownership else {
            return Ok(true);
        };
        let Some(inner) = self.owned(ownership) else {
            return Ok(false);
        };
        match &inner.state {
            State::Moving(client) => {
                let client = Client {
                    identity,
                    ..client.clone()
                };
                let name = client.name.clone();
                let mut taking = Taking::begin(ownership, inner, self.number);
                taking.prepare()?;
                taking.finish(client)?;
                if let Some(omitted) = ownership.due("on") {
                    tracing::info!(
                        export = ownership.export,
                        "{name} has the disk again{omitted}"
                    );
                }
            }
            State::Upgraded(client) if client.identity != identity => {
                drop(inner);
                self.note(ownership, identity)?;
            }
            _ => {}
        }
        Ok(true)
    }

    /// Notes that the client that has the disk is recognised by `identity` from now on.
    fn note(&self, ownership: &Ownership, identity: Identity) -> Result<(), Refused> {
        let closed = ownership.notes();
        if *closed {
            return Err(Refused::NotOpen);
        }
        let mut note = ownership.inner().note.clone();
        if let Some(holder) = &mut note.holder {
            holder.identity = identity;
        }
        ownership
            .write_note(note)
            .map_err(|error| Refused::Note(error.to_string()))?;
        let mut inner = ownership.inner();
        if let State::Upgraded(client) = &mut inner.state {
            client.identity = identity;
        }
        Ok(())
    }

    /// The state, if the disk is leased to this client. Waits while it is being passed on.
    fn owned<'a>(&self, ownership: &'a Ownership) -> Option<MutexGuard<'a, Inner>> {
        let elsewhere = |inner: &mut Inner| {
            inner.owner != self.number && matches!(inner.state, State::Draining)
        };
        let (inner, _) = ownership
            .changed
            .wait_timeout_while(ownership.inner(), DRAIN_LIMIT + SUCCESSION_LIMIT, elsewhere)
            .unwrap_or_else(PoisonError::into_inner);
        (inner.owner == self.number).then_some(inner)
    }

    /// The client left, and nothing of it is under way. In the middle of a move the disk is kept for the target: whether
    /// that comes is not known here.
    pub fn leave(mut self) {
        let Some(ownership) = self.ownership.take() else {
            return;
        };
        let Some(inner) = self.owned(&ownership) else {
            return;
        };
        if let Some(holder) = inner.note.holder.clone().filter(|holder| holder.moving) {
            return ownership.keep(inner, holder, "the client that had the disk disconnected");
        }
        ownership.give_back(inner);
        if let Some(omitted) = ownership.due("left") {
            tracing::info!(
                export = ownership.export,
                "the client left: now {}{omitted}",
                ownership.state()
            );
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(ownership) = self.ownership.take() else {
            return;
        };
        let Some(inner) = self.owned(&ownership) else {
            return;
        };
        match inner.note.holder.clone() {
            Some(holder) => ownership.keep(
                inner,
                holder,
                "the client that had the disk disconnected without stopping",
            ),
            None => ownership.give_back(inner),
        }
    }
}

impl Ownership {
    /// Gives the disk to a client. When this returns, all that the ublk door accepted is complete.
    ///
    /// # Errors
    ///
    /// When the client cannot have it; nothing has changed then.
    pub fn take(self: &Arc<Self>, client: Client) -> Result<Lease, Refused> {
        if self.shared {
            return Ok(Lease {
                ownership: None,
                number: 0,
            });
        }
        let mut inner = self.wait_for_turn(&client.identity)?;
        inner.leases += 1;
        let number = inner.leases;
        let again = matches!(inner.state, State::Waiting(_) | State::Moving(_));
        let has_block_door = inner.block.is_some();
        let name = client.name.clone();
        let mut taking = Taking::begin(self, inner, number);
        taking.prepare()?;
        taking.finish(client)?;
        match (again, has_block_door) {
            (false, false) => {}
            (true, _) => {
                if let Some(omitted) = self.due("again") {
                    tracing::info!(export = self.export, "upgraded again: {name}{omitted}");
                }
            }
            (false, true) => {
                if let Some(omitted) = self.due("upgraded") {
                    tracing::info!(
                        export = self.export,
                        "upgraded: {name}; the block device is read-only meanwhile{omitted}"
                    );
                }
            }
        }
        Ok(Lease {
            ownership: Some(Arc::clone(self)),
            number,
        })
    }
}
