//! One client's conversation: the vhost-user protocol, on a thread of its own.
//!
//! The messages and their framing are the `vhost` crate's; what they mean is here. Vring `i` is
//! served by queue thread `i % threads`; a thread is started with its first vring and ends
//! with the session.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::Timespec;
use rustix::fs::{FileType, fstat};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

use super::MAX_VRINGS;
use super::block::{self, mask};
use super::channel::{self, StatusMessage};
use super::dirty::{DirtyLog, Logging};
use super::inflight::InflightBuffer;
use super::link::Link;
use super::memory::{MAX_REGIONS, MemoryMap, Region, RegionAddress};
use super::queue::Command;
use super::virtqueue::{MAX_QUEUE_SIZE, RingAddresses, used_ring_bytes};
use super::vring::Start;
use crate::access::{Access, Client, Hold};
use crate::io::mailbox::Sender;

/// `VHOST_F_LOG_ALL`: what requests write is marked in the log of dirty pages.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// How long an answer waits for a client that does not read.
const DEAF_LIMIT: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// How often a thread that waits for a queue thread looks whether that is still alive.
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

/// Talks to the client until one of both hangs up, then ends the queue threads.
pub(super) fn converse(
    link: &Arc<Link>,
    sizes: Sizes,
    spawn: Spawn,
    access: &Arc<Access>,
) -> io::Result<Ending> {
    let stream = link.stream().try_clone()?;
    let session = Arc::new(Mutex::new(Session::new(
        Arc::clone(link),
        sizes,
        spawn,
        Arc::clone(access),
    )));
    let mut messages = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let error = loop {
        let next = channel::look(link.stream());
        // Whoever asks and does not read the answers would keep this thread for ever.
        if !channel::has_room(link.stream(), &DEAF_LIMIT) {
            link.hang_up("the client does not read its answers");
        }
        if let channel::Next::Status = next {
            let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = session.status_message() {
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
    if let Some(hold) = &session.hold {
        hold.drain();
    }
    session.end_threads();
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
    link: Arc<Link>,
    sizes: Sizes,
    spawn: Spawn,
    access: Arc<Access>,
    /// The right to the disk, from the first vring on.
    hold: Option<Hold>,
    threads: BTreeMap<u16, QueueHandle>,
    map: Arc<MemoryMap>,
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
        io::ErrorKind::Other => failed(error),
        _ => Error::SocketBroken(error),
    }
}

fn failed(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}

impl Session {
    fn new(link: Arc<Link>, sizes: Sizes, spawn: Spawn, access: Arc<Access>) -> Self {
        Self {
            link,
            sizes,
            spawn,
            access,
            hold: None,
            threads: BTreeMap::new(),
            map: Arc::default(),
            inflight: None,
            log: None,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            status: 0,
            vrings: Vec::new(),
        }
    }

    fn offered(&self) -> u64 {
        block::features(self.link.limits())
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
        handle.mail.send(command(sender));
        loop {
            match answer.recv_timeout(LOOK_INTERVAL) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Timeout) if !handle.thread.is_finished() => {}
                Err(_) => return refuse("a queue thread has ended"),
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
        let kept = self.hold.as_ref().map(Hold::resume).transpose();
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
        self.map = Arc::new(MemoryMap::new(regions).map_err(failed)?);
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

    /// Reads and answers a message about the status.
    fn status_message(&mut self) -> Result<()> {
        let link = Arc::clone(&self.link);
        let message = channel::read_status(link.stream()).map_err(gone)?;
        if !self.protocol.contains(VhostUserProtocolFeatures::STATUS) {
            return not_offered();
        }
        let (set, answer) = match message {
            StatusMessage::Get => (Ok(()), Some(u64::from(self.status))),
            StatusMessage::Set { status, need_reply } => {
                let set = self.set_status(status);
                let acks = self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
                let answer = (need_reply && acks).then_some(u64::from(set.is_err()));
                (set, answer)
            }
        };
        if let Some(answer) = answer {
            channel::answer_status(link.stream(), message, answer).map_err(gone)?;
        }
        set
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

    fn end_threads(&mut self) {
        for handle in self.threads.values() {
            handle.mail.send(Command::Exit);
        }
        for handle in std::mem::take(&mut self.threads).into_values() {
            if handle.thread.join().is_err() {
                tracing::error!(export = self.link.export(), "a queue thread panicked");
            }
        }
        self.link.vrings.store(0, Ordering::Relaxed);
    }
}

/// Takes a descriptor that is to be read or written on a ring: an eventfd, a pipe or a socket (User
/// Mode Linux is notified through one). Others could be always ready (a regular file), or do who
/// knows what.
fn signal_fd(file: File) -> Result<OwnedFd> {
    let stat = fstat(&file).map_err(|error| failed(error.into()))?;
    let eventfd = || {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::fs::read_link(path).is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
    };
    let kind = FileType::from_raw_mode(stat.st_mode);
    if matches!(kind, FileType::Fifo | FileType::Socket) || eventfd() {
        return Ok(file.into());
    }
    refuse("a kick, call or error descriptor is no eventfd, pipe or socket")
}

fn signal(file: Option<File>) -> Result<Option<OwnedFd>> {
    file.map(signal_fd).transpose()
}

fn region_address(region: &VhostUserMemoryRegion) -> RegionAddress {
    RegionAddress {
        guest: region.guest_phys_addr,
        len_bytes: region.memory_size,
        user: region.user_addr,
    }
}

fn not_offered<T>() -> Result<T> {
    refuse("the request belongs to a feature that is not offered")
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated, and without effect by the letter of the protocol.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let excess = features & !self.offered();
        if excess != 0 {
            return refuse(format!("features {excess:#x} were not offered"));
        }
        let changed = features ^ self.features;
        if changed & !LOG_ALL != 0 && self.vrings.iter().any(|vring| vring.started) {
            return refuse("features cannot change while vrings are running");
        }
        self.features = features;
        if changed & LOG_ALL != 0 {
            self.tell_threads()?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mapped: io::Result<Vec<_>> = regions
            .iter()
            .zip(&files)
            .map(|(region, file)| Region::map(region_address(region), file, region.mmap_offset))
            .collect();
        self.use_map(mapped.map_err(failed)?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let vring = self.stopped_vring(index)?;
        if !num.is_power_of_two() || num > MAX_QUEUE_SIZE {
            return refuse(format!("vring {index} cannot have {num} entries"));
        }
        vring.size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        let used_guest = logged.then_some(log);
        let addresses = RingAddresses {
            descriptors: descriptor,
            available,
            used,
        };
        let vring = self.vring(index)?;
        if vring.started && vring.addresses != Some(addresses) {
            return refuse(format!("vring {index} is running and cannot move"));
        }
        vring.addresses = Some(addresses);
        let number = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let was = std::mem::replace(&mut vring.used_guest, used_guest);
        if vring.started && was != used_guest {
            self.logging()?;
            return self.ask(number % self.sizes.threads, |reply| {
                Command::LogUsed(number, used_guest, reply)
            });
        }
        self.start_if_ready(number)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.stopped_vring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        // The next start needs a new kick.
        vring.kick = None;
        if vring.started {
            self.stop_vring(u16::try_from(index).map_err(|_| Error::InvalidParam)?)?;
        }
        let base = self.vring(index)?.base;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let Some(kick) = signal(file)? else {
            return refuse("vrings that are polled, without a kick descriptor, are not offered");
        };
        self.stopped_vring(u32::from(index))?.kick = Some(kick);
        self.start_if_ready(u16::from(index))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = signal(file)?;
        let vring = self.vring(u32::from(index))?;
        if vring.started {
            let index = u16::from(index);
            return self.ask(index % self.sizes.threads, |reply| {
                Command::Call(index, call, reply)
            });
        }
        vring.call = call;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let error = signal(file)?;
        let vring = self.vring(u32::from(index))?;
        if vring.started {
            let index = u16::from(index);
            return self.ask(index % self.sizes.threads, |reply| {
                Command::Error(index, error, reply)
            });
        }
        vring.error = error;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::STATUS
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let excess = features & !self.get_protocol_features()?.bits();
        if excess != 0 {
            return refuse(format!("protocol features {excess:#x} were not offered"));
        }
        self.protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(MAX_VRINGS))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let number = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let vring = self.vring(index)?;
        vring.enabled = enable;
        if vring.started {
            return self.ask(number % self.sizes.threads, |reply| {
                Command::Enable(number, enable, reply)
            });
        }
        self.start_if_ready(number)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let writeback = self.link.writeback.load(Ordering::Acquire);
        let limits = self.link.limits();
        Ok(block::config(
            limits,
            self.sizes.queues,
            writeback,
            offset,
            size,
        ))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        let offered = self.offered() & mask(VIRTIO_BLK_F_CONFIG_WCE) != 0;
        match bytes {
            [writeback @ 0..=1] if offered && offset == block::WRITEBACK_OFFSET => {
                self.link
                    .writeback
                    .store(*writeback == 1, Ordering::Release);
                Ok(())
            }
            _ => refuse("only the writeback byte of the configuration can be written"),
        }
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        // It is used when the client sends it back.
        InflightBuffer::create(wanted).map_err(failed)
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        if self.vrings.iter().any(|vring| vring.started) {
            return refuse("the inflight buffer cannot change while vrings are running");
        }
        self.inflight = Some(InflightBuffer::map(told, &file).map_err(failed)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let address = region_address(region);
        let added = Region::map(address, &file, region.mmap_offset).map_err(failed)?;
        let mut regions = self.map.regions().to_vec();
        regions.push(added);
        self.use_map(regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let address = region_address(region);
        let mut regions = self.map.regions().to_vec();
        let before = regions.len();
        regions.retain(|region| region.address() != address);
        if regions.len() == before {
            return refuse("no such memory region");
        }
        self.use_map(regions)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, told: &VhostUserLog, file: File) -> Result<()> {
        self.log = Some(Arc::new(DirtyLog::map(told, &file).map_err(failed)?));
        // The client lets go of the log before this one when it has the answer.
        self.tell_threads()
    }
}
