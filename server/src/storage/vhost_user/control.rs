//! The thread that keeps the connection: it connects again, tells the server of memory, and hears of another size.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::{MEMORY_LIMIT, Peer, REPLY_LIMIT};
use super::error::VhostUserError;
use super::memory::{RINGS_GUEST, Region};
use super::shared::{Order, Shared};
use super::virtqueue::{Live, new_eventfd};
use super::vring::{RingMemory, Vring};
use crate::engine::repeats::Repeats;

/// Pauses between attempts to connect: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A connection that lasted so long was a good one: the next is made at once.
const GOOD_CONNECTION: Duration = Duration::from_secs(1);

/// How long the server may take to answer when it is left.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

/// Pauses between two looks at requests that are waited for.
pub(super) const DRAIN_INTERVAL: Duration = Duration::from_millis(1);

/// Regions that are always there: rings, and memory for copies.
pub(super) const OWN_REGIONS: usize = 2;

/// The connection and what the server has.
pub(super) struct Control {
    pub(super) shared: Arc<Shared>,
    orders: Receiver<Order>,
    bell: Arc<OwnedFd>,
    pub(super) peer: Option<Peer>,
    /// The rings of this connection.
    pub(super) rings: Option<Arc<RingMemory>>,
    /// Regions of clients that the server has mapped.
    pub(super) mapped: Vec<Arc<Region>>,
    pause: Duration,
    next_attempt: Option<Instant>,
    connected_at: Instant,
    losses: Repeats,
    /// Whether the log says that the server is away.
    told_of_loss: bool,
    pub(super) told_of_slots: bool,
    /// When the memory table is to be changed, which requests in flight have prevented.
    pub(super) next_table: Option<Instant>,
}

/// What the export is told when the server's disk has another size.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tell {
    Change,
    /// It has asked.
    Nothing,
}

/// What to do after the orders that there are.
#[derive(PartialEq, Eq)]
enum Then {
    Serve,
    End,
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>, orders: Receiver<Order>, bell: Arc<OwnedFd>) -> Self {
        Self {
            shared,
            orders,
            bell,
            peer: None,
            rings: None,
            mapped: Vec::new(),
            pause: FIRST_PAUSE,
            next_attempt: None,
            connected_at: Instant::now(),
            losses: Repeats::new(1),
            told_of_loss: false,
            told_of_slots: false,
            next_table: None,
        }
    }

    /// Has a server that was connected to serve the requests.
    pub(super) fn begin(&mut self, mut peer: Peer) -> Result<(), VhostUserError> {
        let stream = peer.stream().map_err(|error| VhostUserError::Disk {
            socket: self.shared.socket.clone(),
            why: error.to_string(),
        })?;
        let epoch = self.shared.connected(stream);
        peer.limit_all(Some(MEMORY_LIMIT));
        let begun = self.start(&mut peer, epoch);
        match begun {
            Ok(()) => {
                peer.limit_all(None);
                self.peer = Some(peer);
                self.shared.arrived();
            }
            Err(_) => {
                self.forget();
                let _ = self.shared.disconnected();
            }
        }
        begun
    }

    fn start(&mut self, peer: &mut Peer, epoch: u64) -> Result<(), VhostUserError> {
        let shared = Arc::clone(&self.shared);
        shared.end_pause();
        let unusable = |why: String| VhostUserError::Disk {
            socket: shared.socket.clone(),
            why,
        };
        let failed = |error: std::io::Error| unusable(error.to_string());
        // The number was made from that of a server's queues, which are fewer.
        let count = u16::try_from(shared.queues.len()).unwrap_or(u16::MAX);
        if peer.queues < count {
            return Err(unusable(format!(
                "the server has {} queues now and had {count}",
                peer.queues
            )));
        }
        let rings = Arc::new(RingMemory::new(count, RINGS_GUEST).map_err(failed)?);
        self.rings = Some(Arc::clone(&rings));
        let room = usize::try_from(peer.max_regions).unwrap_or(usize::MAX);
        let room = room.saturating_sub(OWN_REGIONS);
        let (had, new): (Vec<_>, Vec<_>) = shared
            .regions
            .present()
            .into_iter()
            .partition(|(_, was_mapped)| *was_mapped);
        if had.len() > room {
            return Err(unusable(format!(
                "the server takes {room} regions of clients' memory, and requests that wait need {}",
                had.len()
            )));
        }
        let regions = |list: Vec<(Arc<Region>, bool)>| list.into_iter().map(|(region, _)| region);
        self.mapped = regions(had).collect();
        let new = regions(new).take(room - self.mapped.len()).collect();
        self.map_all(peer, new)?;
        let mut eventfds = Vec::new();
        for index in 0..count {
            let kick = new_eventfd().map_err(failed)?;
            let call = new_eventfd().map_err(failed)?;
            peer.start(index, &rings, (&kick, &call))?;
            eventfds.push((kick, call));
        }
        for region in &self.mapped {
            shared.regions.set_mapped(region.id);
        }
        for ((index, queue), (kick, call)) in (0..count).zip(&shared.queues).zip(eventfds) {
            queue.begin(Live {
                vring: Vring::new(Arc::clone(&rings), index, peer.disk.has_indirect()),
                kick: Arc::new(kick),
                call: Arc::new(call),
                epoch,
            });
        }
        Ok(())
    }

    /// Serves until it is told to end.
    pub(super) fn run(mut self) {
        loop {
            if self.peer.is_none() && self.next_attempt.is_none_or(|at| Instant::now() >= at) {
                self.connect_again();
            }
            let ready = self.wait();
            if ready.bell {
                let _ = rustix::io::read(&self.bell, &mut [0; 8]);
            }
            if self.obey() == Then::End {
                return;
            }
            if ready.hang_up {
                let said = self.peer.as_ref().is_some_and(Peer::has_said_something);
                self.lost(match said {
                    true => "the server broke the protocol: it sent what it was not asked for",
                    false => "the server hung up",
                });
            } else if ready.message {
                self.take_message();
            }
            self.finish_table();
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Ready {
        let limit = match self.peer {
            None => self.next_attempt,
            Some(_) => self.next_table,
        };
        let limit = limit.map(|at| at.saturating_duration_since(Instant::now()));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = vec![readable(self.bell.as_fd())];
        if let Some(peer) = &self.peer {
            fds.push(readable(peer.socket()));
            fds.extend(peer.channel().map(readable));
        }
        // An interrupted wait is a short one.
        let _ = poll(&mut fds, limit.as_ref());
        let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ready {
            bell: is_ready(0),
            hang_up: is_ready(1),
            message: is_ready(2),
        }
    }

    /// Does what was asked for.
    fn obey(&mut self) -> Then {
        loop {
            match self.orders.try_recv() {
                Ok(Order::Share(id, tried)) => {
                    self.share(id);
                    // It may not be waited for any more.
                    let _ = tried.send(());
                }
                Ok(Order::Unshare(id)) => self.unshare(id),
                Ok(Order::Look(answer)) => {
                    if answer.send(self.look(Tell::Nothing)).is_err() {
                        // It is not waited for any more.
                        self.shared.tell_change();
                    }
                }
                Ok(Order::End) | Err(TryRecvError::Disconnected) => {
                    self.leave();
                    return Then::End;
                }
                Err(TryRecvError::Empty) => return Then::Serve,
            }
        }
    }

    fn connect_again(&mut self) {
        let shared = Arc::clone(&self.shared);
        let name = shared.name();
        let note = |stream| {
            shared.connected(stream);
        };
        let connected = Peer::connect(&shared.socket, REPLY_LIMIT, note).and_then(|peer| {
            let served_bytes = shared.capacity.bytes();
            let fits = shared.disk.may_become(&peer.disk, served_bytes);
            fits.map_err(|why| VhostUserError::Disk {
                socket: shared.socket.clone(),
                why: format!("{why}; requests wait for the disk of before"),
            })?;
            let size_bytes = peer.disk.size_bytes;
            self.begin(peer).map(|()| size_bytes)
        });
        match connected {
            Ok(size_bytes) => {
                self.next_attempt = None;
                self.connected_at = Instant::now();
                if std::mem::take(&mut self.told_of_loss) {
                    tracing::info!(export = shared.export, "{name}: the server is back");
                }
                self.note_size(size_bytes, Tell::Change);
            }
            Err(error) => {
                let _ = shared.disconnected();
                let why = error.to_string();
                let is_paused = shared.is_paused();
                if is_paused {
                    self.pause = FIRST_PAUSE;
                }
                // In a pause there is none for a while.
                if shared.set_away(&why)
                    && (!is_paused || shared.socket.exists())
                    && let Some(omitted) = self.losses.due_whatever_numbers(&why)
                {
                    self.told_of_loss = true;
                    tracing::warn!(export = shared.export, "{why}{omitted}");
                }
                self.try_later();
            }
        }
    }

    /// The connection is lost. Requests wait for the next one.
    pub(super) fn lost(&mut self, why: &str) {
        if self.peer.is_none() {
            return;
        }
        let lost = self.forget();
        let shared = &self.shared;
        let violation = shared.disconnected();
        if violation.is_none() && shared.is_paused() {
            self.told_of_loss = false;
            shared.set_away("it is being restarted for a snapshot");
            self.pause = FIRST_PAUSE;
            self.next_attempt = None;
            return;
        }
        let why = match violation {
            Some(violation) => {
                format!("the server broke the protocol and was disconnected: {violation}")
            }
            None => why.to_owned(),
        };
        shared.set_away(&why);
        let waiting = shared.pending();
        let (export, name) = (&shared.export, shared.name());
        if let Some(omitted) = self.losses.due_whatever_numbers(&why) {
            self.told_of_loss = true;
            let text = format!("{name}: {why}; {waiting} requests wait until it is back{omitted}");
            match violation {
                Some(_) => tracing::error!(export, "{text}"),
                None => tracing::warn!(export, "{text}"),
            }
        }
        if lost > 0 {
            tracing::error!(
                export,
                "{name}: {lost} writes were answered and not flushed when the server went away: it may have lost them, so \
                 the next flush fails (a server without a write-back cache loses none)"
            );
        }
        match violation.is_none() && self.connected_at.elapsed() >= GOOD_CONNECTION {
            true => {
                self.pause = FIRST_PAUSE;
                self.next_attempt = None;
            }
            // It may do the same again.
            false => self.try_later(),
        }
    }

    /// Has the next attempt to connect wait, the longer the more there were.
    fn try_later(&mut self) {
        self.next_attempt = Instant::now().checked_add(self.pause);
        self.pause = (2 * self.pause).min(LONGEST_PAUSE);
    }

    /// Lets go of the connection. Returns how many answered writes the server may have lost.
    fn forget(&mut self) -> u64 {
        for queue in &self.shared.queues {
            queue.end();
        }
        let lost = self.shared.forgotten();
        self.peer = None;
        self.rings = None;
        self.mapped.clear();
        self.next_table = None;
        lost
    }

    /// Does something with the server, which is lost if that fails.
    pub(super) fn with_peer(
        &mut self,
        act: impl FnOnce(&mut Peer) -> Result<(), VhostUserError>,
    ) -> bool {
        let Some(peer) = &mut self.peer else {
            return false;
        };
        match act(peer) {
            Ok(()) => true,
            Err(error) => {
                self.lost(&error.to_string());
                false
            }
        }
    }

    fn take_message(&mut self) {
        let mut is_changed = false;
        let taken = self.with_peer(|peer| {
            is_changed = peer.take_message()?;
            Ok(())
        });
        if taken && is_changed {
            let _ = self.look(Tell::Change);
        }
    }

    /// Reads how large the disk is.
    fn look(&mut self, tell: Tell) -> Result<u64, String> {
        let Some(peer) = &mut self.peer else {
            return Err(self.shared.waits_for().unwrap_or_default());
        };
        match peer.look() {
            Ok(disk) => {
                self.note_size(disk.size_bytes, tell);
                Ok(disk.size_bytes)
            }
            Err(error) => {
                let why = error.to_string();
                self.lost(&why);
                Err(why)
            }
        }
    }

    fn note_size(&self, size_bytes: u64, tell: Tell) {
        let before = self.shared.size_bytes.swap(size_bytes, Ordering::Relaxed);
        if before != size_bytes && tell == Tell::Change {
            self.shared.tell_change();
        }
    }

    /// Ends the session, in order if no request is under way. There is no other one after it.
    fn leave(&mut self) {
        for queue in &self.shared.queues {
            queue.pause();
        }
        let count = u16::try_from(self.shared.queues.len()).unwrap_or(u16::MAX);
        if self.drain(DRAIN_INTERVAL)
            && let Some(peer) = &mut self.peer
        {
            // A server that does not answer finds the connection closed.
            let _ = peer.leave(count, LEAVE_LIMIT);
        }
        self.forget();
        // The others that have the socket let go of it too.
        let _ = self.shared.disconnected();
        self.shared.set_away("the export has ended");
    }
}

/// What can be read.
struct Ready {
    bell: bool,
    hang_up: bool,
    message: bool,
}
