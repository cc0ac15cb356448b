//! A ring as its producer and its consumer use it.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Acquire;

use crate::bytes::{self, Bytes};
use crate::counters::Counters;
use crate::end::{End, Link};
use crate::memory::{FullFence, Memory, Role, SharedWord};
use crate::protocol::{self, Page, Reader, WAIT_FUTEX, WAIT_LATE, Word, Writer};
use crate::{RingError, Way};

/// Bytes that a consumer may have taken without saying so: what a pipe frees at once is a page, too.
const SILENT_BYTES: u32 = 4096;

fn corrupt(_: protocol::Corrupt) -> io::Error {
    RingError::Dead.into()
}

/// A length within a ring, whose size is at most 2^30.
fn to_u32(len_bytes: usize) -> u32 {
    u32::try_from(len_bytes).unwrap_or(u32::MAX)
}

fn positions(memory: &Memory) -> (u32, u32) {
    let at = |page: &Page<SharedWord>| page.position.load(Acquire);
    (at(memory.own()), at(memory.peer()))
}

/// The producer's end.
#[derive(Debug)]
pub(crate) struct RingWriter {
    end: End,
    core: Writer,
}

impl RingWriter {
    pub(crate) fn new(memory: Memory, link: Link, spin: bool) -> io::Result<Self> {
        let (own, peer) = positions(&memory);
        let core = Writer::new(memory.size(), own, peer).map_err(corrupt)?;
        let end = End::new(Role::Producer, memory, link, spin);
        Ok(Self { end, core })
    }

    pub(crate) fn size(&self) -> usize {
        self.end.memory.size() as usize
    }

    /// Whether there is room for `len_bytes`, no more than the size.
    #[inline]
    pub(crate) fn has_room(&mut self, len_bytes: usize) -> io::Result<bool> {
        if self.core.room() as usize >= len_bytes {
            return Ok(true);
        }
        let room = self.core.look(self.end.memory.peer()).map_err(corrupt)?;
        Ok(room as usize >= len_bytes)
    }

    /// All the room that is known.
    pub(crate) fn room(&mut self) -> io::Result<usize> {
        self.has_room(self.size())?;
        Ok(self.core.room() as usize)
    }

    /// Where the next `len_bytes` go, for which there is room. In the kernel's ring others who write to
    /// the pipe can write there as well.
    #[inline]
    pub(crate) fn slot(&self, len_bytes: usize) -> NonNull<u8> {
        assert!(
            len_bytes <= self.core.room() as usize,
            "beyond the ring's room"
        );
        self.end.memory.at(self.core.position())
    }

    /// Writes into the room that there is, from `offset` on.
    ///
    /// # Panics
    /// There is not so much.
    #[inline]
    pub(crate) fn put(&mut self, offset: usize, source: &[u8]) {
        let start = self.slot(offset.saturating_add(source.len()));
        // SAFETY: inside the room, which is mapped in one piece.
        let target = unsafe { start.add(offset) };
        match self.end.link {
            // SAFETY: as above; who else has it mapped has so for reading only, and `source` is no part
            // of it: nobody was ever given a slice of a ring.
            Link::Shared(_) => unsafe {
                target.copy_from_nonoverlapping(NonNull::from(source).cast(), source.len());
            },
            // SAFETY: as above; the room is written to by atomic operations alone.
            Link::Kernel(_) => unsafe { bytes::store(target, source) },
        }
    }

    #[inline]
    pub(crate) fn commit(
        &mut self,
        len_bytes: usize,
        pipe: BorrowedFd<'_>,
        counters: &mut Counters,
    ) {
        let count = to_u32(len_bytes).min(self.core.room());
        let (own, peer) = (self.end.memory.own(), self.end.memory.peer());
        let mut seen = self.core.commit::<_, FullFence>(own, peer, count);
        if seen.waiting & WAIT_LATE != 0 && !self.core.passed(peer, count, self.end.late_bytes()) {
            seen.waiting &= !(WAIT_FUTEX | WAIT_LATE);
        }
        if seen.closed && matches!(self.end.link, Link::Shared(_)) {
            self.end.peer_left = true;
        }
        self.end.wake(seen, pipe, counters);
    }

    /// Whether the fast way may be taken.
    #[inline]
    pub(crate) fn is_calm(&self) -> bool {
        !self.end.armed && !self.peer_left()
    }

    /// Whether the consumer is gone, as far as is known without looking far.
    #[inline]
    pub(crate) fn peer_left(&self) -> bool {
        match self.end.link {
            Link::Kernel(_) => self.end.has_closed(),
            Link::Shared(_) => self.end.peer_left,
        }
    }

    /// Looks whether the consumer is gone, or the ring is dead. The kernel's ring keeps what was not read,
    /// and a FIFO may get another reader: there it is an error and no end.
    pub(crate) fn check_peer(&mut self) -> io::Result<bool> {
        self.end.check_alive()?;
        match (self.end.is_peer_gone(), &self.end.link) {
            (true, Link::Kernel(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            (gone, _) => Ok(gone),
        }
    }

    pub(crate) fn way(&self) -> Way {
        self.end.way()
    }

    pub(crate) fn set_peer_left(&mut self) {
        self.end.peer_left = true;
    }

    /// Asks whether the consumer still is there.
    pub(crate) fn ask_peer(&mut self, counters: &mut Counters) {
        self.end.ask(counters);
    }

    /// Whether the consumer took everything.
    pub(crate) fn is_empty(&mut self) -> io::Result<bool> {
        let room = self.core.look(self.end.memory.peer()).map_err(corrupt)?;
        Ok(room == self.end.memory.size())
    }

    /// There was no room, and the producer does not wait for it here; whether it is time for system calls.
    pub(crate) fn looked_in_vain(&mut self, counters: &mut Counters) -> bool {
        self.end.looked_in_vain(self.core.consumed(), counters)
    }

    pub(crate) fn sleep(
        &mut self,
        ready: BorrowedFd<'_>,
        counters: &mut Counters,
    ) -> io::Result<()> {
        self.end.sleep(self.core.consumed(), ready, counters)
    }

    /// Prepares for polling; whether there is no need to.
    pub(crate) fn arm(&mut self) -> bool {
        self.end.arm();
        self.end.has_news(self.core.consumed())
    }

    pub(crate) fn disarm(&mut self, counters: &mut Counters) {
        self.end.disarm(counters);
    }

    /// What the consumer, who is gone, has not taken.
    pub(crate) fn take_back(&mut self, into: &mut Vec<u8>) -> io::Result<()> {
        self.core.look(self.end.memory.peer()).map_err(corrupt)?;
        let unread = self.core.position().wrapping_sub(self.core.consumed());
        let start = self.end.memory.at(self.core.consumed());
        // SAFETY: mapped as long as `self`, no more bytes than a ring holds, written by this end alone.
        let bytes = unsafe { Bytes::new(start, unread as usize) };
        into.extend_from_slice(&bytes.to_vec());
        Ok(())
    }

    pub(crate) fn close(&mut self, pipe: BorrowedFd<'_>, counters: &mut Counters) {
        self.end.close(pipe, counters);
    }
}

/// The consumer's end.
#[derive(Debug)]
pub(crate) struct RingReader {
    end: End,
    core: Reader,
    silent_bytes: u32,
}

impl RingReader {
    pub(crate) fn new(memory: Memory, link: Link, spin: bool) -> io::Result<Self> {
        let (own, peer) = positions(&memory);
        let core = Reader::new(memory.size(), own, peer).map_err(corrupt)?;
        let silent_bytes = SILENT_BYTES.min(memory.size() / 4);
        Ok(Self {
            end: End::new(Role::Consumer, memory, link, spin),
            core,
            silent_bytes,
        })
    }

    /// Bytes that are known to be there.
    #[inline]
    pub(crate) fn filled(&self) -> usize {
        self.core.filled() as usize
    }

    /// Looks for more; how many bytes there are then.
    #[inline]
    pub(crate) fn look(
        &mut self,
        pipe: BorrowedFd<'_>,
        counters: &mut Counters,
    ) -> io::Result<usize> {
        if self.end.armed {
            self.end.disarm(counters);
        }
        if self.core.unpublished() != 0 {
            self.publish(true, pipe, counters);
        }
        let filled = self.core.look(self.end.memory.peer()).map_err(corrupt)?;
        Ok(filled as usize)
    }

    /// The bytes that are known to be there.
    #[inline]
    pub(crate) fn bytes(&self) -> Bytes<'_> {
        let start = self.end.memory.at(self.core.position());
        // SAFETY: mapped as long as `self`, no more bytes than a ring holds. A producer in the same process
        // keeps to the free part (shared), or writes by atomic operations (kernel).
        unsafe { Bytes::new(start, self.filled()) }
    }

    #[inline]
    pub(crate) fn consume(
        &mut self,
        len_bytes: usize,
        pipe: BorrowedFd<'_>,
        counters: &mut Counters,
    ) {
        let count = to_u32(len_bytes).min(self.core.filled());
        self.core.consume(count);
        if self.core.unpublished() >= self.silent_bytes {
            let is_half_empty = self.core.filled() <= self.end.memory.size() / 2;
            self.publish(is_half_empty, pipe, counters);
        }
    }

    /// Tells the producer what was taken. One that sleeps in a futex sleeps on while the ring is more than
    /// half full, or each record taken from a full ring would wake it; it looks by itself before long.
    fn publish(&mut self, eager: bool, pipe: BorrowedFd<'_>, counters: &mut Counters) {
        let (own, peer) = (self.end.memory.own(), self.end.memory.peer());
        let mut seen = self.core.publish::<_, FullFence>(own, peer);
        if !eager {
            seen.waiting &= !WAIT_FUTEX;
        }
        self.end.wake(seen, pipe, counters);
    }

    /// Whether the producer is gone. What it wrote at last is there to be looked for then.
    pub(crate) fn is_peer_gone(&mut self) -> io::Result<bool> {
        self.end.check_alive()?;
        Ok(self.end.is_peer_gone())
    }

    pub(crate) fn way(&self) -> Way {
        self.end.way()
    }

    pub(crate) fn sleep(
        &mut self,
        ready: BorrowedFd<'_>,
        counters: &mut Counters,
    ) -> io::Result<()> {
        self.end.sleep(self.core.produced(), ready, counters)
    }

    /// There was nothing, and the consumer does not wait for it here; whether it is time for system calls.
    pub(crate) fn looked_in_vain(&mut self, counters: &mut Counters) -> bool {
        self.end.looked_in_vain(self.core.produced(), counters)
    }

    /// Prepares for polling; whether there is no need to.
    pub(crate) fn arm(&mut self) -> bool {
        self.end.arm();
        self.end.has_news(self.core.produced())
    }

    /// Whether it was prepared for polling and has not been looked at since.
    pub(crate) fn is_armed(&self) -> bool {
        self.end.armed
    }

    /// Says goodbye, and how far it came.
    pub(crate) fn close(&mut self, pipe: BorrowedFd<'_>, counters: &mut Counters) {
        self.publish(true, pipe, counters);
        self.end.close(pipe, counters);
    }
}
