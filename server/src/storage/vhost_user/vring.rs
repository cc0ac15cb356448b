//! The driver's side of a split virtqueue (virtio 1.3, 2.7), in memory that the server can write to at any time.
//!
//! Nothing that is read from that memory is trusted, and nothing that was written to it is read back: which descriptors
//! are in use is noted here. What the server may say is that a chain has been used, and each is taken at its word once.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{Bytes, VolatileSlice};

use crate::io::AnonymousMemory;

/// Descriptors of a virtqueue, and requests that it can have with indirect ones.
pub(super) const SIZE: u16 = 256;

/// Segments of data in a request: with header and status a table of 128 descriptors.
pub(super) const MAX_SEGMENTS: usize = 126;

// Where the parts of a virtqueue begin in its memory.
const DESCRIPTORS: usize = 0;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
/// What belongs to a request beside its data: header, status and the range of a discard, for each descriptor.
const CONTROL: usize = 0x3000;
/// The indirect tables.
const TABLES: usize = 0x8000;

const DESCRIPTOR_BYTES: usize = 16;
const CONTROL_BYTES: usize = 64;
const TABLE_BYTES: usize = (MAX_SEGMENTS + 2) * DESCRIPTOR_BYTES;

/// Memory of one virtqueue.
const EACH_BYTES: usize = 0x10_0000;

const _: () = {
    assert!(AVAILABLE >= DESCRIPTORS + SIZE as usize * DESCRIPTOR_BYTES);
    assert!(USED >= AVAILABLE + 6 + 2 * SIZE as usize);
    assert!(CONTROL >= USED + 6 + 8 * SIZE as usize);
    assert!(TABLES >= CONTROL + SIZE as usize * CONTROL_BYTES);
    assert!(EACH_BYTES >= TABLES + SIZE as usize * TABLE_BYTES);
};

// In the control memory of a request.
const HEADER: usize = 0;
const HEADER_BYTES: usize = 16;
const RANGE: usize = 16;
const RANGE_BYTES: usize = 16;
const STATUS: usize = 32;

/// What a status byte is before the server writes it; no status has this value.
const NO_STATUS: u8 = 0xff;

/// Why an access to the memory of the rings cannot fail.
const INSIDE: &str = "the access is aligned and inside of the memory of the rings";

/// The memory of all virtqueues of a connection: one region for the server.
#[derive(Debug)]
pub(super) struct RingMemory {
    memory: AnonymousMemory,
    file: OwnedFd,
    /// Where the server sees it.
    guest: u64,
}

impl RingMemory {
    /// Memory for `queues` virtqueues that have nothing in them, which the server is to see at `guest`.
    pub(super) fn new(queues: u16, guest: u64) -> io::Result<Self> {
        let len_bytes = EACH_BYTES * usize::from(queues);
        let (memory, file) = AnonymousMemory::shareable("ublkup-rings", len_bytes)?;
        Ok(Self {
            memory,
            file,
            guest,
        })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.memory.slice().len() as u64
    }

    /// Where the server finds descriptors, available ring and used ring of a virtqueue.
    pub(super) fn addresses(&self, queue: u16) -> [u64; 3] {
        let base = self.guest + u64::from(queue) * EACH_BYTES as u64;
        [DESCRIPTORS, AVAILABLE, USED].map(|part| base + part as u64)
    }
}

/// A piece of memory where the server sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub guest: u64,
    pub len_bytes: u32,
}

/// One request as virtio-blk has it (virtio 1.3, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    /// `VIRTIO_BLK_T_*`
    pub kind: u32,
    /// Where it begins.
    pub sector: u64,
    /// Of a discard or write-zeroes: how many sectors, and flags.
    pub range: Option<(u32, u32)>,
    /// Whether the server writes the data.
    pub is_read: bool,
}

/// How a server broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Violation {
    /// More chains used than there were.
    Index(u16),
    /// A chain that it did not have.
    Head(u32),
    /// A status that there is not.
    Status(u8),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(
                f,
                "its used index is {index}, which is more than it was given"
            ),
            Self::Head(head) => write!(f, "it returned chain {head}, which it did not have"),
            Self::Status(status) => write!(f, "it ended a request with status {status:#x}"),
        }
    }
}

/// The driver's side of a virtqueue.
#[derive(Debug)]
pub(super) struct Vring {
    memory: Arc<RingMemory>,
    base: usize,
    indirect: bool,
    /// Descriptors that are not in use.
    free: Vec<u16>,
    /// By descriptor: the next one of its chain, if it is in use.
    next: Box<[Option<u16>]>,
    /// By descriptor: whether it is the head of a chain that the server has.
    is_head: Box<[bool]>,
    next_available: u16,
    next_used: u16,
}

impl Vring {
    /// Virtqueue `queue` of memory that has not been used.
    pub(super) fn new(memory: Arc<RingMemory>, queue: u16, indirect: bool) -> Self {
        Self {
            base: usize::from(queue) * EACH_BYTES,
            memory,
            indirect,
            free: (0..SIZE).rev().collect(),
            next: vec![None; SIZE.into()].into(),
            is_head: vec![false; SIZE.into()].into(),
            next_available: 0,
            next_used: 0,
        }
    }

    fn slice(&self) -> VolatileSlice<'_> {
        let memory = self.memory.memory.slice();
        memory.subslice(self.base, EACH_BYTES).expect(INSIDE)
    }

    /// Whether there is room for a request with so many segments.
    pub(super) fn has_room(&self, segments: usize) -> bool {
        let needed = if self.indirect { 1 } else { segments + 3 };
        self.free.len() >= needed
    }

    /// How many requests the server has.
    pub(super) fn in_flight(&self) -> u16 {
        self.next_available.wrapping_sub(self.next_used)
    }

    /// Gives the server a request; there is [room](Self::has_room). Returns the head of its chain.
    pub(super) fn submit(&mut self, command: &Command, segments: &[Segment]) -> u16 {
        let head = self.free.pop().expect("there is room");
        let control = CONTROL + usize::from(head) * CONTROL_BYTES;
        let memory = self.slice();
        let put = |offset: usize, bytes: &[u8]| {
            memory.write_slice(bytes, control + offset).expect(INSIDE);
        };
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&command.kind.to_le_bytes());
        // Of a discard the range has it.
        let sector = command.range.map_or(command.sector, |_| 0);
        header[8..].copy_from_slice(&sector.to_le_bytes());
        put(HEADER, &header);
        put(STATUS, &[NO_STATUS]);
        if let Some((sectors, flags)) = command.range {
            let mut range = [0; RANGE_BYTES];
            range[..8].copy_from_slice(&command.sector.to_le_bytes());
            range[8..12].copy_from_slice(&sectors.to_le_bytes());
            range[12..].copy_from_slice(&flags.to_le_bytes());
            put(RANGE, &range);
        }
        let guest = self.memory.guest + (self.base + control) as u64;
        let part = |offset: usize, len_bytes: usize| Segment {
            guest: guest + offset as u64,
            // They are 16 bytes at most.
            len_bytes: u32::try_from(len_bytes).unwrap_or(0),
        };
        let write = VRING_DESC_F_WRITE;
        let range = command.range.map(|_| (part(RANGE, RANGE_BYTES), 0));
        let data = segments
            .iter()
            .map(|segment| (*segment, if command.is_read { write } else { 0 }));
        let chain = [(part(HEADER, HEADER_BYTES), 0)]
            .into_iter()
            .chain(range)
            .chain(data)
            .chain([(part(STATUS, 1), write)]);
        match self.indirect {
            true => self.write_table(head, chain),
            false => self.write_chain(head, chain),
        }
        self.is_head[usize::from(head)] = true;
        self.publish(head);
        head
    }

    /// A chain in the indirect table of a descriptor.
    fn write_table(&self, head: u16, chain: impl Iterator<Item = (Segment, u32)>) {
        let table = TABLES + usize::from(head) * TABLE_BYTES;
        let mut count = 0;
        let mut chain = chain.peekable();
        while let Some((segment, flags)) = chain.next() {
            let next = chain.peek().map(|_| count + 1);
            let at = table + usize::from(count) * DESCRIPTOR_BYTES;
            self.write_descriptor(at, segment, flags, next);
            count += 1;
        }
        let whole = Segment {
            guest: self.memory.guest + (self.base + table) as u64,
            // A table has 2048 bytes at most.
            len_bytes: u32::try_from(usize::from(count) * DESCRIPTOR_BYTES).unwrap_or(0),
        };
        let at = DESCRIPTORS + usize::from(head) * DESCRIPTOR_BYTES;
        self.write_descriptor(at, whole, VRING_DESC_F_INDIRECT, None);
    }

    /// A chain of descriptors of the ring.
    fn write_chain(&mut self, head: u16, chain: impl Iterator<Item = (Segment, u32)>) {
        let mut at = head;
        let mut chain = chain.peekable();
        while let Some((segment, flags)) = chain.next() {
            let next = chain.peek().and_then(|_| self.free.pop());
            let place = DESCRIPTORS + usize::from(at) * DESCRIPTOR_BYTES;
            self.write_descriptor(place, segment, flags, next);
            self.next[usize::from(at)] = next;
            at = next.unwrap_or(at);
        }
    }

    fn write_descriptor(&self, at: usize, segment: Segment, flags: u32, next: Option<u16>) {
        let flags = flags | next.map_or(0, |_| VRING_DESC_F_NEXT);
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&segment.guest.to_le_bytes());
        bytes[8..12].copy_from_slice(&segment.len_bytes.to_le_bytes());
        bytes[12..].copy_from_slice(&(flags | u32::from(next.unwrap_or(0)) << 16).to_le_bytes());
        self.slice().write_slice(&bytes, at).expect(INSIDE);
    }

    fn publish(&mut self, head: u16) {
        let memory = self.slice();
        let slot = AVAILABLE + 4 + usize::from(self.next_available % SIZE) * 2;
        memory
            .store(head.to_le(), slot, Ordering::Relaxed)
            .expect(INSIDE);
        let next = self.next_available.wrapping_add(1);
        // The server that sees the index sees the chain.
        memory
            .store(next.to_le(), AVAILABLE + 2, Ordering::Release)
            .expect(INSIDE);
        self.next_available = next;
    }

    /// Whether the server is to be told of what was submitted (virtio 1.3, 2.7.10).
    pub(super) fn wants_kick(&self) -> bool {
        // The index must be there before the flag is read: the server sets the flag, and looks for requests after that.
        fence(Ordering::SeqCst);
        let flags: u16 = self.load(USED, Ordering::Relaxed);
        u32::from(flags) & VRING_USED_F_NO_NOTIFY == 0
    }

    /// Asks the server to notify of what it has used, or not to. Returns whether it has used something already.
    pub(super) fn notify(&self, on: bool) -> bool {
        let flags = if on { 0 } else { VRING_AVAIL_F_NO_INTERRUPT };
        // The flags are two bits.
        let flags = u16::try_from(flags).unwrap_or(0).to_le();
        let memory = self.slice();
        memory
            .store(flags, AVAILABLE, Ordering::Relaxed)
            .expect(INSIDE);
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// Whether the server has used something.
    pub(super) fn has_used(&self) -> bool {
        self.load(USED + 2, Ordering::Acquire) != self.next_used
    }

    fn load(&self, offset: usize, order: Ordering) -> u16 {
        let value: u16 = self.slice().load(offset, order).expect(INSIDE);
        u16::from_le(value)
    }

    /// A request that the server has ended: the head of its chain, and its status.
    ///
    /// # Errors
    ///
    /// What no server does. Nothing of the ring is to be used after that.
    pub(super) fn reap(&mut self) -> Result<Option<(u16, u8)>, Violation> {
        let used = self.load(USED + 2, Ordering::Acquire);
        if used == self.next_used {
            return Ok(None);
        }
        if used.wrapping_sub(self.next_used) > self.in_flight() {
            return Err(Violation::Index(used));
        }
        let slot = USED + 4 + usize::from(self.next_used % SIZE) * 8;
        let told: u32 = self.slice().load(slot, Ordering::Relaxed).expect(INSIDE);
        let told = u32::from_le(told);
        let head = u16::try_from(told).map_err(|_| Violation::Head(told))?;
        let has_it = self.is_head.get_mut(usize::from(head));
        if !has_it.is_some_and(std::mem::take) {
            return Err(Violation::Head(told));
        }
        let control = CONTROL + usize::from(head) * CONTROL_BYTES;
        let status: u8 = (self.slice())
            .load(control + STATUS, Ordering::Relaxed)
            .expect(INSIDE);
        if u32::from(status) > virtio_bindings::virtio_blk::VIRTIO_BLK_S_UNSUPP {
            return Err(Violation::Status(status));
        }
        self.next_used = self.next_used.wrapping_add(1);
        let mut descriptor = Some(head);
        while let Some(at) = descriptor {
            descriptor = self.next[usize::from(at)].take();
            self.free.push(at);
        }
        Ok(Some((head, status)))
    }
}

#[cfg(test)]
#[path = "vring_tests.rs"]
mod tests;
