//! A client that sends any messages with any descriptors in any order, over guest memory with requests in it.
//!
//! What must hold: the session ends when the client hangs up, and leaves nothing: no thread, no descriptor, no mapping,
//! and the disk to nobody.

use std::cell::RefCell;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use testkit::vhost::raw::{self, FrontendReq as Req, NEED_REPLY, pair};
use ublkup::door::ownership::{Ownership, OwnershipState};
use ublkup::door::vhost::testing::serve_session;
use ublkup::storage::Memory;

use crate::Script;

/// Messages of one input, at most.
const MAX_MESSAGES: usize = 64;

const MEMORY_BYTES: u64 = 0x1_0000;
const USER: u64 = 0x7000_0000_0000;

/// What each vring has of the memory: descriptors, then the available ring, then the used ring.
const VRING_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const BUFFERS: u64 = 0x4000;

/// All protocol features that are offered.
const PROTOCOL: u64 = 0x1_b22b;

/// `VHOST_F_LOG_ALL`.
const LOG_ALL: u64 = 1 << 26;

/// Features of the disk: flush, cache mode, indirect descriptors, event index, protocol features, version 1.
const FEATURES: u64 = 1 << 9 | 1 << 11 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;

/// Sessions after which what the process has mapped is counted.
const COUNT_EVERY: u64 = 1024;

/// More mappings than a process has that leaks none.
const MAX_MAPPINGS: usize = 1000;

struct World {
    disk: Arc<Memory>,
    memory: File,
    /// Neither memory nor anything that can be kicked through.
    odd: [File; 2],
    sessions: u64,
    /// The lowest descriptor that is free between two sessions.
    free_fd: Option<i32>,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

impl World {
    fn new() -> Self {
        let limits = crate::limits(1 << 20);
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&memory, MEMORY_BYTES).expect("memory");
        Self {
            disk: Arc::new(Memory::new(limits).expect("a disk")),
            memory: memory.into(),
            odd: ["/dev/null", "/proc/self/status"].map(|path| File::open(path).expect("opened")),
            sessions: 0,
            free_fd: None,
        }
    }

    /// Rings with a read, a write, a flush and an identification each.
    fn fill_memory(&self) {
        let mut bytes = vec![0; offset(MEMORY_BYTES)];
        for vring in [0, VRING_BYTES] {
            for (number, kind) in [0_u32, 1, 4, 8].into_iter().enumerate() {
                let header = BUFFERS + 0x100 * number as u64;
                let flags = if kind == 1 { 1 } else { 3 };
                let chain = [
                    (header, 16, 1, 1),
                    (BUFFERS + 0x1000, 512, flags, 2),
                    (header + 0x20, 1, 2, 0),
                ];
                let first = 3 * number as u64;
                for (at, (address, len, flags, next)) in (first..).zip(chain) {
                    let next = (first + next) << 48;
                    let rest: u64 = len | flags << 32 | next;
                    put(&mut bytes, vring + 16 * at, &u64::to_le_bytes(address));
                    put(&mut bytes, vring + 16 * at + 8, &rest.to_le_bytes());
                }
                put(&mut bytes, header, &kind.to_le_bytes());
                let slot = vring + AVAILABLE + 4 + 2 * number as u64;
                put(&mut bytes, slot, &first.to_le_bytes()[..2]);
            }
            put(&mut bytes, vring + AVAILABLE + 2, &[4, 0]);
        }
        self.memory.write_all_at(&bytes, 0).expect("written");
    }

    /// What a session must not leave.
    fn check(&mut self) {
        let free = self.memory.try_clone().expect("a descriptor").as_raw_fd();
        let before = *self.free_fd.get_or_insert(free);
        assert_eq!(free, before, "a session left a descriptor");
        self.sessions += 1;
        if self.sessions.is_multiple_of(COUNT_EVERY) {
            let maps = std::fs::read_to_string("/proc/self/maps").expect("mappings");
            let count = maps.lines().count();
            assert!(count < MAX_MAPPINGS, "sessions left mappings: {count}");
        }
    }
}

fn offset(at: u64) -> usize {
    usize::try_from(at).expect("the memory is small")
}

fn put(bytes: &mut [u8], at: u64, what: &[u8]) {
    bytes[offset(at)..][..what.len()].copy_from_slice(what);
}

/// Runs one input.
pub fn run(input: &[u8]) {
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(World::new);
        session(world, &mut Script::new(input));
        world.check();
    });
}

fn session(world: &World, script: &mut Script<'_>) {
    world.fill_memory();
    let (client, stream) = UnixStream::pair().expect("a connection");
    client.set_nonblocking(true).expect("set");
    let mut client = Client {
        world,
        stream: client,
        sent: 0,
        hung_up: false,
    };
    while !script.is_over() && client.sent < MAX_MESSAGES && !client.hung_up {
        client.step(script);
    }
    // All is sent before it is read; the answers fit into the socket.
    client.stream.shutdown(Shutdown::Write).expect("shut down");
    let ownership = Ownership::new("fuzz", false, Duration::ZERO, None);
    ownership.open(None);
    serve_session(stream, Arc::clone(&world.disk), Arc::clone(&ownership));
    assert_eq!(ownership.state(), OwnershipState::Free);
}

struct Client<'a> {
    world: &'a World,
    stream: UnixStream,
    sent: usize,
    hung_up: bool,
}

impl Client<'_> {
    fn step(&mut self, script: &mut Script<'_>) {
        match script.u8() % 8 {
            0 => self.negotiate(script),
            1 => self.start_vring(script),
            2 => self.garbage(script),
            3 => {
                let at = u64::from(script.u16()) % (MEMORY_BYTES - 8);
                let value = script.u64().to_le_bytes();
                let written = self.world.memory.write_all_at(&value, at);
                written.expect("written");
            }
            _ => self.one(script),
        }
    }

    fn send(&mut self, request: u32, flags: u32, words: &[u64], files: &[BorrowedFd<'_>]) {
        let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send_bytes(&raw::message(request, flags, &payload), files);
    }

    fn send_bytes(&mut self, bytes: &[u8], files: &[BorrowedFd<'_>]) {
        self.sent += 1;
        // A socket that is full, or too many descriptors on their way: the rest is not sent.
        self.hung_up |= raw::send(&self.stream, bytes, files).is_err();
    }

    fn simple(&mut self, request: Req, words: &[u64]) {
        self.send(request as u32, 0, words, &[]);
    }

    /// What a client begins with.
    fn negotiate(&mut self, script: &mut Script<'_>) {
        let bits = script.u8();
        let protocol = match bits & 1 {
            0 => PROTOCOL,
            _ => PROTOCOL & script.u64(),
        };
        let features = match bits >> 1 & 3 {
            0 => FEATURES,
            1 => FEATURES | LOG_ALL,
            2 => FEATURES & script.u64(),
            _ => FEATURES ^ script.u64(),
        };
        let table = [pair(1, 0), 0, MEMORY_BYTES, USER, 0];
        self.simple(Req::SET_OWNER, &[]);
        self.simple(Req::SET_PROTOCOL_FEATURES, &[protocol]);
        self.simple(Req::SET_FEATURES, &[features]);
        let memory = self.world.memory.as_fd();
        self.send(Req::SET_MEM_TABLE as u32, 0, &table, &[memory]);
    }

    fn start_vring(&mut self, script: &mut Script<'_>) {
        let bits = script.u8();
        let vring = u32::from(bits & 1);
        let at = USER + VRING_BYTES * u64::from(vring);
        let size = 16 << (bits >> 1 & 3);
        let addresses = [pair(vring, 0), at, at + USED, at + AVAILABLE, 0];
        self.simple(Req::SET_VRING_NUM, &[pair(vring, size)]);
        self.simple(Req::SET_VRING_BASE, &[pair(vring, 0)]);
        self.simple(Req::SET_VRING_ADDR, &addresses);
        for request in [Req::SET_VRING_CALL, Req::SET_VRING_ERR, Req::SET_VRING_KICK] {
            let signal = signal(bits & 0x10 == 0);
            self.send(request as u32, 0, &[vring.into()], &[signal.as_fd()]);
        }
        self.simple(Req::SET_VRING_ENABLE, &[pair(vring, 1)]);
    }

    /// Bytes, with descriptors or without.
    fn garbage(&mut self, script: &mut Script<'_>) {
        let files = Files::of(script, self.world);
        let len_bytes = usize::from(script.u8());
        let bytes = script.bytes(len_bytes);
        if !bytes.is_empty() {
            self.send_bytes(bytes, &files.borrowed());
        }
    }

    /// One message whose payload is nearly right.
    fn one(&mut self, script: &mut Script<'_>) {
        const REQUESTS: [Req; 29] = [
            Req::GET_FEATURES,
            Req::SET_FEATURES,
            Req::SET_OWNER,
            Req::RESET_OWNER,
            Req::SET_MEM_TABLE,
            Req::SET_LOG_BASE,
            Req::SET_LOG_FD,
            Req::SET_VRING_NUM,
            Req::SET_VRING_ADDR,
            Req::SET_VRING_BASE,
            Req::GET_VRING_BASE,
            Req::SET_VRING_KICK,
            Req::SET_VRING_CALL,
            Req::SET_VRING_ERR,
            Req::GET_PROTOCOL_FEATURES,
            Req::SET_PROTOCOL_FEATURES,
            Req::GET_QUEUE_NUM,
            Req::SET_VRING_ENABLE,
            Req::SET_BACKEND_REQ_FD,
            Req::GET_CONFIG,
            Req::SET_CONFIG,
            Req::GET_INFLIGHT_FD,
            Req::SET_INFLIGHT_FD,
            Req::RESET_DEVICE,
            Req::GET_MAX_MEM_SLOTS,
            Req::ADD_MEM_REG,
            Req::REM_MEM_REG,
            Req::GET_STATUS,
            Req::SET_STATUS,
        ];
        let number = script.u8();
        let request = match REQUESTS.get(usize::from(number)) {
            Some(request) => *request as u32,
            None => number.into(),
        };
        let bits = script.u8();
        let flags = if bits & 1 == 0 { 0 } else { NEED_REPLY };
        let files = Files::of(script, self.world);
        let mut word = || match script.u8() {
            0..=2 => 0,
            3..=5 => 1,
            6 => 0x1000,
            7 => MEMORY_BYTES,
            8 => USER,
            9 => USER + u64::from(script.u16()),
            10 => pair(script.u8().into(), script.u8().into()),
            11 => pair(0, 1 << (script.u8() & 15)),
            12 => script.u64(),
            13 => u64::MAX - u64::from(script.u8()),
            n => n.into(),
        };
        // Most payloads are this many words long.
        let count = match bits >> 1 & 15 {
            n @ 0..=12 => usize::from(n),
            _ => 1,
        };
        let words: Vec<u64> = (0..count).map(|_| word()).collect();
        let mut payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        if bits & 0x40 != 0 {
            payload.truncate(payload.len().saturating_sub(4));
        }
        if bits & 0x80 != 0 {
            let more = usize::from(script.u8());
            payload.extend_from_slice(script.bytes(more));
        }
        self.send_bytes(&raw::message(request, flags, &payload), &files.borrowed());
    }
}

/// A descriptor to be kicked or called through; kicked already, or not.
fn signal(kicked: bool) -> OwnedFd {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    eventfd(u32::from(kicked), flags).expect("made")
}

/// What comes with a message.
struct Files<'a> {
    own: Vec<OwnedFd>,
    others: Vec<BorrowedFd<'a>>,
}

impl<'a> Files<'a> {
    fn of(script: &mut Script<'_>, world: &'a World) -> Self {
        let mut files = Self {
            own: Vec::new(),
            others: Vec::new(),
        };
        let count = match script.u8() {
            n @ 0..=9 => n,
            10..=99 => 1,
            _ => 0,
        };
        for _ in 0..count {
            match script.u8() % 10 {
                0..=2 => files.others.push(world.memory.as_fd()),
                3 => files.own.push(signal(true)),
                4 => files.own.push(signal(false)),
                5 => files.others.push(world.odd[0].as_fd()),
                6 => files.others.push(world.odd[1].as_fd()),
                7 => {
                    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
                    files.own.push(if script.bool() { reader } else { writer });
                }
                8 => {
                    let (one, other) = UnixStream::pair().expect("a pair");
                    files.own.push(one.into());
                    if script.bool() {
                        files.own.push(other.into());
                    }
                }
                _ => {
                    let short = memfd_create("short", MemfdFlags::CLOEXEC).expect("memory");
                    ftruncate(&short, u64::from(script.u16())).expect("memory");
                    files.own.push(short);
                }
            }
        }
        files
    }

    fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        let own = self.own.iter().map(AsFd::as_fd);
        own.chain(self.others.iter().copied()).collect()
    }
}
