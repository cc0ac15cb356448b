//! A client's lease of the right to write.

use std::sync::{Arc, MutexGuard, PoisonError};

use super::state::{DRAIN_LIMIT, Inner, Ownership, SUCCESSION_LIMIT, State};
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

    /// The client has stopped for a live migration, and nothing of it is under way. Where clients may
    /// move, another one may take the disk over from now on, also one of another server.
    pub fn rest(&self) {
        let Some(ownership) = &self.ownership else {
            return;
        };
        let Some(mut inner) = self.owned(ownership) else {
            return;
        };
        let State::Upgraded(client) = &inner.state else {
            return;
        };
        if !inner.moves {
            return;
        }
        let client = client.clone();
        inner.state = State::Draining;
        let storage = inner.storage.clone();
        drop(inner);
        if let Some(storage) = storage {
            storage.release();
        }
        let mut inner = ownership.inner();
        if let State::Draining = inner.state {
            tracing::info!(
                export = ownership.export,
                "{} has stopped for a migration: another client may go on",
                client.name
            );
            inner.state = State::Moving(client);
        }
        drop(inner);
        ownership.changed.notify_all();
    }

    /// The client is about to go on. False when another one has taken the disk over, and this lease is
    /// void.
    ///
    /// # Errors
    ///
    /// When another server has the storage.
    pub fn resume(&self) -> Result<bool, Refused> {
        let Some(ownership) = &self.ownership else {
            return Ok(true);
        };
        let Some(inner) = self.owned(ownership) else {
            return Ok(false);
        };
        let State::Moving(client) = &inner.state else {
            return Ok(true);
        };
        let client = client.clone();
        ownership.pass_on(inner, self.number)?;
        tracing::info!(export = ownership.export, "{} goes on here", client.name);
        ownership.give_to(client)?;
        Ok(true)
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

    /// The client left, and nothing of it is under way.
    pub fn leave(mut self) {
        if let Some(ownership) = self.ownership.take()
            && let Some(inner) = self.owned(&ownership)
        {
            ownership.give_back(inner);
            tracing::info!(
                export = ownership.export,
                "the client left: now {}",
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
        let owned = self.owned(&ownership).is_some();
        if owned {
            ownership.await_return("the client that had the disk disconnected without stopping");
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
        let mut inner = self.wait_for_turn()?;
        inner.leases += 1;
        let number = inner.leases;
        let lease = || Lease {
            ownership: Some(Arc::clone(self)),
            number,
        };
        if let State::Waiting(_) | State::Moving(_) = inner.state {
            self.pass_on(inner, number)?;
            tracing::info!(export = self.export, "upgraded again: {}", client.name);
            self.give_to(client)?;
            return Ok(lease());
        }
        let Some(block) = inner.block.clone() else {
            self.pass_on(inner, number)?;
            self.give_to(client)?;
            return Ok(lease());
        };
        inner.owner = number;
        inner.state = State::Draining;
        drop(inner);
        // Whatever goes wrong from here on, a panic included, the ublk door gets the disk back.
        let undo = BackToBlock(self);
        if let Some(who) = block.in_use() {
            return Err(Refused::InUse(who));
        }
        block.close(DRAIN_LIMIT).map_err(Refused::Drain)?;
        // Before the client's first write: the next server must know after a crash.
        self.note()
            .map_err(|error| Refused::Note(error.to_string()))?;
        std::mem::forget(undo);
        let name = client.name.clone();
        self.give_to(client).inspect_err(|_| {
            // The export has been closed meanwhile. Its next server is not to wait for this client.
            self.unnote();
            block.open();
        })?;
        tracing::info!(
            export = self.export,
            "upgraded: {name}; the block device is read-only meanwhile"
        );
        Ok(lease())
    }
}

/// Undoes a take that failed half way.
struct BackToBlock<'a>(&'a Ownership);

impl Drop for BackToBlock<'_> {
    fn drop(&mut self) {
        self.0.give_back(self.0.inner());
    }
}
