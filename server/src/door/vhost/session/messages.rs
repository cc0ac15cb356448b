//! What each message of the protocol does to a session.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, fstat};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;

use super::super::config::MAX_VRINGS;
use super::super::config_space::{self, mask};
use super::super::dirty::DirtyLog;
use super::super::inflight::InflightBuffer;
use super::super::memory::{MAX_REGIONS, Region, RegionAddress};
use super::super::queue::Command;
use super::super::ring_layout::{MAX_QUEUE_SIZE, RingAddresses};
use super::{LOG_ALL, Session, failed, not_offered, refuse};

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
        Ok(config_space::config(
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
            [writeback @ 0..=1] if offered && offset == config_space::WRITEBACK_OFFSET => {
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
