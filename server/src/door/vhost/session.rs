//! One client's conversation: the vhost-user protocol, on a thread of its own.
//!
//! The messages and their framing are the `vhost` crate's; what they mean is here. Vring `i` is
//! served by queue thread `i % threads`; a thread is started with its first vring and ends
//! with the session.

mod messages;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::{
    BackendReqHandler, Error, Result, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use super::channel::{self, What};
use super::config::MAX_VRINGS;
use super::config_space;
use super::connection::Connection;
use super::dirty::{DirtyLog, Logging};
use super::inflight::InflightBuffer;
use super::memory::{MAX_MAPPINGS, MemoryMap, Region};
use super::queue::Command;
use super::ring_layout::{RingAddresses, used_ring_bytes};
use super::vring::Start;
use crate::door::ownership::{Client, Lease, Ownership};
use crate::engine::mailbox::Sender;

/// `VHOST_F_LOG_ALL`: what requests write is marked in the log of dirty pages.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// How long a client may leave its answers unread, or a message half sent.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);

/// How often a thread that waits for a queue thread looks whether the client is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

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
    Died,
    /// The client broke the protocol, or the server could not do what it asked.
    Failed(Error),
}

/// Serves the client until either side disconnects, then ends the queue threads.
pub(super) fn serve_connection(
    link: &Arc<Connection>,
    sizes: Sizes,
    spawn: Spawn,
    access: &Arc<Ownership>,
) -> io::Result<Ending> {
    let stream = link.stream().try_clone()?;
    stream.set_read_timeout(Some(CLIENT_LIMIT))?;
    let session = Arc::new(Mutex::new(Session::new(
        Arc::clone(link),
        sizes,
        spawn,
        Arc::clone(access),
    )));
    let mut messages = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let error = loop {
        let next = channel::look(link.stream(), CLIENT_LIMIT);
        // Either would keep this thread for ever, and with it the disk.
        if let channel::Next::Half = next {
            link.hang_up("the client sent half a message and not the rest");
        } else if !channel::has_room(link.stream(), CLIENT_LIMIT) {
            link.hang_up("the client does not read its answers");
        }
        if let channel::Next::Ours = next {
            let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = session.handle_raw_message() {
                break error;
            }
            continue;
        }
        if let Err(error) = messages.handle_request() {
            break error;
        }
        // What was not refused was a stream socket.
        if let channel::Next::Channel(channel) = next {
            link.set_channel(channel);
        }
    };
    drop(messages);
    link.set_ending();
    // Only this thread ever had it; a panic in a handler has ended this thread.
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    let running = link.vrings.load(Ordering::Relaxed);
    session.end();
    let ending = match error {
        Error::Disconnected | Error::SocketBroken(_) if running == 0 => Ending::Left,
        Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage => Ending::Died,
        error => Ending::Failed(error),
    };
    // Nothing of the client is under way any more. Whoever does not leave has died.
    match session.hold.take() {
        Some(hold) if matches!(ending, Ending::Left) => hold.leave(),
        other => drop(other),
    }
    Ok(ending)
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
struct Session {
    link: Arc<Connection>,
    sizes: Sizes,
    spawn: Spawn,
    access: Arc<Ownership>,
    /// The right to the disk, from the first vring on.
    hold: Option<Lease>,
    threads: BTreeMap<u16, QueueHandle>,
    map: Arc<MemoryMap>,
    /// Maps before that one, which requests under way may still use.
    old_maps: Vec<Weak<MemoryMap>>,
    inflight: Option<InflightBuffer>,
    /// The log of dirty pages; it is used while somebody wants it.
    log: Option<Arc<DirtyLog>>,
    features: u64,
    /// What was agreed on besides.
    protocol: VhostUserProtocolFeatures,
    /// The device's status (virtio 1.3, 2.1), as the client sets it.
    status: u8,
    vrings: Vec<VringSetup>,
}

fn refuse<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::ReqHandlerError(io::Error::other(what.into())))
}

/// What a read or write of the connection says of it.
fn gone(error: io::Error) -> Error {
    match error.kind() {
        // What makes no sense, and what does not come in time.
        io::ErrorKind::Other | io::ErrorKind::WouldBlock => failed(error),
        _ => Error::SocketBroken(error),
    }
}

fn failed(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}

fn not_offered<T>() -> Result<T> {
    refuse("the request belongs to a feature that is not offered")
}

impl Session {
    fn new(link: Arc<Connection>, sizes: Sizes, spawn: Spawn, access: Arc<Ownership>) -> Self {
        Self {
            link,
            sizes,
            spawn,
            access,
            hold: None,
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

    fn offered(&self) -> u64 {
        config_space::features(self.link.limits())
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | LOG_ALL
    }

    fn vring(&mut self, index: u32) -> Result<&mut VringSetup> {
        if index >= u32::from(MAX_VRINGS) {
            return refuse(format!(
                "vring {index} is one too many, {MAX_VRINGS} are offered"
            ));
        }
        let index = index as usize;
        if self.vrings.len() <= index {
            self.vrings.resize_with(index + 1, VringSetup::default);
        }
        Ok(&mut self.vrings[index])
    }

    /// A vring that is being set up, not served.
    fn stopped_vring(&mut self, index: u32) -> Result<&mut VringSetup> {
        let vring = self.vring(index)?;
        if vring.started {
            return refuse(format!("vring {index} is running"));
        }
        Ok(vring)
    }

    /// Asks a queue thread for something and waits for the answer.
    fn ask<R>(&self, thread: u16, command: impl FnOnce(mpsc::Sender<R>) -> Command) -> Result<R> {
        let Some(handle) = self.threads.get(&thread) else {
            return refuse("the vring has no thread");
        };
        let (sender, answer) = mpsc::channel();
        if handle.mail.send(command(sender)).is_err() {
            return refuse("a queue thread has ended");
        }
        loop {
            match answer.recv_timeout(LOOK_INTERVAL) {
                Ok(answer) => return Ok(answer),
                // A vring with a notification that nobody takes does not stop before it has to.
                Err(RecvTimeoutError::Timeout) if self.link.hung_up() => {
                    return Err(Error::Disconnected);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return refuse("a queue thread has ended"),
            }
        }
    }

    /// Starts a vring as soon as it is described in full and enabled.
    fn start_if_ready(&mut self, index: u16) -> Result<()> {
        let negotiated = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        let features = self.features;
        let map = Arc::clone(&self.map);
        let logging = self.logging()?;
        let vring = self.vring(u32::from(index))?;
        // Without protocol features there is no message that enables a vring.
        let enabled = vring.enabled || !negotiated;
        if vring.started || !enabled || vring.size == 0 || map.regions().is_empty() {
            return Ok(());
        }
        if vring.addresses.is_none() || vring.kick.is_none() {
            return Ok(());
        }
        // It may have stopped for a migration that failed, or succeeded.
        let kept = self.hold.as_ref().map(Lease::resume).transpose();
        if kept.map_err(|why| failed(io::Error::other(why)))? == Some(false) {
            self.hold = None;
        }
        if self.hold.is_none() {
            let client = Client {
                name: self.link.client(),
                gone: Arc::new({
                    let link = Arc::clone(&self.link);
                    move || link.hung_up()
                }),
            };
            let hold = self.access.take(client);
            self.hold = Some(hold.map_err(|why| failed(io::Error::other(why)))?);
        }
        let size = self.vring(u32::from(index))?.size;
        let record = self.inflight.as_ref();
        let inflight = record.map(|record| record.queue(index, size)).transpose();
        let inflight = inflight.map_err(failed)?;
        let vring = self.vring(u32::from(index))?;
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
            let handle = (self.spawn)(thread).map_err(failed)?;
            self.threads.insert(thread, handle);
        }
        if let Err(error) = self.ask(thread, |reply| Command::Start(start, reply))? {
            return refuse(format!("vring {index} cannot be started: {error}"));
        }
        self.vring(u32::from(index))?.started = true;
        self.link.vrings.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn start_all_ready(&mut self) -> Result<()> {
        for index in 0..self.vrings.len() {
            self.start_if_ready(u16::try_from(index).unwrap_or(u16::MAX))?;
        }
        Ok(())
    }

    /// Gives every queue thread the new map. When this returns, only requests that were under way
    /// use the old one, and they keep it.
    fn use_map(&mut self, regions: Vec<Region>) -> Result<()> {
        let map = Arc::new(MemoryMap::new(regions).map_err(failed)?);
        self.old_maps.push(Arc::downgrade(&self.map));
        self.old_maps.retain(|old| old.strong_count() > 0);
        let old: Vec<_> = self.old_maps.iter().filter_map(Weak::upgrade).collect();
        let regions = old.iter().chain([&map]).flat_map(|map| map.regions());
        let mappings: BTreeSet<_> = regions.map(|region| region.memory().mapping()).collect();
        if mappings.len() > MAX_MAPPINGS {
            return refuse("requests under way use too much memory that was taken away");
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

    /// A client that has stopped its last vring while its dirty pages are logged is being migrated.
    fn rest_if_moving(&self) {
        let logged = self.features & LOG_ALL != 0 && self.log.is_some();
        if logged
            && !self.vrings.iter().any(|vring| vring.started)
            && let Some(hold) = &self.hold
        {
            hold.rest();
        }
    }

    /// Stops a vring when what was taken from it is done.
    fn stop_vring(&mut self, number: u16) -> Result<()> {
        let thread = number % self.sizes.threads;
        let stopped = self.ask(thread, |reply| Command::Stop(number, reply))?;
        let vring = self.vring(u32::from(number))?;
        vring.base = stopped.base;
        vring.call = stopped.call;
        vring.error = stopped.error;
        vring.started = false;
        self.link.vrings.fetch_sub(1, Ordering::Relaxed);
        self.rest_if_moving();
        Ok(())
    }

    /// Back to where the device was at the beginning. What is the client's stays: its memory, its log
    /// and its hold on the disk, which a guest that boots anew must not lose.
    fn reset(&mut self) -> Result<()> {
        for number in 0..self.vrings.len() {
            if self.vrings[number].started {
                self.stop_vring(u16::try_from(number).map_err(|_| Error::InvalidParam)?)?;
            }
        }
        self.vrings.clear();
        self.inflight = None;
        self.features &= LOG_ALL | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.status = 0;
        let write_cache = self.link.limits().write_cache;
        self.link.writeback.store(write_cache, Ordering::Release);
        Ok(())
    }

    /// Reads and answers a message that the crate does not know.
    fn handle_raw_message(&mut self) -> Result<()> {
        let link = Arc::clone(&self.link);
        let message = channel::read(link.stream()).map_err(gone)?;
        let done = match message.what {
            What::SetLogFd => Ok(()),
            _ if !self.protocol.contains(VhostUserProtocolFeatures::STATUS) => {
                return not_offered();
            }
            What::GetStatus => {
                let status = u64::from(self.status);
                return channel::answer(link.stream(), message, status).map_err(gone);
            }
            What::SetStatus(status) => self.set_status(status),
        };
        if message.need_reply && self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            let failed = u64::from(done.is_err());
            channel::answer(link.stream(), message, failed).map_err(gone)?;
        }
        done
    }

    fn set_status(&mut self, status: u64) -> Result<()> {
        match u8::try_from(status) {
            Ok(0) => self.reset(),
            Ok(status) => {
                self.status = status;
                Ok(())
            }
            Err(_) => refuse(format!("{status:#x} is no status of a device")),
        }
    }

    /// Ends the queue threads. The disk stays with the client, of which nothing is under way after this.
    fn end(&mut self) {
        if let Some(hold) = &self.hold {
            hold.drain();
        }
        for handle in self.threads.values() {
            // One that has ended already needs not be told.
            let _ = handle.mail.send(Command::Exit);
        }
        for handle in std::mem::take(&mut self.threads).into_values() {
            if handle.thread.join().is_err() {
                tracing::error!(export = self.link.export(), "a queue thread panicked");
            }
        }
        self.link.vrings.store(0, Ordering::Relaxed);
    }
}

/// Also where a handler panics: nobody else may write while a thread still serves the client.
impl Drop for Session {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests;
