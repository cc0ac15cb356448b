//! What a producer and a consumer have in common: the pipe, and the ring that may have replaced it.

use std::io;

use crate::channel::Channel;
use crate::error::RingError;
use crate::memory::Memory;
use crate::options::Transport;
use crate::pipe_end::PipeEnd;
use crate::protocol::Cursor;
use crate::ring::Ring;

/// What carries the bytes. `N` is the state of the negotiation for a ring.
#[derive(Debug)]
pub(crate) enum Phase<N, C> {
    /// The pipe.
    Pipe(N),
    /// The ring.
    Ring(Ring<C>),
    /// Nothing any more: the peer broke the protocol.
    Dead,
}

#[derive(Debug)]
pub(crate) struct Handle<N, C: Cursor> {
    // Dropped in this order: the ring is unmapped before the pipe is closed.
    pub phase: Phase<N, C>,
    pub pipe: PipeEnd,
}

impl<N, C: Cursor> Handle<N, C> {
    pub(crate) fn new(negotiation: N, pipe: PipeEnd) -> Self {
        Self {
            phase: Phase::Pipe(negotiation),
            pipe,
        }
    }

    pub(crate) fn transport(&self) -> Transport {
        match &self.phase {
            Phase::Ring(ring) => ring.transport(),
            _ => Transport::Plain,
        }
    }

    /// Announces that this end is about to poll; false if there is no need to.
    pub(crate) fn prepare_to_poll(&mut self) -> io::Result<bool> {
        match &mut self.phase {
            Phase::Ring(ring) => Ok(!ring.arm()),
            Phase::Dead => Err(RingError::Dead.into()),
            Phase::Pipe(_) => Ok(true),
        }
    }

    /// Goes over to a ring.
    pub(crate) fn start(&mut self, memory: Memory, channel: Channel) -> io::Result<()> {
        let ring = Ring::new(memory, channel, self.pipe.options.spin);
        let ring = self.check(ring)?;
        self.pipe.note_ring(ring.transport());
        self.phase = Phase::Ring(ring);
        Ok(())
    }

    /// Passes a result on. If it says that the peer broke the protocol, the handle is dead from here on.
    pub(crate) fn check<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && error.kind() == io::ErrorKind::InvalidData
        {
            self.phase = Phase::Dead;
        }
        result
    }
}

/// What both ends tell about themselves.
macro_rules! describe {
    ($end:ty) => {
        impl $end {
            /// What carries the bytes at this moment.
            #[must_use]
            pub fn transport(&self) -> $crate::Transport {
                self.handle.transport()
            }

            /// The ring in use, or the last one that was.
            #[must_use]
            pub fn last_ring(&self) -> Option<$crate::Transport> {
                self.handle.pipe.last_ring
            }

            /// Statistics.
            #[must_use]
            pub fn counters(&self) -> $crate::Counters {
                self.handle.pipe.counters
            }
        }

        impl std::os::fd::AsFd for $end {
            /// The descriptor to poll for reading, after `prepare_to_poll`. It stays the same.
            fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
                self.handle.pipe.as_fd()
            }
        }
    };
}

pub(crate) use describe;

impl<N, C: Cursor> Drop for Handle<N, C> {
    fn drop(&mut self) {
        if self.pipe.is_owner()
            && let Phase::Ring(ring) = &mut self.phase
        {
            ring.close(&mut self.pipe);
        }
    }
}
