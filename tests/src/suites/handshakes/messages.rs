//! What a client sends that means it, message by message, and what it passes.

use anyhow::Result;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use testkit::vhost::raw::{self, FrontendReq, pair};

/// Where a client claims to have its memory mapped, and how much it has.
pub(super) const USER_BASE: u64 = 0x7000_0000_0000;
pub(super) const MEMORY_BYTES: u64 = 1 << 20;

/// Vrings of a client that comes that far.
pub(super) const VRINGS: u32 = 4;

/// What a client has that is passed as a descriptor.
pub(super) struct Things {
    pub(super) memory: File,
    pub(super) bell: File,
    /// Things that are neither memory nor a bell.
    pub(super) odd: Vec<File>,
}

impl Things {
    pub(super) fn new() -> Result<Self> {
        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
        ftruncate(&memory, MEMORY_BYTES)?;
        let (pipe, _) = rustix::pipe::pipe()?;
        Ok(Self {
            memory,
            bell: File::from(eventfd(0, EventfdFlags::CLOEXEC)?),
            odd: vec![
                File::open("/dev/null")?,
                File::open("/")?,
                File::open("/proc/self/status")?,
                File::from(pipe),
                // Shorter than any region of it.
                File::from(memfd_create("short", MemfdFlags::CLOEXEC)?),
            ],
        })
    }
}

/// Which descriptor belongs to a message.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Passes {
    Nothing,
    Memory,
    Bell,
}

pub(super) struct Message {
    pub(super) request: u32,
    pub(super) payload: Vec<u8>,
    pub(super) passes: Passes,
}

impl Message {
    pub(super) fn new(request: FrontendReq, words: &[u64], passes: Passes) -> Self {
        Self {
            request: request as u32,
            payload: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
            passes,
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        raw::message(self.request, 0, &self.payload)
    }

    pub(super) fn descriptors<'a>(&self, things: &'a Things) -> Vec<BorrowedFd<'a>> {
        match self.passes {
            Passes::Nothing => Vec::new(),
            Passes::Memory => vec![things.memory.as_fd()],
            Passes::Bell => vec![things.bell.as_fd()],
        }
    }
}

/// What a client says that means it, after it has asked for features.
pub(super) fn handshake(features: u64, protocol: u64) -> Vec<Message> {
    use FrontendReq as Req;
    let table = [pair(1, 0), 0, MEMORY_BYTES, USER_BASE, 0];
    let plain = |request, words: &[u64]| Message::new(request, words, Passes::Nothing);
    let bell = |request, index| Message::new(request, &[index], Passes::Bell);
    let mut messages = vec![
        plain(Req::SET_OWNER, &[]),
        plain(Req::SET_PROTOCOL_FEATURES, &[protocol]),
        plain(Req::SET_FEATURES, &[features]),
        Message::new(Req::SET_MEM_TABLE, &table, Passes::Memory),
    ];
    for vring in 0..VRINGS {
        let at = USER_BASE + u64::from(vring) * 0x1_0000;
        let index = u64::from(vring);
        // Descriptors, used, available, log.
        let addresses = [pair(vring, 0), at, at + 0x2000, at + 0x1000, 0];
        messages.extend([
            plain(Req::SET_VRING_NUM, &[pair(vring, 64)]),
            plain(Req::SET_VRING_BASE, &[pair(vring, 0)]),
            plain(Req::SET_VRING_ADDR, &addresses),
            bell(Req::SET_VRING_CALL, index),
            bell(Req::SET_VRING_ERR, index),
            bell(Req::SET_VRING_KICK, index),
            plain(Req::SET_VRING_ENABLE, &[pair(vring, 1)]),
        ]);
    }
    messages
}

/// Reads of four sectors each that a client with running vrings has under way.
pub(super) const READS: u16 = 8;

/// Where in its memory they have their data, header and status; behind all rings.
pub(super) const DATA: u64 = MEMORY_BYTES / 2;

/// Puts reads on the first vring, which is new, and kicks.
pub(super) fn offer_reads(things: &Things) -> Result<()> {
    const NEXT: u64 = 1;
    const WRITE: u64 = 2;
    for number in 0..u64::from(READS) {
        let at = DATA + number * 0x1000;
        things.memory.write_all_at(&[0; 16], at)?;
        let first = 3 * number;
        // Address; length, flags, next.
        let chain = [
            (at, 16 | NEXT << 32 | (first + 1) << 48),
            (at + 512, 2048 | (WRITE | NEXT) << 32 | (first + 2) << 48),
            (at + 16, 1 | WRITE << 32),
        ];
        for (index, (address, rest)) in (first..).zip(chain) {
            let bytes = [address, rest].map(u64::to_le_bytes).concat();
            things.memory.write_all_at(&bytes, 16 * index)?;
        }
        let head = u16::try_from(first)?.to_le_bytes();
        things.memory.write_all_at(&head, 0x1000 + 4 + 2 * number)?;
    }
    things
        .memory
        .write_all_at(&READS.to_le_bytes(), 0x1000 + 2)?;
    (&things.bell).write_all(&1u64.to_ne_bytes())?;
    Ok(())
}

/// Changes of the memory table, in an order that makes sense, and each of which takes the memory of some
/// ring or request away, or moves it.
pub(super) fn changes() -> Vec<Message> {
    let table = |guest: u64, len: u64, offset: u64| {
        let words = [pair(1, 0), guest, len, USER_BASE + guest, offset];
        Message::new(FrontendReq::SET_MEM_TABLE, &words, Passes::Memory)
    };
    let region = |request: FrontendReq, passes: Passes| {
        let half = MEMORY_BYTES / 2;
        Message::new(request, &[0, half, half, USER_BASE + half, half], passes)
    };
    vec![
        table(0, MEMORY_BYTES, 0),
        table(0, MEMORY_BYTES / 2, 0),
        region(FrontendReq::ADD_MEM_REG, Passes::Memory),
        region(FrontendReq::REM_MEM_REG, Passes::Nothing),
        table(0, MEMORY_BYTES / 2, MEMORY_BYTES / 2),
        table(0x1000, 0x1000, 0x1000),
        table(0, MEMORY_BYTES, 0),
    ]
}
