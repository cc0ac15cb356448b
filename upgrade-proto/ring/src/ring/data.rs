//! Bytes in and out of a ring.

use std::io;

use super::Ring;
use crate::bytes::{Bytes, Space};
use crate::channel::Channel;
use crate::memory::FullFence;
use crate::pipe_end::PipeEnd;
use crate::protocol::{Cursor, Reader, WAIT_COALESCED, WAIT_FUTEX, Writer};

/// A consumer publishes its position after so many bytes, not after each record: with that the producer keeps
/// the position in its cache. A pipe frees whole pages, too.
const PUBLISH_BYTES: u32 = 4096;

/// A length within a ring, whose size is at most 2^30.
fn to_u32(len_bytes: usize) -> u32 {
    u32::try_from(len_bytes).unwrap_or(u32::MAX)
}

impl Ring<Writer> {
    /// Whether `len_bytes`, no more than the size, are free.
    #[inline]
    pub(crate) fn has_free(&mut self, len_bytes: usize) -> io::Result<bool> {
        if self.cursor.free() as usize >= len_bytes {
            return Ok(true);
        }
        let free = self.cursor.refresh(self.memory.peer())?;
        Ok(free as usize >= len_bytes)
    }

    /// All bytes that are free.
    pub(crate) fn free(&mut self) -> io::Result<usize> {
        Ok(self.cursor.refresh(self.memory.peer())? as usize)
    }

    /// The place of the next `len_bytes`, which are known to be free.
    #[inline]
    pub(crate) fn space(&mut self, len_bytes: usize) -> Space<'_> {
        let is_free = len_bytes <= self.cursor.free() as usize;
        assert!(is_free, "beyond the free part of the ring");
        self.memory.space(self.cursor.position(), len_bytes)
    }

    /// Hands over the next `len_bytes`.
    #[inline]
    pub(crate) fn commit(&mut self, len_bytes: usize, pipe: &mut PipeEnd) {
        let count = to_u32(len_bytes).min(self.cursor.free());
        let (own, peer) = (self.memory.own(), self.memory.peer());
        let mut seen = self.cursor.commit::<_, FullFence>(own, peer, count);
        if seen.waiting & WAIT_COALESCED != 0
            && !self.cursor.passed(peer, count, self.coalesced_mark())
        {
            seen.waiting &= !(WAIT_FUTEX | WAIT_COALESCED);
        }
        if seen.closed && matches!(self.channel, Channel::Socket(_)) {
            self.peer_left = true;
        }
        pipe.counters.ring_bytes += u64::from(count);
        self.wake(seen, pipe);
    }

    /// Whether the state of the peer needs no attention before the next record.
    #[inline]
    pub(crate) fn is_undisturbed(&self) -> bool {
        let peer_left = match self.channel {
            Channel::Kernel(_) => self.has_closed(),
            Channel::Socket(_) => self.peer_left,
        };
        !self.armed && !peer_left
    }

    /// Whether the consumer of a shared ring is gone. The kernel's ring keeps what was not read, and a FIFO may
    /// get another reader: there it is an error, and the ring stays.
    pub(crate) fn check_peer(&mut self) -> io::Result<bool> {
        match (self.is_peer_gone()?, &self.channel) {
            (true, Channel::Kernel(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            (gone, _) => Ok(gone),
        }
    }

    /// The consumer is known to be gone.
    pub(crate) fn set_peer_left(&mut self) {
        self.peer_left = true;
    }

    /// Whether the consumer has taken everything.
    pub(crate) fn is_empty(&mut self) -> io::Result<bool> {
        Ok(self.cursor.refresh(self.memory.peer())? == self.memory.size())
    }

    /// Copies what the consumer, which is gone, has not taken.
    pub(crate) fn take_back(&mut self, into: &mut Vec<u8>) -> io::Result<()> {
        let free = self.cursor.refresh(self.memory.peer())?;
        let unread = (self.memory.size() - free) as usize;
        let bytes = self.memory.bytes(self.cursor.seen(), unread);
        into.extend_from_slice(&bytes.to_vec());
        Ok(())
    }
}

impl Ring<Reader> {
    /// Bytes known to be readable.
    #[inline]
    pub(crate) fn filled(&self) -> usize {
        self.cursor.filled() as usize
    }

    /// Publishes what was taken, then loads the producer's position; returns the bytes that are readable.
    #[inline]
    pub(crate) fn refresh(&mut self, pipe: &mut PipeEnd) -> io::Result<usize> {
        self.disarm(pipe);
        if self.cursor.unpublished() != 0 {
            self.publish(true, pipe);
        }
        Ok(self.cursor.refresh(self.memory.peer())? as usize)
    }

    /// The bytes known to be readable.
    #[inline]
    pub(crate) fn bytes(&self) -> Bytes<'_> {
        self.memory.bytes(self.cursor.position(), self.filled())
    }

    /// Takes the next `len_bytes`.
    #[inline]
    pub(crate) fn consume(&mut self, len_bytes: usize, pipe: &mut PipeEnd) {
        let count = to_u32(len_bytes).min(self.cursor.filled());
        self.cursor.consume(count);
        pipe.counters.ring_bytes += u64::from(count);
        if self.cursor.unpublished() >= PUBLISH_BYTES {
            let is_half_empty = self.cursor.filled() <= self.memory.size() / 2;
            self.publish(is_half_empty, pipe);
        }
    }

    /// Publishes what was taken. Unless it is `eager`, a producer in a futex sleeps on: woken by each record
    /// that is taken from a full ring it would be held up, and it has a timeout.
    pub(crate) fn publish(&mut self, eager: bool, pipe: &mut PipeEnd) {
        let (own, peer) = (self.memory.own(), self.memory.peer());
        let mut seen = self.cursor.publish::<_, FullFence>(own, peer);
        if !eager {
            seen.waiting &= !WAIT_FUTEX;
        }
        self.wake(seen, pipe);
    }
}
