//! What memory the server has mapped: the part of the control thread that tells it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vhost::VhostUserMemoryRegionInfo;

use super::connection::{Peer, described, described_region};
use super::control::{Control, DRAIN_INTERVAL, OWN_REGIONS};
use super::error::VhostUserError;
use super::memory::{RINGS_GUEST, Region};

/// How long requests in flight are waited for where the memory table cannot be changed with them.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// How long requests have the server to themselves again after that.
const TABLE_PAUSE: Duration = Duration::from_secs(10);

impl Control {
    /// Has a new server map all memory: what waiting requests may name, and what it takes of the rest.
    pub(super) fn map_all(
        &mut self,
        peer: &mut Peer,
        new: Vec<Arc<Region>>,
    ) -> Result<(), VhostUserError> {
        let regions = Arc::clone(&self.shared.regions);
        let needed = |is_taken: bool| match is_taken {
            true => Ok(()),
            false => Err(VhostUserError::Disk {
                socket: self.shared.socket.clone(),
                why: "the server refuses memory that requests lie in".into(),
            }),
        };
        if !peer.has_slots() {
            let count = self.mapped.len();
            self.mapped.extend(new);
            match peer.set_table(&self.table()) {
                Ok(true) => return Ok(()),
                Ok(false) => {
                    (self.mapped[count..].iter()).for_each(|region| regions.set_refused(region.id))
                }
                Err(error) => {
                    (self.mapped[count..].iter()).for_each(|region| regions.suspect(region.id));
                    return Err(error);
                }
            }
            self.mapped.truncate(count);
            return needed(peer.set_table(&self.table())?);
        }
        for region in &self.table() {
            needed(peer.add(region)?)?;
        }
        for region in new {
            match peer.add(&described_region(&region)) {
                Ok(true) => self.mapped.push(region),
                Ok(false) => self.refused(&region),
                Err(error) => {
                    regions.suspect(region.id);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// The server does not take a region: requests in it are copied.
    fn refused(&self, region: &Region) {
        self.shared.regions.set_refused(region.id);
        tracing::warn!(
            export = self.shared.export,
            "{}: the server refuses {} bytes of a client's memory: requests in it are copied",
            self.shared.name(),
            region.len_bytes
        );
    }

    /// All regions that the server is to have.
    fn table(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let bounce = &self.shared.bounce;
        let copies = described(bounce.guest(), bounce.len_bytes(), bounce.file(), 0);
        let rings = self
            .rings
            .as_ref()
            .map(|rings| described(RINGS_GUEST, rings.len_bytes(), rings.file(), 0));
        let clients = self.mapped.iter().map(|region| described_region(region));
        rings.into_iter().chain([copies]).chain(clients).collect()
    }

    /// Has the server map a region, if there is a server with room for it.
    pub(super) fn share(&mut self, id: u64) {
        let Some((region, is_mapped)) = self.shared.regions.get(id) else {
            return;
        };
        let Some(peer) = self.peer.as_ref().filter(|_| !is_mapped) else {
            return;
        };
        if !self.has_room() {
            if !std::mem::replace(&mut self.told_of_slots, true) {
                tracing::warn!(
                    export = self.shared.export,
                    "{}: the server takes {} regions of memory: requests in others are copied",
                    self.shared.name(),
                    peer.max_regions
                );
            }
            return;
        }
        let has_slots = peer.has_slots();
        self.mapped.push(Arc::clone(&region));
        let mut is_taken = true;
        let is_done = match has_slots {
            true => self.with_peer(|peer| {
                is_taken = peer.add(&described_region(&region))?;
                Ok(())
            }),
            false => self.replace_table(&mut is_taken),
        };
        if is_done && is_taken {
            self.shared.regions.set_mapped(id);
            return;
        }
        self.mapped.retain(|one| one.id != id);
        if self.peer.is_none() {
            self.shared.regions.suspect(id);
        } else if !is_taken {
            self.refused(&region);
            if !has_slots && !self.replace_table(&mut is_taken) {
                // What it has mapped now is not known.
                self.lost("the server cannot be told what memory it had");
            }
        }
    }

    /// Has the server unmap a region.
    pub(super) fn unshare(&mut self, id: u64) {
        if let Some(place) = self.mapped.iter().position(|region| region.id == id) {
            let region = self.mapped.remove(place);
            let has_slots = self.peer.as_ref().is_some_and(Peer::has_slots);
            let is_done = match has_slots {
                true => self.with_peer(|peer| peer.remove(&described_region(&region))),
                false => self.replace_table(&mut true),
            };
            if !is_done && self.peer.is_some() {
                self.not_taken_back.push(id);
                return;
            }
        }
        self.shared.regions.forget(id);
        self.share_another();
    }

    /// Has the server map a region that it has not, if there is one and room for it.
    fn share_another(&mut self) {
        let left = self.shared.regions.not_mapped();
        if let Some(id) = left.filter(|_| self.has_room()) {
            self.share(id);
        }
    }

    /// Makes the change of the memory table for which requests took too long.
    pub(super) fn change_table(&mut self) {
        self.next_table = None;
        if !self.not_taken_back.is_empty() {
            if !self.replace_table(&mut true) {
                return;
            }
            for id in std::mem::take(&mut self.not_taken_back) {
                self.shared.regions.forget(id);
            }
        }
        self.share_another();
    }

    fn has_room(&self) -> bool {
        let most = self.peer.as_ref().map_or(0, |peer| peer.max_regions);
        ((self.mapped.len() + OWN_REGIONS) as u64) < most
    }

    /// Replaces the memory table, when the server has no requests. Returns whether that was reached; if so, `is_taken`
    /// becomes whether the server took it.
    fn replace_table(&mut self, is_taken: &mut bool) -> bool {
        for queue in &self.shared.queues {
            queue.pause();
        }
        let table = self.table();
        let is_drained = self.drain(DRAIN_LIMIT);
        if !is_drained {
            self.next_table = Instant::now().checked_add(TABLE_PAUSE);
        }
        let is_done = is_drained
            && self.with_peer(|peer| {
                *is_taken = peer.set_table(&table)?;
                Ok(())
            });
        for queue in &self.shared.queues {
            queue.resume();
        }
        is_done
    }

    /// Waits until the server has no requests, while nothing is submitted.
    pub(super) fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            for queue in &self.shared.queues {
                if let Err(violation) = queue.reap() {
                    self.shared.violated(violation);
                }
            }
            if self.shared.queues.iter().all(|queue| queue.counts().0 == 0) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(DRAIN_INTERVAL);
        }
    }
}
