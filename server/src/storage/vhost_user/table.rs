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

/// The pause before it is tried again, and how long requests are held back then: one that the server does not answer must
/// not hold up the rest.
const TABLE_PAUSE: Duration = Duration::from_secs(2);
const SHORT_DRAIN_LIMIT: Duration = Duration::from_millis(100);

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
        self.share_within(id, DRAIN_LIMIT);
    }

    fn share_within(&mut self, id: u64, limit: Duration) {
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
            false => self.replace_table(&mut is_taken, limit),
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
            if !has_slots && !self.replace_table(&mut is_taken, DRAIN_LIMIT) {
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
                false => self.replace_table(&mut true, DRAIN_LIMIT),
            };
            if !is_done && self.peer.is_some() {
                // Requests took too long.
                return;
            }
        }
        self.shared.regions.forget(id);
        self.share_left(DRAIN_LIMIT);
    }

    /// Changes the memory table, if requests in flight have prevented that and it is time to try again.
    pub(super) fn finish_table(&mut self) {
        if self.peer.is_some() && self.next_table.is_some_and(|at| Instant::now() >= at) {
            self.next_table = None;
            let mut is_taken = true;
            if self.replace_table(&mut is_taken, SHORT_DRAIN_LIMIT) {
                match is_taken {
                    true => self.share_left(SHORT_DRAIN_LIMIT),
                    // What it has mapped now is not known.
                    false => self.lost("the server refuses memory that it had"),
                }
            }
        }
    }

    /// There may be room for regions that found none.
    fn share_left(&mut self, limit: Duration) {
        while self.next_table.is_none()
            && self.has_room()
            && let Some(id) = self.shared.regions.not_mapped()
        {
            // After this the server has it or has refused it, or there is no server, or it is tried again later.
            self.share_within(id, limit);
        }
    }

    fn has_room(&self) -> bool {
        let most = self.peer.as_ref().map_or(0, |peer| peer.max_regions);
        ((self.mapped.len() + OWN_REGIONS) as u64) < most
    }

    /// Replaces the memory table, when the server has no requests. Returns whether that was reached; if so, `is_taken`
    /// becomes whether the server took it. If requests take longer than `limit`, it is tried again later.
    fn replace_table(&mut self, is_taken: &mut bool, limit: Duration) -> bool {
        for queue in &self.shared.queues {
            queue.pause();
        }
        let table = self.table();
        let is_drained = self.drain(limit);
        let is_done = is_drained
            && self.with_peer(|peer| {
                *is_taken = peer.set_table(&table)?;
                Ok(())
            });
        if !is_drained {
            self.next_table = Instant::now().checked_add(TABLE_PAUSE);
        } else if is_done && *is_taken {
            self.shared.regions.forget_gone(&self.mapped);
        }
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
