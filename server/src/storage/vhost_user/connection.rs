//! The vhost-user protocol, as the front-end of it: a connection to the server.
//!
//! The crate `vhost` waits for replies without a limit, so each exchange has one here: when it is over the socket is shut
//! down, which ends the wait.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
    VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::disk::{CONFIG_BYTES, Disk, SHORT_CONFIG_BYTES};
use super::error::{VhostUserError, explain};
use super::memory::Region;
use super::vring::{RingMemory, SIZE};
use crate::engine::event_loop::{Alarm, EventLoop};

/// How long the server may take to answer a message.
pub(super) const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// The same for a message that has it map memory: it may pin all of it, which takes minutes for the memory of a large guest.
pub(super) const MEMORY_LIMIT: Duration = Duration::from_secs(600);

/// Regions that a server takes in one message that replaces them all (the least that all servers take).
const TABLE_REGIONS: u64 = 8;

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Queues that a server may say it has.
const MAX_QUEUES: u64 = 256;

/// Takes messages of the server.
struct Messages(AtomicBool);

impl VhostUserFrontendReqHandler for Messages {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.store(true, Ordering::Relaxed);
        Ok(0)
    }
}

/// A connection to a server, whose disk is known.
pub(super) struct Peer {
    socket: PathBuf,
    stream: UnixStream,
    frontend: Frontend,
    protocol: Protocol,
    limit: Duration,
    /// When the connection has to be made, while it is.
    deadline: Option<Instant>,
    pub(super) disk: Disk,
    /// Features with those that the disk does not have.
    acknowledged: u64,
    /// Virtqueues that it serves.
    pub(super) queues: u16,
    /// Memory regions that it takes.
    pub(super) max_regions: u64,
    messages: Option<Channel>,
}

/// Where the server sends messages.
struct Channel {
    handler: FrontendReqHandler<Messages>,
    messages: Arc<Messages>,
    /// The server's end, to end a wait.
    other_end: OwnedFd,
}

impl Peer {
    /// Connects, agrees on features and reads the configuration. The server has no memory and no virtqueue yet.
    /// `note` is told of the socket before the server is waited for, all in all for `limit`.
    pub(super) fn connect(
        path: &Path,
        limit: Duration,
        note: impl FnOnce(UnixStream),
    ) -> Result<Self, VhostUserError> {
        let stream = connect_to(path).map_err(|source| VhostUserError::Connect {
            socket: path.to_owned(),
            hint: match source.raw_os_error() {
                Some(libc::ENOENT | libc::ECONNREFUSED) => "; start the server first",
                Some(libc::EAGAIN) => "; the server takes no connections at present",
                Some(libc::EACCES) => "; the server's user must let this one write to the socket",
                _ => "",
            },
            source,
        })?;
        let step = |what| {
            move |source: io::Error| VhostUserError::Step {
                socket: path.to_owned(),
                what,
                why: source.to_string(),
            }
        };
        note(stream.try_clone().map_err(step("use the socket"))?);
        let own = stream.try_clone().map_err(step("use the socket"))?;
        let mut this = Self {
            socket: path.to_owned(),
            frontend: Frontend::from_stream(own, MAX_QUEUES),
            stream,
            protocol: Protocol::empty(),
            limit,
            deadline: Instant::now().checked_add(limit),
            // Replaced below.
            disk: Disk::none(),
            acknowledged: 0,
            queues: 1,
            max_regions: TABLE_REGIONS,
            messages: None,
        };
        this.negotiate()?;
        Ok(this)
    }

    fn negotiate(&mut self) -> Result<(), VhostUserError> {
        self.exchange("begin a session", |frontend| frontend.set_owner())?;
        let features = self.exchange("read its features", |frontend| frontend.get_features())?;
        if features & PROTOCOL_FEATURES == 0 {
            return Err(self.unusable("the server has no protocol features"));
        }
        let offered = self.exchange("read its protocol features", |frontend| {
            frontend.get_protocol_features()
        })?;
        if !offered.contains(Protocol::CONFIG) {
            return Err(self.unusable("the server does not say how large its disk is (CONFIG)"));
        }
        let wanted = Protocol::CONFIG
            | Protocol::MQ
            | Protocol::REPLY_ACK
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::BACKEND_REQ;
        self.protocol = offered & wanted;
        let protocol = self.protocol;
        self.exchange("agree on protocol features", |frontend| {
            frontend.set_protocol_features(protocol)
        })?;
        if protocol.contains(Protocol::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let mut queues = 1;
        if protocol.contains(Protocol::MQ) {
            queues = self.exchange("read how many queues it has", |frontend| {
                frontend.get_queue_num()
            })?;
            if queues == 0 {
                return Err(self.unusable("the server has no queues (GET_QUEUE_NUM)"));
            }
        }
        if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            self.max_regions = self.exchange("read how much memory it takes", |frontend| {
                frontend.get_max_mem_slots()
            })?;
        }
        if protocol.contains(Protocol::BACKEND_REQ) {
            self.open_channel()?;
        }
        self.disk = self.read_disk(features)?;
        self.queues = u16::try_from(queues)
            .unwrap_or(u16::MAX)
            .min(self.disk.queues)
            .max(1);
        self.acknowledged = self.disk.features | PROTOCOL_FEATURES;
        let acknowledged = self.acknowledged;
        self.exchange("agree on features", |frontend| {
            frontend.set_features(acknowledged)
        })
    }

    /// Does one exchange of messages, within the limit.
    fn exchange<T>(
        &mut self,
        what: &'static str,
        exchange: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        self.exchange_within(self.limit, what, exchange)
    }

    /// Sets a limit to all messages until it is set again or removed.
    pub(super) fn limit_all(&mut self, limit: Option<Duration>) {
        self.deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    }

    fn exchange_within<T>(
        &mut self,
        limit: Duration,
        what: &'static str,
        exchange: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, VhostUserError> {
        let step = |why| VhostUserError::Step {
            socket: self.socket.clone(),
            what,
            why,
        };
        let left = (self.deadline).map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.map_or(limit, |left| left.min(limit));
        let _alarm = shut_down_after(left, self.stream.as_fd())
            .map_err(|error| step(format!("no limit can be set: {error}")))?;
        exchange(&mut self.frontend).map_err(|error| step(explain(&error, limit)))
    }

    fn unusable(&self, why: impl Into<String>) -> VhostUserError {
        VhostUserError::Disk {
            socket: self.socket.clone(),
            why: why.into(),
        }
    }

    fn open_channel(&mut self) -> Result<(), VhostUserError> {
        let messages = Arc::new(Messages(AtomicBool::new(false)));
        let failed = |why: String| VhostUserError::Step {
            socket: self.socket.clone(),
            what: "make a channel for its messages",
            why,
        };
        let mut handler = FrontendReqHandler::new(Arc::clone(&messages))
            .map_err(|error| failed(error.to_string()))?;
        handler.set_reply_ack_flag(self.protocol.contains(Protocol::REPLY_ACK));
        let fd = handler.get_tx_raw_fd();
        // SAFETY: the handler keeps it open for the moment.
        let other_end = unsafe { BorrowedFd::borrow_raw(fd) }
            .try_clone_to_owned()
            .map_err(|error| failed(error.to_string()))?;
        self.exchange("send a channel for its messages", |frontend| {
            frontend.set_backend_request_fd(&fd)
        })?;
        self.messages = Some(Channel {
            handler,
            messages,
            other_end,
        });
        Ok(())
    }

    fn read_disk(&mut self, features: u64) -> Result<Disk, VhostUserError> {
        let read = |frontend: &mut Frontend, len: usize| {
            let size = u32::try_from(len).unwrap_or(0);
            let read = frontend.get_config(0, size, VhostUserConfigFlags::empty(), &vec![0; len]);
            read.map(|(_, config)| config)
        };
        let config = self.exchange("read the configuration of its disk", |frontend| {
            // A server without discards may have a shorter one.
            read(frontend, CONFIG_BYTES).or_else(|error| match error {
                vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::BackendInternalError) => {
                    read(frontend, SHORT_CONFIG_BYTES)
                }
                other => Err(other),
            })
        })?;
        Disk::parse(features, &config).map_err(|why| self.unusable(why))
    }

    /// Reads the configuration anew.
    pub(super) fn look(&mut self) -> Result<Disk, VhostUserError> {
        self.read_disk(self.disk.features)
    }

    /// What is shut down to end the connection.
    pub(super) fn stream(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// What can be read when the server has hung up or sends what it must not.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether there is something to read in place of an end.
    pub(super) fn has_said_something(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(recv(&self.stream, &mut [0; 1][..], flags), Ok((1.., _)))
    }

    /// What can be read when the server has a message.
    pub(super) fn channel(&self) -> Option<BorrowedFd<'_>> {
        let channel = self.messages.as_ref()?;
        // SAFETY: the handler, which is part of `self`, keeps it open.
        Some(unsafe { BorrowedFd::borrow_raw(channel.handler.as_raw_fd()) })
    }

    /// Takes a message. Returns whether the configuration has changed.
    pub(super) fn take_message(&mut self) -> Result<bool, VhostUserError> {
        let Some(channel) = &mut self.messages else {
            return Ok(false);
        };
        let step = |why: String| VhostUserError::Step {
            socket: self.socket.clone(),
            what: "take a message of the server",
            why,
        };
        let _alarm = shut_down_after(self.limit, channel.other_end.as_fd())
            .map_err(|error| step(format!("no limit can be set: {error}")))?;
        let taken = channel.handler.handle_request();
        let changed = channel.messages.0.swap(false, Ordering::Relaxed);
        match taken {
            Ok(_) => Ok(changed),
            // A message that is of no use here, and has been answered.
            Err(vhost::vhost_user::Error::ReqHandlerError(_)) => Ok(false),
            Err(error) => Err(step(error.to_string())),
        }
    }

    /// Waits until the server has done what it was told, where it does not acknowledge messages: any answer will do, as it
    /// answers in order.
    fn confirm(&self) -> impl Fn(&mut Frontend) -> vhost::Result<()> + use<> {
        let is_acknowledged = self.protocol.contains(Protocol::REPLY_ACK);
        move |frontend| match is_acknowledged {
            true => Ok(()),
            false => frontend.get_features().map(drop),
        }
    }

    /// Whether regions are added and removed one by one, while requests are in flight.
    pub(super) fn has_slots(&self) -> bool {
        self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS)
    }

    /// Has the server map a region, in addition to others. Returns whether it took it.
    pub(super) fn add(
        &mut self,
        region: &VhostUserMemoryRegionInfo,
    ) -> Result<bool, VhostUserError> {
        let confirm = self.confirm();
        self.exchange_within(MEMORY_LIMIT, "have it map memory", |frontend| {
            let is_taken = took(frontend.add_mem_region(region))?;
            confirm(frontend)?;
            Ok(is_taken)
        })
    }

    /// Has the server unmap a region.
    pub(super) fn remove(
        &mut self,
        region: &VhostUserMemoryRegionInfo,
    ) -> Result<(), VhostUserError> {
        let confirm = self.confirm();
        self.exchange_within(MEMORY_LIMIT, "have it unmap memory", |frontend| {
            frontend.remove_mem_region(region)?;
            confirm(frontend)
        })
    }

    /// Has the server map these regions and no others. Nothing is in flight. Returns whether it took them.
    pub(super) fn set_table(
        &mut self,
        regions: &[VhostUserMemoryRegionInfo],
    ) -> Result<bool, VhostUserError> {
        let confirm = self.confirm();
        self.exchange_within(MEMORY_LIMIT, "have it map memory", |frontend| {
            let is_taken = took(frontend.set_mem_table(regions))?;
            confirm(frontend)?;
            Ok(is_taken)
        })
    }

    /// Starts a virtqueue, which is empty.
    pub(super) fn start(
        &mut self,
        index: u16,
        rings: &RingMemory,
        (kick, call): (&EventFd, &EventFd),
    ) -> Result<(), VhostUserError> {
        let [descriptors, available, used] = rings.addresses(index);
        let addresses = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: descriptors,
            used_ring_addr: used,
            avail_ring_addr: available,
            log_addr: None,
        };
        let index = usize::from(index);
        self.exchange("start a virtqueue", |frontend| {
            frontend.set_vring_num(index, SIZE)?;
            frontend.set_vring_base(index, 0)?;
            frontend.set_vring_addr(index, &addresses)?;
            frontend.set_vring_call(index, call)?;
            frontend.set_vring_kick(index, kick)?;
            frontend.set_vring_enable(index, true)
        })
    }

    /// Stops the virtqueues, which have nothing in flight: for the server this is a client that leaves.
    pub(super) fn leave(&mut self, queues: u16, limit: Duration) -> Result<(), VhostUserError> {
        self.limit = limit;
        self.exchange("stop the virtqueues", |frontend| {
            (0..queues).try_for_each(|index| frontend.get_vring_base(index.into()).map(drop))
        })
    }
}

/// Whether the server did what the message asked for, which it may refuse.
fn took<T>(answer: vhost::Result<T>) -> vhost::Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::BackendInternalError)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// A region as the protocol has it. What the server is told of addresses here are those that it has in its own view: none
/// that this process has concerns it.
pub(super) fn described(
    guest: u64,
    len_bytes: u64,
    file: BorrowedFd<'_>,
    offset: u64,
) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: len_bytes,
        userspace_addr: guest,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    }
}

/// [`described`] for a region of a client.
pub(super) fn described_region(region: &Region) -> VhostUserMemoryRegionInfo {
    described(
        region.guest,
        region.len_bytes,
        region.file(),
        region.offset_bytes,
    )
}

/// Connects without waiting for a server that takes no connections.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Shuts a socket down when the limit is over, unless the value is dropped before.
fn shut_down_after(limit: Duration, socket: BorrowedFd<'_>) -> io::Result<Alarm> {
    let socket = UnixStream::from(socket.try_clone_to_owned()?);
    Ok(EventLoop::get()?.call_after(limit, move || {
        let _ = socket.shutdown(Shutdown::Both);
    }))
}
