//! How the disk gets to a client, step by step.

use std::sync::{Arc, MutexGuard};

use super::note::Holder;
use super::state::{DRAIN_LIMIT, Inner, Ownership, SUCCESSION_LIMIT, State};
use super::types::{BlockDoor, Client, Refused};
use crate::engine::events::{self, What};

/// A disk that is being given to a client. Unless that is [finished](Self::finish), everything is as
/// before when this is dropped, after a panic too.
pub(super) struct Taking<'a> {
    ownership: &'a Ownership,
    owner: u64,
    /// The state and the owner of before; `None` when it is finished.
    before: Option<(State, u64)>,
    /// The ublk door, if it was to refuse writes for this.
    closed: Option<Arc<dyn BlockDoor>>,
    claimed: bool,
}

impl<'a> Taking<'a> {
    /// From now on no other client gets the disk. `number` is that of the lease that does.
    pub(super) fn begin(
        ownership: &'a Ownership,
        mut inner: MutexGuard<'_, Inner>,
        number: u64,
    ) -> Self {
        let owner = std::mem::replace(&mut inner.owner, number);
        let state = std::mem::replace(&mut inner.state, State::Draining);
        Self {
            ownership,
            owner: number,
            before: Some((state, owner)),
            closed: None,
            claimed: false,
        }
    }

    /// Takes the disk from the ublk door, and from other servers. When this returns, all that the ublk door
    /// accepted is complete.
    pub(super) fn prepare(&mut self) -> Result<(), Refused> {
        let inner = self.ownership.inner();
        let (block, storage) = (inner.block.clone(), inner.storage.clone());
        drop(inner);
        if let (Some((State::Block, _)), Some(block)) = (&self.before, block) {
            if let Some(user) = block.in_use() {
                return Err(Refused::InUse(user));
            }
            let block = self.closed.insert(block);
            block.close(DRAIN_LIMIT).map_err(Refused::Drain)?;
        }
        if let Some(storage) = storage {
            // Where it is kept for a client it may be claimed already, and stays so.
            self.claimed = storage.claim(SUCCESSION_LIMIT).map_err(Refused::Storage)?;
        }
        Ok(())
    }

    /// Notes that the client has the disk, and gives it to it.
    pub(super) fn finish(mut self, client: Client) -> Result<(), Refused> {
        let ownership = self.ownership;
        // An export that is closed meanwhile is closed before, and the client does not get the disk, or after,
        // and it is noted.
        let closed = ownership.notes();
        if *closed {
            drop(closed);
            return Err(Refused::NotOpen);
        }
        let mut note = ownership.inner().note.clone();
        let source = match &self.before {
            Some((State::Moving(source), owner)) if *owner != self.owner => Some(source.identity),
            Some((State::Waiting(wait), _)) if wait.holder.moving => Some(wait.holder.identity),
            _ => None,
        };
        if let Some(source) = source {
            note.add_succeeded(source.without(&client.identity));
        }
        note.holder = Some(Holder {
            name: client.name.clone(),
            identity: client.identity,
            moving: false,
        });
        // Before the client's first write: the next server must know after a crash.
        if let Err(error) = ownership.write_note(note) {
            drop(closed);
            return Err(Refused::Note(error.to_string()));
        }
        let upgraded = What::Upgraded {
            client: client.name.clone(),
        };
        ownership.inner().state = State::Upgraded(client);
        self.before = None;
        drop(closed);
        events::tell(&ownership.export, upgraded);
        ownership.changed.notify_all();
        Ok(())
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        let Some((state, owner)) = self.before.take() else {
            return;
        };
        if self.claimed
            && let Some(storage) = self.ownership.inner().storage.clone()
        {
            storage.release();
        }
        if let Some(block) = &self.closed {
            block.open();
        }
        self.ownership.restore(state, owner);
    }
}
