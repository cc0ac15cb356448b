//! What each message of the protocol does to a session (vhost-user, "Front-end message types").

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, fstat};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::{
    FrontendReq as Req, VhostUserConfig, VhostUserEmpty, VhostUserInflight, VhostUserLog,
    VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserU64,
    VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use vm_memory::ByteValued;

use super::super::config::MAX_VRINGS;
use super::super::config_space::{self, mask};
use super::super::dirty::DirtyLog;
use super::super::inflight::InflightBuffer;
use super::super::memory::{MAX_REGIONS, Region, RegionAddress};
use super::super::message::{Message, Result, refuse};
use super::super::queue::Command;
use super::super::ring_layout::{MAX_QUEUE_SIZE, RingAddresses};
use super::{LOG_ALL, PROTOCOL_FEATURES, Session};

/// The protocol features that are offered.
const OFFERED: Protocol = Protocol::MQ
    .union(Protocol::CONFIG)
    .union(Protocol::LOG_SHMFD)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::STATUS)
    .union(Protocol::REPLY_ACK)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::CONFIGURE_MEM_SLOTS);

/// In the payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: the vring, and whether there is no descriptor.
const VRING_INDEX: u64 = 0xff;
const VRING_NO_FD: u64 = 0x100;

/// The protocol feature that a message belongs to.
fn feature_of(request: Req) -> Protocol {
    match request {
        Req::GET_QUEUE_NUM => Protocol::MQ,
        Req::GET_CONFIG | Req::SET_CONFIG => Protocol::CONFIG,
        Req::SET_LOG_BASE => Protocol::LOG_SHMFD,
        Req::RESET_DEVICE => Protocol::RESET_DEVICE,
        Req::GET_STATUS | Req::SET_STATUS => Protocol::STATUS,
        Req::GET_INFLIGHT_FD | Req::SET_INFLIGHT_FD => Protocol::INFLIGHT_SHMFD,
        Req::SET_BACKEND_REQ_FD => Protocol::BACKEND_REQ,
        Req::GET_MAX_MEM_SLOTS | Req::ADD_MEM_REG | Req::REM_MEM_REG => {
            Protocol::CONFIGURE_MEM_SLOTS
        }
        _ => Protocol::empty(),
    }
}

/// The vring that a message names.
fn vring_index(index: u32) -> Result<u16> {
    match u16::try_from(index) {
        Ok(index) if index < MAX_VRINGS => Ok(index),
        _ => refuse(format!(
            "vring {index} is one too many, {MAX_VRINGS} are offered"
        )),
    }
}

/// Takes a descriptor that is to be read or written on a ring: an eventfd, a pipe or a socket (User
/// Mode Linux is notified through one). Others could be always ready, as a regular file is.
fn signal_fd(file: File) -> Result<OwnedFd> {
    let eventfd = || {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::fs::read_link(path).is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
    };
    let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
    if matches!(kind, FileType::Fifo | FileType::Socket) || eventfd() {
        return Ok(file.into());
    }
    refuse("a kick, call or error descriptor is no eventfd, pipe or socket")
}

fn region_address(region: &VhostUserMemoryRegion) -> RegionAddress {
    RegionAddress {
        guest: region.guest_phys_addr,
        len_bytes: region.memory_size,
        user: region.user_addr,
    }
}

impl Session {
    fn map_region(&self, region: &VhostUserMemoryRegion, file: &File) -> io::Result<Region> {
        let offset = region.mmap_offset;
        let mut mapped = Region::map(region_address(region), file, offset)?;
        if let Some(sharing) = &self.sharing {
            mapped.share(&**sharing, file, offset)?;
        }
        Ok(mapped)
    }

    /// Does what a message asks for, and answers it.
    ///
    /// # Errors
    ///
    /// When the session has to end; a client that wants an acknowledgement is told before.
    pub(super) fn handle(&mut self, mut message: Message) -> Result<()> {
        if !self.protocol.contains(feature_of(message.request)) {
            return refuse(format!(
                "{:?} belongs to a feature that was not negotiated",
                message.request
            ));
        }
        if let Some(number) = self.number(message.request) {
            message.body::<VhostUserEmpty>()?;
            return self.answer(&message, number.as_slice(), None);
        }
        match message.request {
            Req::GET_VRING_BASE => {
                let mut state: VhostUserVringState = message.body()?;
                state.num = self.get_vring_base(vring_index(state.index)?)?.into();
                self.answer(&message, state.as_slice(), None)
            }
            Req::GET_CONFIG => {
                let (wanted, space): (VhostUserConfig, _) = message.parts()?;
                if space.len() != wanted.size as usize {
                    return message.malformed();
                }
                let writeback = self.connection.writeback.load(Ordering::Acquire);
                let (limits, queues) = (self.connection.limits(), self.sizes.queues);
                let (offset, size) = (wanted.offset, wanted.size);
                let seg_max = self.seg_max();
                let config = config_space::config(limits, queues, seg_max, writeback, offset, size);
                self.answer(&message, &[wanted.as_slice(), &config].concat(), None)
            }
            Req::GET_INFLIGHT_FD => {
                // It is used when the client sends it back.
                let (told, file) = InflightBuffer::create(&message.body()?)?;
                self.answer(&message, told.as_slice(), Some(&file))
            }
            Req::SET_LOG_BASE => {
                let file = message.file()?;
                let told: VhostUserLog = message.body()?;
                self.log = Some(Arc::new(DirtyLog::map(&told, &file)?));
                // The client lets go of the log before this one when it has the answer.
                self.tell_threads()?;
                self.answer(&message, told.as_slice(), None)
            }
            _ => {
                let done = self.set(&mut message);
                if message.need_reply && self.protocol.contains(Protocol::REPLY_ACK) {
                    let failed = u64::from(done.is_err());
                    self.answer(&message, failed.as_slice(), None)?;
                }
                done
            }
        }
    }

    fn answer(&self, message: &Message, payload: &[u8], file: Option<&File>) -> Result<()> {
        message.answer(self.connection.stream(), payload, file)
    }

    /// The answer to a message that asks for a number.
    fn number(&self, request: Req) -> Option<u64> {
        Some(match request {
            Req::GET_FEATURES => self.offered(),
            Req::GET_PROTOCOL_FEATURES => OFFERED.bits(),
            Req::GET_QUEUE_NUM => u64::from(MAX_VRINGS),
            Req::GET_MAX_MEM_SLOTS => MAX_REGIONS as u64,
            Req::GET_STATUS => u64::from(self.status),
            _ => return None,
        })
    }

    /// A message that has no answer but an acknowledgement.
    fn set(&mut self, message: &mut Message) -> Result<()> {
        match message.request {
            // RESET_OWNER is deprecated, and without effect by the letter of the protocol.
            Req::SET_OWNER | Req::RESET_OWNER => {
                message.body::<VhostUserEmpty>()?;
            }
            Req::RESET_DEVICE => {
                message.body::<VhostUserEmpty>()?;
                self.reset()?;
            }
            Req::SET_STATUS => {
                let status = message.body::<VhostUserU64>()?.value;
                let Ok(status) = u8::try_from(status) else {
                    return refuse(format!("{status:#x} is no status of a device"));
                };
                if status == 0 {
                    self.reset()?;
                }
                self.status = status;
            }
            Req::SET_FEATURES => {
                self.set_features(message.body::<VhostUserU64>()?.value)?;
            }
            Req::SET_PROTOCOL_FEATURES => {
                let features = message.body::<VhostUserU64>()?.value;
                let excess = features & !OFFERED.bits();
                if excess != 0 {
                    return refuse(format!("protocol features {excess:#x} were not offered"));
                }
                self.protocol = Protocol::from_bits_truncate(features);
            }
            Req::SET_MEM_TABLE => {
                let files = std::mem::take(&mut message.files);
                let (told, payload): (VhostUserMemory, _) = message.parts()?;
                let payload = payload.chunks(size_of::<VhostUserMemoryRegion>());
                if told.num_regions as usize != files.len() || payload.len() != files.len() {
                    return message.malformed();
                }
                let mut regions = Vec::with_capacity(files.len());
                for (bytes, file) in payload.zip(files) {
                    let Some(region) = VhostUserMemoryRegion::from_slice(bytes) else {
                        return message.malformed();
                    };
                    regions.push(self.map_region(region, &file.into())?);
                }
                self.use_map(regions)?;
            }
            Req::ADD_MEM_REG => {
                let file = message.file()?;
                let added: VhostUserSingleMemoryRegion = message.body()?;
                let mut regions = self.map.regions().to_vec();
                regions.push(self.map_region(&added, &file)?);
                self.use_map(regions)?;
            }
            Req::REM_MEM_REG => {
                // Some clients send a descriptor, which is not needed.
                message.files.clear();
                let address = region_address(&*message.body::<VhostUserSingleMemoryRegion>()?);
                let mut regions = self.map.regions().to_vec();
                let before = regions.len();
                regions.retain(|region| region.address() != address);
                if regions.len() == before {
                    return refuse("no such memory region");
                }
                self.use_map(regions)?;
            }
            Req::SET_VRING_NUM => {
                let VhostUserVringState { index, num } = message.body()?;
                let vring = self.stopped_vring(vring_index(index)?)?;
                match u16::try_from(num) {
                    Ok(size) if size.is_power_of_two() && num <= MAX_QUEUE_SIZE => {
                        vring.size = size
                    }
                    _ => return refuse(format!("vring {index} cannot have {num} entries")),
                }
            }
            Req::SET_VRING_BASE => {
                let VhostUserVringState { index, num } = message.body()?;
                let Ok(base) = u16::try_from(num) else {
                    return refuse(format!("vring {index} cannot begin at index {num}"));
                };
                self.stopped_vring(vring_index(index)?)?.base = base;
            }
            Req::SET_VRING_ADDR => self.set_vring_addr(&message.body()?)?,
            Req::SET_VRING_ENABLE => {
                let VhostUserVringState { index, num } = message.body()?;
                if self.features & PROTOCOL_FEATURES == 0 || num > 1 {
                    return message.malformed();
                }
                self.set_vring_enable(vring_index(index)?, num == 1)?;
            }
            Req::SET_VRING_KICK | Req::SET_VRING_CALL | Req::SET_VRING_ERR => {
                let file = match message.files.len() {
                    0 => None,
                    _ => Some(signal_fd(message.file()?)?),
                };
                let value = message.body::<VhostUserU64>()?.value;
                if file.is_none() != (value & VRING_NO_FD != 0) {
                    return message.malformed();
                }
                // It is 255 at most.
                let index = u16::try_from(value & VRING_INDEX).unwrap_or(u16::MAX);
                self.set_vring_fd(message.request, index, file)?;
            }
            Req::SET_CONFIG => {
                let (told, bytes): (VhostUserConfig, _) = message.parts()?;
                if bytes.len() != told.size as usize {
                    return message.malformed();
                }
                self.set_config(told.offset, bytes)?;
            }
            // A descriptor to be written when something was marked in the log of dirty pages. Clients look at the
            // log by themselves; to write would be a system call for each batch of requests.
            Req::SET_LOG_FD => {
                message.file()?;
                message.body::<VhostUserEmpty>()?;
            }
            Req::SET_BACKEND_REQ_FD => {
                let channel = message.file()?;
                message.body::<VhostUserEmpty>()?;
                if socket_domain(&channel)? != AddressFamily::UNIX
                    || socket_type(&channel)? != SocketType::STREAM
                {
                    return refuse("the channel for messages of the back-end is no stream socket");
                }
                self.connection.set_channel(channel.into());
            }
            Req::SET_INFLIGHT_FD => {
                let file = message.file()?;
                let told: VhostUserInflight = message.body()?;
                if self.is_running() {
                    return refuse("the inflight buffer cannot change while vrings are running");
                }
                self.inflight = Some(InflightBuffer::map(&told, &file)?);
            }
            request => {
                return refuse(format!(
                    "{request:?} belongs to a feature that is not offered"
                ));
            }
        }
        Ok(())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let excess = features & !self.offered();
        if excess != 0 {
            return refuse(format!("features {excess:#x} were not offered"));
        }
        let changed = features ^ self.features;
        if changed & !LOG_ALL != 0 && self.is_running() {
            return refuse("features cannot change while vrings are running");
        }
        self.features = features;
        let cache = mask(VIRTIO_BLK_F_FLUSH) | mask(VIRTIO_BLK_F_CONFIG_WCE);
        if changed & cache != 0 {
            // A driver that has no flush begins with write-through (virtio 1.3, 5.2.5.2).
            let writeback = features & mask(VIRTIO_BLK_F_FLUSH) != 0;
            let writeback = writeback && self.connection.limits().write_cache;
            self.connection
                .writeback
                .store(writeback, Ordering::Release);
        }
        if changed & LOG_ALL != 0 {
            self.tell_threads()?;
        }
        Ok(())
    }

    fn set_vring_addr(&mut self, told: &VhostUserVringAddr) -> Result<()> {
        let logged = told.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
        let used_guest = logged.then_some(told.log);
        let addresses = RingAddresses {
            descriptors: told.descriptor,
            available: told.available,
            used: told.used,
        };
        let index = vring_index(told.index)?;
        let vring = self.vring(index);
        if vring.started && vring.addresses != Some(addresses) {
            return refuse(format!("vring {index} is running and cannot move"));
        }
        vring.addresses = Some(addresses);
        let was = std::mem::replace(&mut vring.used_guest, used_guest);
        if vring.started && was != used_guest {
            self.logging()?;
            return self.ask(index, |reply| Command::LogUsed(index, used_guest, reply));
        }
        self.start_if_ready(index)
    }

    fn get_vring_base(&mut self, index: u16) -> Result<u16> {
        let vring = self.vring(index);
        // The next start needs a new kick.
        vring.kick = None;
        if vring.started {
            self.stop_vring(index)?;
        }
        Ok(self.vring(index).base)
    }

    fn set_vring_fd(&mut self, request: Req, index: u16, fd: Option<OwnedFd>) -> Result<()> {
        let vring = self.vring(index);
        match request {
            Req::SET_VRING_KICK if fd.is_none() => {
                refuse("vrings that are polled, without a kick descriptor, are not offered")
            }
            Req::SET_VRING_KICK => {
                self.stopped_vring(index)?.kick = fd;
                self.start_if_ready(index)
            }
            Req::SET_VRING_CALL if vring.started => {
                self.ask(index, |reply| Command::Call(index, fd, reply))
            }
            Req::SET_VRING_CALL => {
                vring.call = fd;
                Ok(())
            }
            _ if vring.started => self.ask(index, |reply| Command::Error(index, fd, reply)),
            _ => {
                vring.error = fd;
                Ok(())
            }
        }
    }

    fn set_vring_enable(&mut self, index: u16, enable: bool) -> Result<()> {
        let vring = self.vring(index);
        vring.enabled = enable;
        if vring.started {
            return self.ask(index, |reply| Command::Enable(index, enable, reply));
        }
        self.start_if_ready(index)
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        let offered = self.offered() & mask(VIRTIO_BLK_F_CONFIG_WCE) != 0;
        match bytes {
            [writeback @ 0..=1]
                if offered && config_space::position(offset) == config_space::WRITEBACK_OFFSET =>
            {
                let writeback = *writeback == 1;
                self.connection
                    .writeback
                    .store(writeback, Ordering::Release);
                Ok(())
            }
            _ => refuse("only the writeback byte of the configuration can be written"),
        }
    }
}
