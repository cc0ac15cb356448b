//! What a client has that may write.

use std::sync::{Arc, MutexGuard, PoisonError};

use super::{Access, DRAIN_LIMIT, Inner, Refused, SUCCESSION_LIMIT, State};

/// A client's hold on the disk. Dropping it is dying.
#[derive(Debug)]
pub struct Hold {
    /// `None` when the disk is shared, or the hold has ended.
    pub(super) access: Option<Arc<Access>>,
    /// One hold from another.
    pub(super) number: u64,
}

impl Hold {
    /// The client is gone and its last requests are being finished.
    pub fn drain(&self) {
        if let Some(access) = &self.access
            && let Some(mut inner) = self.owned(access)
            && let State::Upgraded(_) | State::Moving(_) = inner.state
        {
            inner.state = State::Draining;
        }
    }

    /// The client has stopped for a live migration, and nothing of it is under way. Where clients may
    /// move, another one may take the disk over from now on, also one of another server.
    pub fn rest(&self) {
        let Some(access) = &self.access else {
            return;
        };
        let Some(mut inner) = self.owned(access) else {
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
        let mut inner = access.inner();
        if let State::Draining = inner.state {
            tracing::info!(
                export = access.export,
                "{} has stopped for a migration: another client may go on",
                client.name
            );
            inner.state = State::Moving(client);
        }
        drop(inner);
        access.changed.notify_all();
    }

    /// The client is about to go on. False when another one has taken the disk over, and this hold is
    /// void.
    ///
    /// # Errors
    ///
    /// When another server has the storage.
    pub fn resume(&self) -> Result<bool, Refused> {
        let Some(access) = &self.access else {
            return Ok(true);
        };
        let Some(inner) = self.owned(access) else {
            return Ok(false);
        };
        let State::Moving(client) = &inner.state else {
            return Ok(true);
        };
        let client = client.clone();
        access.pass_on(inner, self.number)?;
        tracing::info!(export = access.export, "{} goes on here", client.name);
        access.give_to(client)?;
        Ok(true)
    }

    /// The state, if the disk is this hold's. Waits while somebody else is getting it.
    fn owned<'a>(&self, access: &'a Access) -> Option<MutexGuard<'a, Inner>> {
        let elsewhere = |inner: &mut Inner| {
            inner.owner != self.number && matches!(inner.state, State::Draining)
        };
        let (inner, _) = access
            .changed
            .wait_timeout_while(access.inner(), DRAIN_LIMIT + SUCCESSION_LIMIT, elsewhere)
            .unwrap_or_else(PoisonError::into_inner);
        (inner.owner == self.number).then_some(inner)
    }

    /// The client left, and nothing of it is under way.
    pub fn leave(mut self) {
        if let Some(access) = self.access.take()
            && let Some(inner) = self.owned(&access)
        {
            access.give_back(inner);
            tracing::info!(
                export = access.export,
                "the client left: now {}",
                access.state()
            );
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let Some(access) = self.access.take() else {
            return;
        };
        let owned = self.owned(&access).is_some();
        if owned {
            access.await_return("the client died that had the disk");
        }
    }
}
