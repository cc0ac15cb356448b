//! The writing end.

mod upgrade;

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use upgrade_proto::Listener;

use self::upgrade::Step;
use crate::bytes::Space;
use crate::error::RingError;
use crate::handle::{Handle, Phase, describe};
use crate::memory::MAX_RECORD_BYTES;
use crate::options::{Options, Transport};
use crate::pipe::{Mode, is_broken, wait_for_room, write_some};
use crate::pipe_end::{PipeEnd, retry};
use crate::protocol::Writer;

/// A write of at most so many bytes goes into a ring as a whole, as it goes into a pipe (PIPE_BUF).
const ATOMIC_BYTES: usize = 4096;

/// A producer polls for a consumer at its first writes to the pipe, then once in so many.
const WRITES_PER_POLL: u32 = 32;

/// Writes to a pipe, or to the ring that replaced it.
///
/// Dropping it closes the descriptor, which is the end of the stream for a consumer after everything that was
/// committed. Call [`Producer::finish`] to learn of errors.
#[derive(Debug)]
pub struct Producer {
    listener: Option<Listener>,
    handle: Handle<Step, Writer>,
    /// The bytes of a reservation while there is no ring.
    staging: Vec<u8>,
    /// Bytes that were committed and are not in the pipe yet, from `sent` on.
    queue: Vec<u8>,
    sent: usize,
    /// Writes to the pipe.
    writes: u32,
}

describe!(Producer);

impl Producer {
    /// Makes the writing end of `pipe`. Another kind of file is written plainly.
    ///
    /// Does not wait for a consumer. It is no error if no ring can be offered.
    pub fn new(pipe: OwnedFd, options: &Options) -> io::Result<Self> {
        let pipe = PipeEnd::new(pipe, options, EventFlags::OUT)?;
        let may_have_ring = pipe.may_have_ring()?;
        let mut this = Self {
            listener: None,
            handle: Handle::new(Step::Idle, pipe),
            staging: vec![0; MAX_RECORD_BYTES],
            queue: Vec::with_capacity(MAX_RECORD_BYTES),
            sent: 0,
            writes: 0,
        };
        if may_have_ring {
            this.offer();
        }
        Ok(this)
    }

    /// Waits until there is a ring, at most for `limit`; returns what carries the bytes then.
    pub fn upgrade(&mut self, limit: Duration) -> io::Result<Transport> {
        retry(limit, || {
            self.check_peer()?;
            if self.send_queue(Mode::Now)? {
                self.advance()?;
            }
            let has_ring = self.transport() != Transport::Plain;
            Ok(has_ring || is_broken(self.handle.pipe.fd.as_fd()))
        })?;
        Ok(self.transport())
    }

    /// Reserves `len_bytes`, after waiting for free space if need be. What is written there reaches the consumer
    /// with [`Reservation::commit`]; dropping the reservation discards it.
    #[inline]
    pub fn reserve(&mut self, len_bytes: usize) -> io::Result<Reservation<'_>> {
        self.make_room(len_bytes, Mode::Wait)?;
        Ok(Reservation::new(self, len_bytes, Mode::Wait))
    }

    /// As [`Producer::reserve`], but `None` instead of waiting; then see [`Producer::prepare_to_poll`].
    #[inline]
    pub fn try_reserve(&mut self, len_bytes: usize) -> io::Result<Option<Reservation<'_>>> {
        match self.make_room(len_bytes, Mode::Now)? {
            true => Ok(Some(Reservation::new(self, len_bytes, Mode::Now))),
            false => Ok(None),
        }
    }

    /// Must be called between a `try_reserve` or `try_write` that returned `None` and polling the descriptor of
    /// [`AsFd`] for reading. False: something has changed already; try again without polling.
    pub fn prepare_to_poll(&mut self) -> io::Result<bool> {
        self.handle.prepare_to_poll()
    }

    /// Writes as much as there is space for, up to 4096 bytes; `None` if there is none.
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let len_bytes = bytes.len().min(ATOMIC_BYTES);
        let Some(mut reservation) = self.try_reserve(len_bytes)? else {
            return Ok(None);
        };
        reservation.put(0, &bytes[..len_bytes]);
        reservation.commit(len_bytes)?;
        Ok(Some(len_bytes))
    }

    /// Waits until everything that was committed is in the pipe or in a ring. It is not an error yet if a consumer
    /// that took everything is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        match self.check_peer() {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe || !self.is_all_taken() => {
                Err(error)
            }
            _ => self.send_queue(Mode::Wait).map(drop),
        }
    }

    fn is_all_taken(&mut self) -> bool {
        match &mut self.handle.phase {
            Phase::Ring(ring) => matches!(ring.is_empty(), Ok(true)),
            _ => false,
        }
    }

    /// Flushes and closes.
    pub fn finish(mut self) -> io::Result<()> {
        self.probe_peer();
        self.flush()
    }

    fn probe_peer(&mut self) {
        let Handle { phase, pipe } = &mut self.handle;
        if let Phase::Ring(ring) = phase {
            ring.probe_peer(pipe);
        }
    }

    /// Leaves a ring of which the consumer is known to be gone.
    fn check_peer(&mut self) -> io::Result<()> {
        let Phase::Ring(ring) = &mut self.handle.phase else {
            return Ok(());
        };
        let gone = ring.check_peer();
        match self.handle.check(gone)? {
            true => self.leave_ring(),
            false => Ok(()),
        }
    }

    /// Whether a ring has `len_bytes` free, or the pipe can take them; false only in [`Mode::Now`].
    #[inline]
    fn make_room(&mut self, len_bytes: usize, mode: Mode) -> io::Result<bool> {
        if let Phase::Ring(ring) = &mut self.handle.phase
            && len_bytes <= MAX_RECORD_BYTES
            && ring.is_undisturbed()
            && matches!(ring.has_free(len_bytes), Ok(true))
        {
            return Ok(true);
        }
        self.make_room_slowly(len_bytes, mode)
    }

    #[cold]
    fn make_room_slowly(&mut self, len_bytes: usize, mode: Mode) -> io::Result<bool> {
        if len_bytes > MAX_RECORD_BYTES {
            return Err(RingError::TooLong(len_bytes).into());
        }
        loop {
            match &self.handle.phase {
                Phase::Dead => return Err(RingError::Dead.into()),
                Phase::Ring(_) => {
                    let made = self.make_room_in_ring(len_bytes, mode);
                    if let Some(answer) = self.handle.check(made)? {
                        return Ok(answer);
                    }
                }
                Phase::Pipe(_) => {
                    let is_sent = self.send_queue(mode)?;
                    // A message of a consumer must be read before polling, or it would be an event again and again.
                    if !is_sent || self.is_time_to_poll() {
                        self.advance()?;
                    }
                    if !is_sent {
                        return Ok(false);
                    }
                    if !matches!(self.handle.phase, Phase::Ring(_)) {
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// One attempt with a ring; `None`: try again.
    fn make_room_in_ring(&mut self, len_bytes: usize, mode: Mode) -> io::Result<Option<bool>> {
        let Handle { phase, pipe } = &mut self.handle;
        if let Phase::Ring(ring) = phase {
            ring.disarm(pipe);
        }
        self.check_peer()?;
        let Handle { phase, pipe } = &mut self.handle;
        let Phase::Ring(ring) = phase else {
            return Ok(None);
        };
        if ring.has_free(len_bytes)? {
            return Ok(Some(true));
        }
        if mode == Mode::Now {
            // A consumer that was killed is noticed at the next attempt.
            ring.note_miss(pipe);
            return Ok(Some(false));
        }
        ring.sleep(pipe)?;
        if !ring.has_free(1)? {
            // Woken by another event: the other end of the pipe is closed if its consumer was killed.
            pipe.counters.system_calls += 1;
            if is_broken(pipe.fd.as_fd()) {
                ring.set_peer_left();
            }
        }
        Ok(None)
    }

    /// Where a reservation of `len_bytes` is.
    #[inline]
    fn space(&mut self, len_bytes: usize) -> Space<'_> {
        match &mut self.handle.phase {
            Phase::Ring(ring) => ring.space(len_bytes),
            _ => Space::of(&mut self.staging[..len_bytes]),
        }
    }

    #[inline]
    fn commit(&mut self, len_bytes: usize, mode: Mode) -> io::Result<()> {
        let Handle { phase, pipe } = &mut self.handle;
        pipe.counters.bytes += len_bytes as u64;
        if let Phase::Ring(ring) = phase {
            ring.commit(len_bytes, pipe);
            return Ok(());
        }
        let staging = mem::take(&mut self.staging);
        let done = self.push(&staging[..len_bytes], mode);
        self.staging = staging;
        done
    }

    /// Writes to the pipe. [`Mode::Now`] queues what does not fit; [`Mode::Wait`] writes the rest to a ring, if
    /// one replaces the pipe meanwhile.
    fn push(&mut self, bytes: &[u8], mode: Mode) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if let Phase::Ring(_) = self.handle.phase {
                return self.push_into_ring(rest);
            }
            match self.write_pipe(rest, mode)? {
                Some(count) => rest = &rest[count..],
                None if mode == Mode::Now => {
                    self.queue.extend_from_slice(rest);
                    return Ok(());
                }
                None => {
                    // Until the pipe has space, or for the next step of the negotiation.
                    self.handle.pipe.wait()?;
                    self.advance()?;
                }
            }
        }
        Ok(())
    }

    fn push_into_ring(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            self.make_room(1, Mode::Wait)?;
            let Handle { phase, pipe } = &mut self.handle;
            let Phase::Ring(ring) = phase else {
                return self.push(rest, Mode::Wait);
            };
            let count = ring.free()?.min(rest.len());
            ring.space(count).put(0, &rest[..count]);
            ring.commit(count, pipe);
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Writes the queue to the pipe; whether it is empty then. It is empty whenever there is a ring.
    fn send_queue(&mut self, mode: Mode) -> io::Result<bool> {
        let pipe = &mut self.handle.pipe;
        while self.sent < self.queue.len() {
            pipe.counters.system_calls += 1;
            // Without polling for a consumer: these bytes precede those of any ring.
            match write_some(pipe.fd.as_fd(), &self.queue[self.sent..], mode)? {
                Some(count) => self.sent += count,
                None if mode == Mode::Now => return Ok(false),
                None => {
                    pipe.counters.system_calls += 1;
                    wait_for_room(pipe.fd.as_fd())?;
                }
            }
        }
        self.queue.clear();
        self.sent = 0;
        Ok(true)
    }

    fn write_pipe(&mut self, bytes: &[u8], mode: Mode) -> io::Result<Option<usize>> {
        // While a consumer may connect, the wait is for both.
        let mode = match self.listener.is_some() {
            true => Mode::Now,
            false => mode,
        };
        self.writes = self.writes.wrapping_add(1);
        let pipe = &mut self.handle.pipe;
        pipe.counters.system_calls += 1;
        write_some(pipe.fd.as_fd(), bytes, mode)
    }

    fn is_time_to_poll(&self) -> bool {
        match &self.handle.phase {
            Phase::Pipe(Step::Idle) => {
                self.writes < WRITES_PER_POLL / 2 || self.writes.is_multiple_of(WRITES_PER_POLL)
            }
            _ => true,
        }
    }
}

impl io::Write for Producer {
    /// Waits until at least one byte can be written; up to 4096 bytes are written as a whole.
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let least = bytes.len().min(ATOMIC_BYTES);
        self.make_room(least, Mode::Wait)?;
        let Handle { phase, pipe } = &mut self.handle;
        let count = match phase {
            Phase::Ring(ring) => {
                let count = match bytes.len() > least {
                    true => ring.free()?.min(bytes.len()),
                    false => least,
                };
                ring.space(count).put(0, &bytes[..count]);
                ring.commit(count, pipe);
                count
            }
            _ => {
                self.push(bytes, Mode::Wait)?;
                bytes.len()
            }
        };
        self.handle.pipe.counters.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Producer::flush(self)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if !self.handle.pipe.is_owner() {
            return;
        }
        // What a consumer that is gone has not taken is for other readers. Errors are for `finish` to report.
        self.probe_peer();
        let _checked = self.check_peer();
        if !matches!(self.handle.phase, Phase::Ring(_)) {
            let _sent = self.send_queue(Mode::Now);
        }
    }
}

/// Space for a record: part of a ring, or of a buffer.
///
/// It can be written to and not read, and gives no `&mut [u8]`: a kernel's ring can be written to by any process that
/// has its descriptor. Bytes that are committed without having been written are those that were
/// there before.
#[derive(Debug)]
pub struct Reservation<'a> {
    producer: &'a mut Producer,
    len_bytes: usize,
    mode: Mode,
}

impl<'a> Reservation<'a> {
    #[inline]
    fn new(producer: &'a mut Producer, len_bytes: usize, mode: Mode) -> Self {
        Self {
            producer,
            len_bytes,
            mode,
        }
    }

    /// Number of bytes that were reserved.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether no bytes were reserved.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Writes `bytes`, beginning at `offset`.
    ///
    /// # Panics
    /// They do not fit.
    #[inline]
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.producer.space(self.len_bytes).put(offset, bytes);
    }

    /// Writes all of it.
    ///
    /// # Panics
    /// There are more or fewer bytes than were reserved.
    #[inline]
    pub fn copy_from_slice(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len_bytes, "not as many as were reserved");
        self.put(0, bytes);
    }

    /// read(2) of another file, without a copy, into the bytes from `offset` on. Returns the number of bytes: zero
    /// at the end of the file, or if `offset` leaves no space.
    pub fn read_from(&mut self, offset: usize, file: impl AsFd) -> io::Result<usize> {
        let mut space = self.producer.space(self.len_bytes);
        space.read_from(offset, file)
    }

    /// The address, for a system call that writes there. Other accesses through it must be volatile or atomic
    /// stores.
    #[must_use]
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.producer.space(self.len_bytes).as_mut_ptr()
    }

    /// Hands over the first `len_bytes` of it, or all if there are fewer.
    #[inline]
    pub fn commit(self, len_bytes: usize) -> io::Result<()> {
        let len_bytes = len_bytes.min(self.len_bytes);
        self.producer.commit(len_bytes, self.mode)
    }
}
