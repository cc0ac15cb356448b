//! One client's session: the vhost-user protocol, on a thread of its own.
//!
//! Vring `i` is served by queue thread `i % threads`; a thread is started with its first vring and ends
//! with the session.

mod messages;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::config::MAX_VRINGS;
use super::config_space;
use super::connection::Connection;
use super::dirty::{DirtyLog, Logging};
use super::inflight::InflightBuffer;
use super::memory::{MAX_MAPPINGS, MemoryMap, Region};
use super::message::{Error, Message, Result, refuse};
use super::queue::Command;
use super::ring_layout::{RingAddresses, used_ring_bytes};
use super::vring::Start;
use crate::door::ownership::{Client, Identity, Lease, Ownership};
use crate::engine::Sharing;
use crate::engine::mailbox::Sender;

/// `VHOST_F_LOG_ALL`: what requests write is marked in the log of dirty pages.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// How often a thread that waits for a queue thread checks whether the client is still there.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// A running queue thread.
pub(super) struct QueueHandle {
    pub mail: Sender<Command>,
    pub thread: JoinHandle<()>,
}

/// Starts queue thread `n` of a session.
pub(super) type Spawn = Box<dyn Fn(u16) -> io::Result<QueueHandle> + Send>;

/// How a session ended.
#[derive(Debug)]
pub(super) enum Ending {
    /// The client stopped all its vrings and hung up.
    Left,
    /// The client hung up with vrings running.
    Died {
        /// Requests that it had no answer to.
        unanswered: usize,
    },
    /// The client broke the protocol, or the server could not do what it asked.
    Failed(io::Error),
}

/// A vring as far as the client has described it.
#[derive(Default)]
struct VringSetup {
    size: u16,
    addresses: Option<RingAddresses>,
    /// Where the used ring is for the log of dirty pages, if its writes are to be marked.
    used_guest: Option<u64>,
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    enabled: bool,
    started: bool,
}

/// How many queues and threads a session has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Virtqueues that the client is told of.
    pub queues: u16,
    /// Threads that serve them.
    pub threads: u16,
}

/// What the client has set up so far.
pub(super) struct Session {
    connection: Arc<Connection>,
    sizes: Sizes,
    spawn: Spawn,
    ownership: Arc<Ownership>,
    /// Takes the client's memory, where the storage hands it on.
    sharing: Option<Arc<dyn Sharing>>,
    /// The right to the disk, from the first vring on.
    lease: Option<Lease>,
    threads: BTreeMap<u16, QueueHandle>,
    map: Arc<MemoryMap>,
    /// Maps before that one, which requests in flight may still use.
    old_maps: Vec<Weak<MemoryMap>>,
    inflight: Option<InflightBuffer>,
    /// The log of dirty pages; it is used while `LOG_ALL` or a vring asks for it.
    log: Option<Arc<DirtyLog>>,
    features: u64,
    /// What was agreed on besides.
    protocol: VhostUserProtocolFeatures,
    /// The device's status (virtio 1.3, 2.1), as the client sets it.
    status: u8,
    vrings: Vec<VringSetup>,
}

impl Session {
    pub(super) fn new(
        connection: Arc<Connection>,
        sizes: Sizes,
        spawn: Spawn,
        ownership: Arc<Ownership>,
    ) -> Self {
        Self {
            connection,
            sizes,
            spawn,
            ownership,
            sharing: None,
            lease: None,
            threads: BTreeMap::new(),
            map: Arc::default(),
            old_maps: Vec::new(),
            inflight: None,
            log: None,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            status: 0,
            vrings: Vec::new(),
        }
    }

    /// Has `sharing` take the client's memory.
    pub(super) fn share_memory(&mut self, sharing: Option<Arc<dyn Sharing>>) {
        self.sharing = sharing;
    }

    /// Serves the client until either side disconnects, then ends the queue threads.
    pub(super) fn serve(mut self) -> Ending {
        let connection = Arc::clone(&self.connection);
        let error = loop {
            let message = Message::receive(connection.stream());
            if let Err(error) = message.and_then(|message| self.handle(message)) {
                break error;
            }
        };
        connection.set_ending();
        let running = connection.vrings.load(Ordering::Relaxed);
        // After this no request of the client is in flight any more. A client that does not leave has died.
        self.end();
        match error {
            Error::Disconnected if running == 0 => {
                if let Some(lease) = self.lease.take() {
                    lease.leave();
                }
                Ending::Left
            }
            Error::Disconnected => Ending::Died {
                unanswered: connection.unanswered.load(Ordering::Relaxed),
            },
            Error::Refused(error) => Ending::Failed(error),
        }
    }

    fn offered(&self) -> u64 {
        config_space::features(self.connection.limits()) | PROTOCOL_FEATURES | LOG_ALL
    }

    /// A vring below [`MAX_VRINGS`].
    fn vring(&mut self, index: u16) -> &mut VringSetup {
        let index = usize::from(index);
        if self.vrings.len() <= index {
            self.vrings.resize_with(index + 1, VringSetup::default);
        }
        &mut self.vrings[index]
    }

    /// A vring that is being set up, not served.
    fn stopped_vring(&mut self, index: u16) -> Result<&mut VringSetup> {
        let vring = self.vring(index);
        if vring.started {
            return refuse(format!("vring {index} is running"));
        }
        Ok(vring)
    }

    /// The indexes of the vrings that the client has named, and of those before them.
    fn indexes(&self) -> impl Iterator<Item = u16> + use<> {
        0..u16::try_from(self.vrings.len()).unwrap_or(MAX_VRINGS)
    }

    /// Whether any vring is being served.
    fn is_running(&self) -> bool {
        self.vrings.iter().any(|vring| vring.started)
    }

    /// Asks the queue thread of a vring for something and waits for the answer.
    fn ask<R>(&self, vring: u16, command: impl FnOnce(mpsc::Sender<R>) -> Command) -> Result<R> {
        let Some(handle) = self.threads.get(&(vring % self.sizes.threads)) else {
            return refuse("the vring has no thread");
        };
        let (sender, answer) = mpsc::channel();
        if handle.mail.send(command(sender)).is_err() {
            return refuse("a queue thread has ended");
        }
        loop {
            match answer.recv_timeout(CHECK_INTERVAL) {
                Ok(answer) => return Ok(answer),
                // A vring with a notification that the client does not take does not stop before it has to.
                Err(RecvTimeoutError::Timeout) if self.connection.hung_up() => {
                    return Err(Error::Disconnected);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return refuse("a queue thread has ended"),
            }
        }
    }

    /// What the client is recognised by if it comes back.
    fn identity(&self) -> Identity {
        Identity {
            memory: self.inflight.as_ref().map(InflightBuffer::id),
            process: self.connection.process(),
        }
    }

    /// Starts a vring as soon as it is described in full and enabled.
    fn start_if_ready(&mut self, index: u16) -> Result<()> {
        let negotiated = self.features & PROTOCOL_FEATURES != 0;
        let features = self.features;
        let map = Arc::clone(&self.map);
        let logging = self.logging()?;
        let vring = self.vring(index);
        // Without protocol features there is no message that enables a vring.
        let enabled = vring.enabled || !negotiated;
        let described = vring.size > 0 && vring.addresses.is_some() && vring.kick.is_some();
        if vring.started || !enabled || !described {
            return Ok(());
        }
        if map.regions().is_empty() {
            self.connection.tell_unshared(format_args!(
                "vring {index} is set up and cannot be served, because the client has shared no memory"
            ));
            return Ok(());
        }
        // It may have stopped for a migration that failed, or succeeded.
        let identity = self.identity();
        let resume = |lease: &Lease| lease.resume(identity);
        let kept = self.lease.as_ref().map(resume).transpose();
        if kept.map_err(io::Error::other)? == Some(false) {
            self.lease = None;
        }
        if self.lease.is_none() {
            let client = Client {
                name: self.connection.client(),
                gone: Arc::new({
                    let connection = Arc::clone(&self.connection);
                    move || connection.hung_up()
                }),
                identity,
            };
            let lease = self.ownership.take(client);
            self.lease = Some(lease.map_err(io::Error::other)?);
        }
        let size = self.vring(index).size;
        let record = self.inflight.as_ref();
        let inflight = record.map(|record| record.queue(index, size)).transpose()?;
        let vring = self.vring(index);
        let (Some(addresses), Some(kick)) = (vring.addresses, vring.kick.take()) else {
            unreachable!("they were there before the disk was taken");
        };
        let start = Box::new(Start {
            index,
            size: vring.size,
            addresses,
            base: vring.base,
            features,
            kick,
            call: vring.call.take(),
            error: vring.error.take(),
            map,
            logging,
            used_guest: vring.used_guest,
            inflight,
        });
        let thread = index % self.sizes.threads;
        if !self.threads.contains_key(&thread) {
            let handle = (self.spawn)(thread)?;
            self.threads.insert(thread, handle);
        }
        if let Err(error) = self.ask(index, |reply| Command::Start(start, reply))? {
            return refuse(format!("vring {index} cannot be started: {error}"));
        }
        if !self.has_room_for_segments(size)
            && !self.is_running()
            && let Some(omitted) = self.connection.due("short vring")
        {
            tracing::warn!(
                export = self.connection.export(),
                session = self.connection.id(),
                "vring {index} has {size} entries, and its driver uses no indirect descriptors: a request of more \
                 than {} segments finds no room there and may hang in the driver; give the device queues of {} \
                 entries{omitted}",
                u32::from(size).saturating_sub(2),
                config_space::SEG_MAX + 2
            );
        }
        self.vring(index).started = true;
        self.connection.vrings.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn start_all_ready(&mut self) -> Result<()> {
        for index in self.indexes() {
            self.start_if_ready(index)?;
        }
        Ok(())
    }

    /// Gives every queue thread the new map. When this returns, only requests that were in flight
    /// use the old one, and they keep it.
    fn use_map(&mut self, regions: Vec<Region>) -> Result<()> {
        let map = Arc::new(MemoryMap::new(regions)?);
        self.old_maps.push(Arc::downgrade(&self.map));
        self.old_maps.retain(|old| old.strong_count() > 0);
        let old: Vec<_> = self.old_maps.iter().filter_map(Weak::upgrade).collect();
        let regions = old.iter().chain([&map]).flat_map(|map| map.regions());
        let mappings: BTreeSet<_> = regions.map(|region| region.memory().mapping()).collect();
        if mappings.len() > MAX_MAPPINGS {
            return refuse("requests in flight use too much memory that was taken away");
        }
        self.map = map;
        self.tell_threads()?;
        self.start_all_ready()
    }

    /// Tells every queue thread of the memory map and the log of dirty pages. When this returns, all
    /// use both.
    fn tell_threads(&self) -> Result<()> {
        let logging = self.logging()?;
        for &thread in self.threads.keys() {
            let (map, logging) = (Arc::clone(&self.map), logging.clone());
            self.ask(thread, |reply| Command::Memory(map, logging, reply))?;
        }
        Ok(())
    }

    /// What is to be marked in the log of dirty pages.
    ///
    /// # Errors
    ///
    /// When the log has no bits for a part of it: a migration would lose what is written there.
    fn logging(&self) -> Result<Option<Logging>> {
        let requests = self.features & LOG_ALL != 0;
        let Some(log) = &self.log else {
            return Ok(None);
        };
        let covers_map = (self.map.regions().iter().map(Region::address))
            .all(|region| log.covers(region.guest, region.len_bytes));
        if requests && !covers_map {
            return refuse("the log of dirty pages is too small for the memory");
        }
        let mut used_rings = self
            .vrings
            .iter()
            .filter_map(|vring| Some((vring.used_guest?, used_ring_bytes(vring.size))));
        if !used_rings.all(|(guest, len_bytes)| log.covers(guest, len_bytes)) {
            return refuse("the log of dirty pages is too small for a used ring");
        }
        let log = Arc::clone(log);
        Ok(Some(Logging { log, requests }))
    }

    /// A client that has stopped its last vring has nothing in flight. If its dirty pages are logged it is being
    /// migrated.
    fn rest_if_stopped(&self) {
        let logged = self.features & LOG_ALL != 0 && self.log.is_some();
        if !self.is_running()
            && let Some(lease) = &self.lease
        {
            lease.rest(logged);
        }
    }

    /// Data segments of one request, at most. A driver without indirect descriptors has no place in a short ring for
    /// as many as usual, and those known wait for it for ever. Rings are described after the configuration was read,
    /// but for clients that read it again.
    fn seg_max(&self) -> u32 {
        let described = self
            .vrings
            .iter()
            .map(|vring| vring.size)
            .filter(|size| *size > 0);
        match described.min() {
            Some(size) if !self.has_room_for_segments(size) => {
                u32::from(size).saturating_sub(2).max(1)
            }
            _ => config_space::SEG_MAX,
        }
    }

    /// Whether a vring of this size has room for a request with as many segments as are advertised.
    fn has_room_for_segments(&self, size: u16) -> bool {
        let indirect = self.features & config_space::mask(VIRTIO_RING_F_INDIRECT_DESC) != 0;
        indirect || u32::from(size) >= config_space::SEG_MAX + 2
    }

    /// Stops a vring when its requests in flight have ended.
    fn stop_vring(&mut self, index: u16) -> Result<()> {
        let stopped = self.ask(index, |reply| Command::Stop(index, reply))?;
        let vring = self.vring(index);
        vring.base = stopped.base;
        vring.call = stopped.call;
        vring.error = stopped.error;
        vring.started = false;
        self.connection.vrings.fetch_sub(1, Ordering::Relaxed);
        self.rest_if_stopped();
        Ok(())
    }

    /// Back to where the device was at the beginning. What is the client's stays: its memory, its log
    /// and its lease of the disk, which a guest that boots anew must not lose.
    fn reset(&mut self) -> Result<()> {
        for index in self.indexes() {
            if self.vring(index).started {
                self.stop_vring(index)?;
            }
        }
        self.vrings.clear();
        if let Some(inflight) = self.inflight.take() {
            inflight.clear();
        }
        self.features &= LOG_ALL | PROTOCOL_FEATURES;
        self.status = 0;
        let write_cache = self.connection.limits().write_cache;
        self.connection
            .writeback
            .store(write_cache, Ordering::Release);
        Ok(())
    }

    /// Ends the queue threads. The disk stays with the client, which has no request in flight after this.
    fn end(&mut self) {
        if let Some(lease) = &self.lease {
            lease.drain();
        }
        for handle in self.threads.values() {
            // One that has ended already needs not be told.
            let _ = handle.mail.send(Command::Exit);
        }
        for handle in std::mem::take(&mut self.threads).into_values() {
            if handle.thread.join().is_err() {
                tracing::error!(export = self.connection.export(), "a queue thread panicked");
            }
        }
        self.connection.vrings.store(0, Ordering::Relaxed);
    }
}

/// Also where a handler panics: no other client may write while a thread still serves this one.
impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests;
