//! The reading end.

mod buffer;
mod upgrade;

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::EventFlags;

use self::buffer::Buffer;
use self::upgrade::Step;
use crate::bytes::Bytes;
use crate::error::RingError;
use crate::handle::{Handle, Phase, describe};
use crate::memory::{MAX_RECORD_BYTES, Role};
use crate::options::{Options, Transport};
use crate::pipe::{Mode, read_some, wait};
use crate::pipe_end::{PipeEnd, retry};
use crate::protocol::Reader;

/// What a read from the pipe found.
enum Pulled {
    Bytes(usize),
    /// Nothing yet.
    Nothing,
    /// The end of the stream.
    End,
    /// The bytes come from a ring from here on.
    Ring,
}

/// Reads from a pipe, or from the ring that replaced it.
///
/// Dropping it closes the descriptor; bytes that were read ahead and not consumed are lost.
#[derive(Debug)]
pub struct Consumer {
    handle: Handle<Step, Reader>,
    may_have_ring: bool,
    /// What comes before the bytes of the pipe or of the ring.
    buffer: Buffer,
    /// Bytes read from the pipe.
    pipe_bytes: u64,
    /// At how many of them the next connection is tried.
    next_try: u64,
}

describe!(Consumer);

impl Consumer {
    /// Makes the reading end of `pipe`. Another kind of file is read plainly.
    ///
    /// Does not wait for a producer: one that offers a ring later is found when its first bytes are read.
    pub fn new(pipe: OwnedFd, options: &Options) -> io::Result<Self> {
        let pipe = PipeEnd::new(pipe, options, EventFlags::IN)?;
        let may_have_ring = pipe.may_have_ring()?;
        let step = match may_have_ring.then(|| pipe.ask_for_kernel_ring(Role::Consumer)) {
            Some(Some(ring)) => Step::KernelPending(ring),
            _ => Step::Idle,
        };
        let mut this = Self {
            handle: Handle::new(step, pipe),
            may_have_ring,
            buffer: Buffer::new(),
            pipe_bytes: 0,
            next_try: 0,
        };
        this.advance()?;
        Ok(this)
    }

    /// Waits until there is a ring, at most for `limit`, and reads ahead what is in the pipe; returns what
    /// carries the bytes then.
    pub fn upgrade(&mut self, limit: Duration) -> io::Result<Transport> {
        retry(limit, || {
            let Handle { phase, pipe } = &mut self.handle;
            if let Phase::Ring(ring) = phase
                && ring.transport() == Transport::Shared
                && ring.is_peer_gone()?
                && ring.refresh(pipe)? == 0
            {
                self.leave_ring()?;
            }
            // The bytes in the pipe precede those of a ring.
            if self.buffer.len() < MAX_RECORD_BYTES
                && !matches!(self.handle.phase, Phase::Ring(_))
                && let Pulled::End = self.pull_into_buffer(Mode::Now)?
            {
                return Ok(true);
            }
            self.next_try = self.pipe_bytes;
            self.advance()?;
            Ok(self.transport() != Transport::Plain)
        })?;
        Ok(self.transport())
    }

    /// Waits until at least `at_least` bytes (and one) are readable, and returns all that are; fewer at the end
    /// of the stream. Peeking again returns the same bytes, and perhaps more.
    #[inline]
    pub fn peek(&mut self, at_least: usize) -> io::Result<Bytes<'_>> {
        self.fill(at_least, Mode::Wait)?;
        Ok(self.bytes())
    }

    /// As [`Consumer::peek`], but `None` instead of waiting; then see [`Consumer::prepare_to_poll`]. A caller
    /// that tries again without polling learns a little later that a producer was killed, or that another
    /// program wrote to the pipe.
    #[inline]
    pub fn try_peek(&mut self, at_least: usize) -> io::Result<Option<Bytes<'_>>> {
        match self.fill(at_least, Mode::Now)? {
            true => Ok(Some(self.bytes())),
            false => Ok(None),
        }
    }

    /// Must be called between a `try_peek` that returned `None` and polling the descriptor of [`AsFd`] for
    /// reading. False: something has changed already; try again without polling.
    pub fn prepare_to_poll(&mut self) -> io::Result<bool> {
        self.handle.prepare_to_poll()
    }

    /// Takes the first `len_bytes` of what was peeked.
    ///
    /// # Panics
    /// There are fewer.
    #[inline]
    pub fn consume(&mut self, len_bytes: usize) {
        let Handle { phase, pipe } = &mut self.handle;
        let peeked = match phase {
            Phase::Ring(ring) if self.buffer.is_empty() => ring.filled(),
            _ => self.buffer.len(),
        };
        assert!(len_bytes <= peeked, "more is consumed than was peeked");
        match phase {
            Phase::Ring(ring) if self.buffer.is_empty() => ring.consume(len_bytes, pipe),
            _ => self.buffer.consume(len_bytes),
        }
        pipe.counters.bytes += len_bytes as u64;
    }

    #[inline]
    fn bytes(&self) -> Bytes<'_> {
        match &self.handle.phase {
            Phase::Ring(ring) if self.buffer.is_empty() => ring.bytes(),
            _ => self.buffer.bytes(),
        }
    }

    /// Whether `at_least` bytes, or the last ones, are readable; false only in [`Mode::Now`].
    #[inline]
    fn fill(&mut self, at_least: usize, mode: Mode) -> io::Result<bool> {
        if let Phase::Ring(ring) = &self.handle.phase
            && ring.filled() >= at_least.max(1)
            && self.buffer.is_empty()
        {
            return Ok(true);
        }
        self.fill_slowly(at_least.max(1), mode)
    }

    fn fill_slowly(&mut self, at_least: usize, mode: Mode) -> io::Result<bool> {
        if at_least > MAX_RECORD_BYTES {
            return Err(RingError::TooLong(at_least).into());
        }
        loop {
            if self.buffer.len() >= at_least {
                return Ok(true);
            }
            match &self.handle.phase {
                Phase::Dead => return Err(RingError::Dead.into()),
                Phase::Ring(_) => {
                    let filled = self.fill_from_ring(at_least, mode);
                    if let Some(answer) = self.handle.check(filled)? {
                        return Ok(answer);
                    }
                }
                Phase::Pipe(_) => match self.pull_into_buffer(mode)? {
                    Pulled::Bytes(_) | Pulled::Ring => {}
                    Pulled::End => return Ok(true),
                    Pulled::Nothing if mode == Mode::Now => return Ok(false),
                    Pulled::Nothing => self.handle.pipe.wait()?,
                },
            }
        }
    }

    /// One attempt with a ring; `None`: try again.
    fn fill_from_ring(&mut self, at_least: usize, mode: Mode) -> io::Result<Option<bool>> {
        let Handle { phase, pipe } = &mut self.handle;
        let Phase::Ring(ring) = phase else {
            return Ok(None);
        };
        let was_polling = ring.is_armed();
        // To be known before the position is loaded, which is final then.
        let gone = ring.is_peer_gone()?;
        let filled = ring.refresh(pipe)?;
        if self.buffer.is_empty() && filled >= at_least {
            return Ok(Some(true));
        }
        if filled > 0 {
            // Too little, or the rest of a record that began in the pipe. With the first part in the buffer the
            // ring is empty: a poller is not woken for it again and again, and bytes of the pipe may follow.
            let missing = at_least - self.buffer.len();
            let count = ring.bytes().first(missing).copy_to(self.buffer.space());
            ring.consume(count, pipe);
            self.buffer.add(count);
            return Ok(None);
        }
        if gone {
            return match ring.transport() {
                Transport::Kernel => Ok(Some(true)),
                _ => {
                    // The pipe goes on after the ring.
                    self.leave_ring()?;
                    Ok(None)
                }
            };
        }
        if mode == Mode::Now {
            // A caller that tries again without polling makes hardly any system calls.
            let asks = was_polling || ring.note_miss(pipe);
            let more = asks && self.pull_beside_ring()?;
            return Ok(Some(more && self.buffer.len() >= at_least));
        }
        ring.sleep(pipe)?;
        if ring.refresh(pipe)? == 0 {
            self.pull_beside_ring()?;
        }
        Ok(None)
    }

    /// Reads what other writers put into the pipe beside a shared ring; whether there was anything. The ring is
    /// empty, so this is between two commits of the producer.
    fn pull_beside_ring(&mut self) -> io::Result<bool> {
        if self.transport() != Transport::Shared {
            return Ok(false);
        }
        let pipe = &mut self.handle.pipe;
        pipe.counters.system_calls += 1;
        match read_some(pipe.fd.as_fd(), self.buffer.space(), Mode::Now)? {
            Some(0) => {
                // No writer is left, not even the producer. The pipe would be ready for ever.
                pipe.unwatch(&pipe.fd)?;
                Ok(false)
            }
            Some(count) => {
                self.pipe_bytes += count as u64;
                self.buffer.add(count);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    fn pull_into_buffer(&mut self, mode: Mode) -> io::Result<Pulled> {
        let mut buffer = mem::take(&mut self.buffer);
        let pulled = self.pull(buffer.space(), mode);
        self.buffer = buffer;
        if let Ok(Pulled::Bytes(count)) = pulled {
            self.buffer.add(count);
        }
        pulled
    }

    /// Reads from the pipe, unless or until a ring replaces it.
    fn pull(&mut self, target: &mut [u8], mode: Mode) -> io::Result<Pulled> {
        self.advance()?;
        let Handle { phase, pipe } = &mut self.handle;
        let Phase::Pipe(step) = phase else {
            return Ok(Pulled::Ring);
        };
        let (most, mode_now) = match step {
            Step::Idle | Step::KernelPending(_) => (target.len(), mode),
            // A message may arrive while read(2) would sleep.
            Step::Connected(_) | Step::Mapped(..) => (target.len(), Mode::Now),
            Step::Draining(_, _, left) => {
                let left = usize::try_from(*left).unwrap_or(usize::MAX);
                (left.min(target.len()), Mode::Now)
            }
        };
        pipe.counters.system_calls += 1;
        let count = read_some(pipe.fd.as_fd(), &mut target[..most], mode_now)?;
        self.pipe_bytes += count.unwrap_or(0) as u64;
        match (step, count) {
            (Step::Draining(_, _, left), Some(count)) if count > 0 => {
                *left -= count as u64;
                Ok(Pulled::Bytes(count))
            }
            (Step::Draining(_, _, left), _) => {
                // Another reader took them.
                *left = 0;
                self.advance()?;
                Ok(Pulled::Ring)
            }
            (_, None) => Ok(Pulled::Nothing),
            (Step::Connected(_) | Step::Mapped(..), Some(0)) => self.pipe_ended(mode),
            (_, Some(0)) => Ok(Pulled::End),
            (_, Some(count)) => Ok(Pulled::Bytes(count)),
        }
    }

    /// The pipe has ended while the negotiation goes on: SWITCH may still be on the socket, and a ring full of
    /// bytes behind it.
    fn pipe_ended(&mut self, mode: Mode) -> io::Result<Pulled> {
        loop {
            self.advance()?;
            let Handle { phase, pipe } = &mut self.handle;
            let channel = match phase {
                Phase::Pipe(Step::Connected(channel) | Step::Mapped(channel, _)) => channel,
                Phase::Pipe(Step::Idle) => return Ok(Pulled::End),
                _ => return Ok(Pulled::Ring),
            };
            if mode == Mode::Now {
                // It would be ready for ever; the socket is what to poll.
                pipe.unwatch(&pipe.fd)?;
                return Ok(Pulled::Nothing);
            }
            pipe.counters.system_calls += 1;
            wait(channel.as_fd())?;
        }
    }
}

impl io::Read for Consumer {
    /// Waits for at least one byte; zero is the end of the stream.
    #[inline]
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        if target.is_empty() {
            return Ok(0);
        }
        // Without a copy by way of the buffer.
        while self.buffer.is_empty() && matches!(self.handle.phase, Phase::Pipe(_)) {
            match self.pull(target, Mode::Wait)? {
                Pulled::Bytes(count) => {
                    self.handle.pipe.counters.bytes += count as u64;
                    return Ok(count);
                }
                Pulled::End => return Ok(0),
                Pulled::Nothing => self.handle.pipe.wait()?,
                Pulled::Ring => break,
            }
        }
        let bytes = self.peek(1)?;
        let count = bytes.copy_to(target);
        self.consume(count);
        Ok(count)
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let Handle { phase, pipe } = &mut self.handle;
        if !pipe.is_owner() {
            return;
        }
        match phase {
            Phase::Ring(ring) => ring.publish(true, pipe),
            // The producer may be writing to it already.
            Phase::Pipe(Step::Mapped(_, memory) | Step::Draining(_, memory, _)) => memory.abandon(),
            _ => {}
        }
    }
}
