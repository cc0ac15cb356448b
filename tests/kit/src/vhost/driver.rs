//! The front-end: one connection, guest memory and its rings.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use super::{DATA, EVENT_IDX, Memory, NEXT, T_IN, T_OUT, UNTOUCHED, Vring, WRITE};

/// Feature bit of the log of dirty pages (linux/vhost.h).
const VHOST_F_LOG_ALL: u32 = 26;

/// A driver with one connection.
pub struct Driver {
    /// Its connection.
    pub frontend: Frontend,
    /// Guest memory.
    pub memory: Memory,
    /// What was negotiated.
    pub features: u64,
    /// Its rings.
    pub vrings: Vec<Vring>,
}

impl Driver {
    /// Negotiates and shares memory; starts nothing.
    pub fn connect(stream: UnixStream, features: u64) -> Self {
        Self::with_memory(stream, features, Memory::new())
    }

    /// Disconnects and negotiates again on another connection, with its memory as it is. Its vrings have
    /// to be started anew.
    #[must_use]
    pub fn reconnect(self, connect: impl FnOnce() -> UnixStream) -> Self {
        // A disk that can be written takes no second client.
        drop(self.frontend);
        let mut driver = Self::with_memory(connect(), self.features, self.memory);
        driver.vrings = self.vrings;
        driver
    }

    /// Switches the log of dirty pages on, as a client does whose migration begins.
    pub fn begin_migration(&self) {
        let log = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&log, 4096).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: 4096,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        self.frontend.set_log_base(0, Some(region)).unwrap();
        let log_all = 1 << VHOST_F_LOG_ALL;
        (self.frontend.set_features(self.features | log_all)).unwrap();
    }

    fn with_memory(stream: UnixStream, features: u64, memory: Memory) -> Self {
        let mut frontend = Frontend::from_stream(stream, 0x8000);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        let missing = features & !offered;
        assert_eq!(
            missing, 0,
            "the device does not offer {missing:#x}: leave them out"
        );
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).unwrap();
        frontend.set_mem_table(&[memory.region()]).unwrap();
        Self {
            frontend,
            memory,
            features,
            vrings: Vec::new(),
        }
    }

    /// Connects and starts one vring of 128.
    pub fn running(stream: UnixStream, features: u64) -> Self {
        let mut driver = Self::connect(stream, features);
        driver.add_vring(128);
        driver
    }

    /// Starts one vring more.
    pub fn add_vring(&mut self, size: u16) {
        let mut vring = Vring::new(self.vrings.len(), size);
        vring.event_index = self.features & EVENT_IDX != 0;
        self.vrings.push(vring);
        self.start(self.vrings.len() - 1, 0);
    }

    /// Starts a vring whose first available entry is `base`.
    pub fn start(&mut self, index: usize, base: u16) {
        let vring = &self.vrings[index];
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, vring.size).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_addr(index, &vring.addresses()).unwrap();
        frontend.set_vring_kick(index, &vring.kick).unwrap();
        frontend.set_vring_call(index, &vring.call).unwrap();
        frontend.set_vring_err(index, &vring.error).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    /// Writes descriptors 0… of a vring as one chain and offers it.
    pub fn submit_on(&mut self, index: usize, first: u16, chain: &[(u64, u32, u16)]) {
        let vring = &mut self.vrings[index];
        for (at, &(address, len, flags)) in (first..).zip(chain) {
            let last = usize::from(at - first) + 1 == chain.len();
            let flags = if last { flags } else { flags | NEXT };
            self.memory
                .descriptor(vring.descriptors, at, (address, len, flags, at + 1));
        }
        let old = vring.next_available;
        vring.offer(&self.memory, first);
        vring.kick_if_wanted(&self.memory, old);
    }

    /// Writes a header at `address`.
    pub fn header(&self, address: u64, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.put(address, &header);
    }

    /// One ordinary request on vring 0: status and used length. Data is at `DATA + 4096`.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[(u32, u16)]) -> (u8, u32) {
        self.prepare(kind, sector, data);
        let (head, len) = self.vrings[0].wait(&self.memory);
        assert_eq!(head, 0);
        (self.memory.byte(DATA + 16), len)
    }

    /// Offers one ordinary request on vring 0.
    pub fn prepare(&mut self, kind: u32, sector: u64, data: &[(u32, u16)]) {
        self.header(DATA, kind, sector);
        self.memory.put(DATA + 16, &[UNTOUCHED]);
        let mut chain = vec![(DATA, 16, 0)];
        let mut at = DATA + 4096;
        for &(len, flags) in data {
            chain.push((at, len, flags));
            at += u64::from(len);
        }
        chain.push((DATA + 16, 1, WRITE));
        self.submit_on(0, 0, &chain);
    }

    /// Writes from a sector on; the status.
    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.memory.put(DATA + 4096, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(T_OUT, sector, &[(len, 0)]).0
    }

    /// Reads from a sector on: status and data.
    pub fn read(&mut self, sector: u64, len: usize) -> (u8, Vec<u8>) {
        let length = u32::try_from(len).unwrap();
        let (status, _) = self.request(T_IN, sector, &[(length, WRITE)]);
        (status, self.memory.get(DATA + 4096, len))
    }

    /// A discard or write-zeroes of one segment.
    pub fn segment(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.memory.put(DATA + 4096, &segment);
        self.request(kind, 0, &[(16, 0)]).0
    }
}
