//! A driver that can be told to misbehave: guest memory, split rings and the vhost-user messages.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use ublkup::door::ownership::Ownership;
use ublkup::door::vhost::{VhostConfig, VhostDoor};
use ublkup::engine::Storage;
use ublkup::engine::counters::CounterSet;
use ublkup::engine::polling::Polling;
use ublkup::engine::threads::ThreadOptions;
use ublkup::request::{Limits, Serial};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;
pub const PROTOCOL: u64 = 1 << 30;
pub const FLUSH: u64 = 1 << 9;
pub const CONFIG_WCE: u64 = 1 << 11;
pub const DISCARD: u64 = 1 << 13;
pub const WRITE_ZEROES: u64 = 1 << 14;
/// What an ordinary driver accepts.
pub const USUAL: u64 =
    VERSION_1 | INDIRECT | PROTOCOL | FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const TABLE: u16 = 4;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// What a status byte holds before the device writes it.
pub const UNTOUCHED: u8 = 0xaa;

/// Guest memory of every driver here.
pub const MEMORY_BYTES: u64 = 4 << 20;
/// Where the driver claims to have its memory mapped.
pub const USER_BASE: u64 = 0x7000_0000_0000;
/// Where test data may be put: rings are below.
pub const DATA: u64 = 1 << 20;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn limits(capacity_bytes: u64) -> Limits {
    Limits {
        capacity: capacity_bytes.into(),
        block_bytes: 512,
        physical_block_bytes: 4096,
        optimal_io_bytes: 0,
        max_io_bytes: 1 << 20,
        discard_granularity_bytes: 4096,
        max_discard_bytes: 1 << 30,
        max_write_zeroes_bytes: 1 << 30,
        read_only: false,
        write_cache: true,
        serial: Serial::new("serial-of-20-letters").unwrap(),
    }
}

/// A directory that goes away, with a name nobody else has.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ublkup-test-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// The right to a disk without a block door.
pub fn open_access(read_only: bool) -> Arc<Ownership> {
    let access = Ownership::new("test", read_only, Duration::from_secs(1), None);
    access.open(None);
    access
}

/// A door with its directory and counters.
pub struct Fixture {
    pub door: VhostDoor,
    pub access: Arc<Ownership>,
    pub counters: Arc<CounterSet>,
    pub scratch: Scratch,
}

impl Fixture {
    pub fn new<B: Storage>(disk: B, queue_threads: u16) -> Self {
        Self::polling(disk, queue_threads, Polling::default())
    }

    /// A fixture whose queue threads wait in this way.
    pub fn polling<B: Storage>(disk: B, queue_threads: u16, polling: Polling) -> Self {
        Self::with(disk, (queue_threads, queue_threads), polling)
    }

    /// A fixture with so many queues and so many threads for them.
    pub fn with<B: Storage>(
        disk: B,
        (queues, queue_threads): (u16, u16),
        polling: Polling,
    ) -> Self {
        let scratch = Scratch::new();
        let counters = Arc::new(CounterSet::default());
        let access = open_access(disk.limits().read_only);
        let config = VhostConfig {
            name: "test".into(),
            socket: scratch.0.join("s"),
            queues,
            queue_threads,
            threads: ThreadOptions {
                polling,
                cpus: None,
            },
            access: Arc::clone(&access),
        };
        let door = VhostDoor::start(config, Arc::new(disk), Arc::clone(&counters)).unwrap();
        Self {
            door,
            access,
            counters,
            scratch,
        }
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.door.path()).unwrap()
    }

    /// Waits until all sessions are gone.
    pub fn wait_empty(&self) {
        eventually("the sessions end", || self.door.sessions().is_empty());
    }
}

/// What a driver does that may not succeed: its helpers panic when the device refuses.
pub fn attempt<T>(what: impl FnOnce() -> T) -> Result<T, String> {
    let what = std::panic::AssertUnwindSafe(what);
    std::panic::catch_unwind(what).map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(_) => "the device refused".to_owned(),
    })
}

pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen that {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Guest memory, mapped twice: here and in the server.
pub struct Memory {
    pub file: File,
    base: *mut u8,
}

// SAFETY: the mapping belongs to the value; all access is raw or atomic.
unsafe impl Send for Memory {}

impl Memory {
    pub fn new() -> Self {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, MEMORY_BYTES).unwrap();
        let len = usize::try_from(MEMORY_BYTES).unwrap();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) };
        Self {
            file,
            base: base.unwrap().cast(),
        }
    }

    pub fn at(&self, address: u64, len: usize) -> *mut u8 {
        assert!(address + len as u64 <= MEMORY_BYTES);
        self.base.wrapping_add(usize::try_from(address).unwrap())
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        // SAFETY: `at` checked the range; nothing else in this process refers to the memory.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(address, bytes.len()), bytes.len())
        };
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: as for `put`.
        unsafe { ptr::copy_nonoverlapping(self.at(address, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub fn byte(&self, address: u64) -> u8 {
        // SAFETY: as for `put`.
        unsafe { self.at(address, 1).read_volatile() }
    }

    pub fn word(&self, address: u64) -> &AtomicU16 {
        // SAFETY: mapped as long as `self`, aligned by the callers, only accessed atomically.
        unsafe { AtomicU16::from_ptr(self.at(address, 2).cast()) }
    }

    pub fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): Raw) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        self.part(0, MEMORY_BYTES)
    }

    /// A region for a part of the memory.
    pub fn part(&self, from: u64, len: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: from,
            memory_size: len,
            userspace_addr: USER_BASE + from,
            mmap_offset: from,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping after the value.
        unsafe { munmap(self.base.cast(), usize::try_from(MEMORY_BYTES).unwrap()) }.unwrap();
    }
}

/// Address, length, flags, next.
pub type Raw = (u64, u32, u16, u16);

/// A ring on the driver's side. Its parts are at `base`, spaced for the largest size used here.
pub struct Vring {
    pub index: usize,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub next_available: u16,
    pub next_used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
    pub event_index: bool,
    pub kicks: u64,
}

impl Vring {
    pub fn new(index: usize, size: u16) -> Self {
        let base = 0x1_0000 * (index as u64);
        Self {
            index,
            size,
            descriptors: base,
            available: base + 0x8000,
            used: base + 0xa000,
            next_available: 0,
            next_used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            error: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            event_index: false,
            kicks: 0,
        }
    }

    /// Where it is, as the device is told; its used ring is not to be logged.
    pub fn addresses(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER_BASE + self.descriptors,
            used_ring_addr: USER_BASE + self.used,
            avail_ring_addr: USER_BASE + self.available,
            log_addr: None,
        }
    }

    /// Makes a chain available without telling.
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        memory
            .word(self.available + 4 + 2 * entry)
            .store(head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        memory
            .word(self.available + 2)
            .store(self.next_available, Ordering::Release);
    }

    /// Kicks if the device wants it, as it was after `old` (the index before the offers).
    pub fn kick_if_wanted(&mut self, memory: &Memory, old: u16) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let at = self.used + 4 + 8 * u64::from(self.size);
            let event = memory.word(at).load(Ordering::Relaxed);
            let new = self.next_available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            memory.word(self.used).load(Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kicks += 1;
            self.kick.write(1).unwrap();
        }
    }

    /// Waits until the device sleeps and has taken everything that was offered. Needs the event
    /// index, which says up to where it looked.
    pub fn wait_taken(&self, memory: &Memory) {
        assert!(self.event_index);
        let at = self.used + 4 + 8 * u64::from(self.size);
        eventually("the device takes what was offered", || {
            memory.word(at).load(Ordering::Acquire) == self.next_available
        });
    }

    pub fn used_index(&self, memory: &Memory) -> u16 {
        memory.word(self.used + 2).load(Ordering::Acquire)
    }

    /// The next used entry if there is one: head and length.
    pub fn reap(&mut self, memory: &Memory) -> Option<(u32, u32)> {
        if self.used_index(memory) == self.next_used {
            return None;
        }
        let entry = u64::from(self.next_used % self.size);
        let bytes = memory.get(self.used + 4 + 8 * entry, 8);
        self.next_used = self.next_used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Sleeps until the device has returned something, woken by nothing but its notification.
    pub fn wait(&mut self, memory: &Memory) -> (u32, u32) {
        loop {
            if self.event_index {
                let at = self.available + 4 + 2 * u64::from(self.size);
                memory.word(at).store(self.next_used, Ordering::Relaxed);
                fence(Ordering::SeqCst);
            }
            if let Some(entry) = self.reap(memory) {
                return entry;
            }
            assert!(readable(&self.call, PATIENCE), "no notification came");
            self.call.read().unwrap();
        }
    }
}

pub fn readable(fd: &EventFd, limit: Duration) -> bool {
    // SAFETY: the descriptor stays open during the borrow.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let limit = Timespec::try_from(limit).unwrap();
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&limit),
    )
    .unwrap()
        > 0
}

/// A driver with one connection.
pub struct Driver {
    pub frontend: Frontend,
    pub memory: Memory,
    pub features: u64,
    pub vrings: Vec<Vring>,
}

impl Driver {
    /// Negotiates and shares memory; starts nothing.
    pub fn connect(stream: UnixStream, features: u64) -> Self {
        Self::with_memory(stream, features, Memory::new())
    }

    /// Hangs up and comes again by another connection, with its memory as it is. Its vrings have to be
    /// started anew.
    pub fn reconnect(self, stream: UnixStream) -> Self {
        drop(self.frontend);
        let mut driver = Self::with_memory(stream, self.features, self.memory);
        driver.vrings = self.vrings;
        driver
    }

    fn with_memory(stream: UnixStream, features: u64, memory: Memory) -> Self {
        let mut frontend = Frontend::from_stream(stream, 0x8000);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(features & !offered, 0, "the device offers {offered:#x}");
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

    pub fn add_vring(&mut self, size: u16) {
        let mut vring = Vring::new(self.vrings.len(), size);
        vring.event_index = self.features & EVENT_IDX != 0;
        self.vrings.push(vring);
        self.start(self.vrings.len() - 1, 0);
    }

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

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.memory.put(DATA + 4096, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(T_OUT, sector, &[(len, 0)]).0
    }

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
