//! A live ring as one of its ends uses it. Sleeping and waking are in `ring/wait.rs`, the data in
//! `ring/data.rs`.

mod data;
mod wait;

use std::io;
use std::sync::atomic::Ordering::Acquire;

use crate::backoff::{Coalescing, Spin, is_alone};
use crate::channel::Channel;
use crate::error::RingError;
use crate::memory::{FullFence, Memory, Role, SharedWord, control};
use crate::options::Transport;
use crate::pipe_end::PipeEnd;
use crate::protocol::{self, Cursor, IndexPage, Seen, Word};

/// One end of a ring. `C` is that end's cursor.
#[derive(Debug)]
pub(crate) struct Ring<C> {
    memory: Memory,
    channel: Channel,
    cursor: C,
    spin: Spin,
    coalescing: Coalescing,
    /// In a shared ring: the peer closed or died, and its position is final.
    peer_left: bool,
    /// This end announced that it polls, and did not announce since that it is awake.
    armed: bool,
    /// How many times in a row the peer's position was found unchanged, and its value.
    misses: (u32, u32),
}

impl<C: Cursor> Ring<C> {
    pub(crate) fn new(memory: Memory, channel: Channel, spin: bool) -> io::Result<Self> {
        let at = |page: &IndexPage<SharedWord>| page.position.load(Acquire);
        let cursor = C::new(memory.size(), at(memory.own()), at(memory.peer()))?;
        Ok(Self {
            cursor,
            spin: Spin::new(spin, is_alone()),
            coalescing: Coalescing::new(memory.role() == Role::Consumer),
            memory,
            channel,
            peer_left: false,
            armed: false,
            misses: (0, 0),
        })
    }

    pub(crate) fn transport(&self) -> Transport {
        match self.channel {
            Channel::Kernel(_) => Transport::Kernel,
            Channel::Socket(_) => Transport::Shared,
        }
    }

    /// An error if the ring is dead.
    fn check_alive(&self) -> io::Result<()> {
        match self.memory.word(control::STATE) {
            control::LIVE => Ok(()),
            _ => Err(RingError::Dead.into()),
        }
    }

    /// Whether the peer, or the kernel on its behalf, said that it closed.
    #[inline]
    fn has_closed(&self) -> bool {
        match &self.channel {
            Channel::Kernel(side) => self.memory.word(control::CLOSED) & side.peer_bit() != 0,
            Channel::Socket(_) => protocol::has_closed(self.memory.peer()),
        }
    }

    /// Whether the peer is gone; its position is final then. An error if the ring is dead.
    pub(crate) fn is_peer_gone(&mut self) -> io::Result<bool> {
        self.check_alive()?;
        let closed = self.has_closed();
        Ok(match self.channel {
            Channel::Kernel(_) => closed,
            Channel::Socket(_) => {
                self.peer_left |= closed;
                self.peer_left
            }
        })
    }

    /// Looks at the socket: a peer that was killed did not say that it closed. In the kernel's ring the kernel
    /// said it.
    pub(crate) fn probe_peer(&mut self, pipe: &mut PipeEnd) {
        if let Channel::Socket(socket) = &self.channel {
            pipe.counters.system_calls += 1;
            self.peer_left |= !socket.drain();
        }
    }

    /// Announces that this end closes, and wakes its peer. In the kernel's ring the kernel does.
    pub(crate) fn close(&mut self, pipe: &mut PipeEnd) {
        if let Channel::Socket(_) = self.channel {
            let (own, peer) = (self.memory.own(), self.memory.peer());
            let waiting = protocol::close::<_, FullFence>(own, peer);
            let closed = false;
            self.wake(Seen { waiting, closed }, pipe);
        }
    }
}
