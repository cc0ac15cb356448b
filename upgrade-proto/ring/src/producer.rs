//! The writing end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;

use rustix::event::epoll::EventFlags;

use crate::counters::Counters;
use crate::end::Link;
use crate::grant::Grant;
use crate::line::{Line, repeat};
use crate::mapped::RingWriter;
use crate::memory::{Memory, Role, control};
use crate::pipe::{Mode, is_broken, wait_for_room, write_some};
use crate::talk::{Heard, Message, Talk};
use crate::{MAX_RECORD_BYTES, Options, RingError, Way, is_pipe, kernel, service, share};
use upgrade_proto::Listener;

/// A write of no more than this goes into a ring as a whole, as it goes into a pipe (PIPE_BUF).
const WHOLE_BYTES: usize = 4096;

/// In how many writes to the pipe a producer looks for a consumer once, after the first few.
const WRITES_PER_LOOK: u32 = 32;

#[derive(Debug)]
enum Phase {
    /// The pipe.
    Plain,
    /// The pipe, until a consumer asks the kernel for the ring as well.
    Pending(Memory),
    /// The pipe, until a consumer has mapped what it was offered.
    Talking(Talk, Memory),
    /// The pipe, until the last byte of the queue is in it.
    Agreed(Talk, Memory),
    Ring(RingWriter),
    Dead,
}

/// Writes to a pipe, or to the ring that took its place.
///
/// Dropping it closes the descriptor. A consumer sees the end of the stream then, after everything that was
/// committed; call [`Producer::finish`] to learn of errors.
#[derive(Debug)]
pub struct Producer {
    // The ring is closed before the pipe.
    phase: Phase,
    listener: Option<Listener>,
    line: Line,
    /// Where a grant's bytes are made while there is no ring.
    staging: Vec<u8>,
    /// Accepted, and not yet in the pipe: from `sent` on.
    queue: Vec<u8>,
    sent: usize,
    writes: u32,
}

impl Producer {
    /// Makes the writing end of `pipe`, which need not be a pipe: others are written to plainly.
    ///
    /// Never waits. That no ring can be offered is no error.
    pub fn new(pipe: OwnedFd, options: &Options) -> io::Result<Self> {
        let mut this = Self {
            phase: Phase::Plain,
            listener: None,
            line: Line::new(pipe, options, EventFlags::OUT)?,
            staging: vec![0; MAX_RECORD_BYTES],
            queue: Vec::with_capacity(MAX_RECORD_BYTES),
            sent: 0,
            writes: 0,
        };
        if is_pipe(&this.line.pipe)? {
            this.offer();
        }
        Ok(this)
    }

    fn offer(&mut self) {
        if let Some(memory) = self.line.ask_kernel(Role::Producer) {
            self.phase = Phase::Pending(memory);
            return;
        }
        let (true, Some(ready), Ok(name)) = (self.line.options.shared, &self.line.ready, service())
        else {
            return;
        };
        // A pipe without a place for a service, or with another producer that was first: no ring.
        let listener = Listener::bind(&self.line.pipe, &name, &self.line.options.offer).ok();
        self.listener = listener.filter(|listener| ready.add(listener).is_ok());
    }

    /// How bytes go at this moment.
    #[must_use]
    pub fn way(&self) -> Way {
        match &self.phase {
            Phase::Ring(ring) => ring.way(),
            _ => Way::Plain,
        }
    }

    /// Which ring there is, or was last.
    #[must_use]
    pub fn last_ring(&self) -> Option<Way> {
        self.line.last_ring
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.line.counters
    }

    /// Waits until the ring is there, at most so long; how bytes go then.
    pub fn upgrade(&mut self, limit: Duration) -> io::Result<Way> {
        repeat(limit, || {
            self.check_peer()?;
            if self.send_queue(Mode::Now)? {
                self.attend()?;
            }
            Ok(self.way() != Way::Plain || is_broken(self.line.pipe.as_fd()))
        })?;
        Ok(self.way())
    }

    /// Space for `len_bytes`, waiting for it if need be. What is written there arrives after
    /// [`Grant::commit`]; a grant that is dropped was never there.
    #[inline]
    pub fn reserve(&mut self, len_bytes: usize) -> io::Result<Grant<'_>> {
        self.make_room(len_bytes, Mode::Wait)?;
        Ok(Grant::new(self, len_bytes, Mode::Wait))
    }

    /// Space for `len_bytes` if there is any now. Otherwise see [`Producer::prepare_to_poll`].
    #[inline]
    pub fn try_reserve(&mut self, len_bytes: usize) -> io::Result<Option<Grant<'_>>> {
        match self.make_room(len_bytes, Mode::Now)? {
            true => Ok(Some(Grant::new(self, len_bytes, Mode::Now))),
            false => Ok(None),
        }
    }

    /// To be called before polling the descriptor of [`AsFd`] for reading, after `try_reserve` or
    /// `try_write` had no room. False: something changed already, try again without polling.
    pub fn prepare_to_poll(&mut self) -> io::Result<bool> {
        match &mut self.phase {
            Phase::Ring(ring) => Ok(!ring.arm() && !ring.peer_left()),
            Phase::Dead => Err(RingError::Dead.into()),
            _ => Ok(true),
        }
    }

    /// Writes as much as fits now; `None` if nothing does.
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let len_bytes = bytes.len().min(WHOLE_BYTES);
        let Some(mut grant) = self.try_reserve(len_bytes)? else {
            return Ok(None);
        };
        grant.put(0, &bytes[..len_bytes]);
        grant.commit(len_bytes)?;
        Ok(Some(len_bytes))
    }

    /// Waits until everything that was committed is in the pipe or in a ring. That a consumer which took
    /// everything is gone is no error yet.
    pub fn flush(&mut self) -> io::Result<()> {
        match self.check_peer() {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe || !self.is_all_taken() => {
                Err(error)
            }
            _ => self.send_queue(Mode::Wait).map(drop),
        }
    }

    fn is_all_taken(&mut self) -> bool {
        match &mut self.phase {
            Phase::Ring(ring) => matches!(ring.is_empty(), Ok(true)),
            _ => false,
        }
    }

    /// Flushes and closes.
    pub fn finish(mut self) -> io::Result<()> {
        self.ask_peer();
        self.flush()
    }

    /// Learns whether the consumer was killed.
    fn ask_peer(&mut self) {
        if let Phase::Ring(ring) = &mut self.phase {
            ring.ask_peer(&mut self.line.counters);
        }
    }

    /// Ends a ring whose consumer is gone.
    fn check_peer(&mut self) -> io::Result<()> {
        let Phase::Ring(ring) = &mut self.phase else {
            return Ok(());
        };
        match ring.check_peer() {
            Ok(true) => self.leave(),
            Ok(false) => Ok(()),
            Err(error) => Err(self.fail(error)),
        }
    }

    #[inline]
    fn make_room(&mut self, len_bytes: usize, mode: Mode) -> io::Result<bool> {
        if let Phase::Ring(ring) = &mut self.phase
            && len_bytes <= MAX_RECORD_BYTES
            && ring.is_calm()
            && matches!(ring.has_room(len_bytes), Ok(true))
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
            match &mut self.phase {
                Phase::Dead => return Err(RingError::Dead.into()),
                Phase::Ring(ring) => {
                    ring.disarm(&mut self.line.counters);
                    self.check_peer()?;
                    let Phase::Ring(ring) = &mut self.phase else {
                        continue;
                    };
                    match ring.has_room(len_bytes) {
                        Ok(true) => return Ok(true),
                        Ok(false) if mode == Mode::Now => {
                            // One that was killed is found out when it is asked for again.
                            ring.looked_in_vain(&mut self.line.counters);
                            return Ok(false);
                        }
                        Ok(false) => self.sleep_in_ring()?,
                        Err(error) => return Err(self.fail(error)),
                    }
                }
                _ => {
                    let is_sent = self.send_queue(mode)?;
                    // Who polls would be told of a consumer's message until it is read.
                    if !is_sent || self.is_time_to_look() {
                        self.attend()?;
                    }
                    if !is_sent {
                        return Ok(false);
                    }
                    if !matches!(self.phase, Phase::Ring(_)) {
                        return Ok(true);
                    }
                }
            }
        }
    }

    fn sleep_in_ring(&mut self) -> io::Result<()> {
        let (Phase::Ring(ring), Some(ready)) = (&mut self.phase, &self.line.ready) else {
            return Ok(());
        };
        ring.sleep(ready.as_fd(), &mut self.line.counters)?;
        if !ring.has_room(1)? {
            // Woken for something else: a consumer that was killed took the other end of the pipe with it.
            self.line.counters.system_calls += 1;
            if is_broken(self.line.pipe.as_fd()) {
                ring.set_peer_left();
            }
        }
        Ok(())
    }

    /// The ring cannot be used any more.
    fn fail(&mut self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::InvalidData {
            self.phase = Phase::Dead;
        }
        error
    }

    /// Writes into a grant that begins here.
    #[inline]
    pub(super) fn put(&mut self, offset: usize, source: &[u8]) {
        match &mut self.phase {
            Phase::Ring(ring) => ring.put(offset, source),
            _ => self.staging[offset..offset + source.len()].copy_from_slice(source),
        }
    }

    /// Where a grant of so many bytes is.
    pub(super) fn slot(&mut self, len_bytes: usize) -> NonNull<u8> {
        match &mut self.phase {
            Phase::Ring(ring) => ring.slot(len_bytes),
            _ => NonNull::from(&mut self.staging[..len_bytes]).cast(),
        }
    }

    #[inline]
    pub(super) fn commit(&mut self, len_bytes: usize, mode: Mode) -> io::Result<()> {
        self.line.counters.bytes += len_bytes as u64;
        if let Phase::Ring(ring) = &mut self.phase {
            self.line.counters.ring_bytes += len_bytes as u64;
            ring.commit(len_bytes, self.line.pipe.as_fd(), &mut self.line.counters);
            return Ok(());
        }
        let staging = std::mem::take(&mut self.staging);
        let done = self.push(&staging[..len_bytes], mode);
        self.staging = staging;
        done
    }

    /// Puts bytes into the pipe. What does not fit now waits in the queue; who waits instead puts what is
    /// left into a ring, if one comes up meanwhile.
    fn push(&mut self, bytes: &[u8], mode: Mode) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if let Phase::Ring(_) = self.phase {
                return self.push_into_ring(rest);
            }
            match self.write_pipe(rest, mode)? {
                Some(count) => rest = &rest[count..],
                None if mode == Mode::Now => {
                    self.queue.extend_from_slice(rest);
                    return Ok(());
                }
                None => self.wait_for_pipe()?,
            }
        }
        Ok(())
    }

    fn push_into_ring(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            self.make_room(1, Mode::Wait)?;
            let Phase::Ring(ring) = &mut self.phase else {
                return self.push(rest, Mode::Wait);
            };
            let count = ring.room()?.min(rest.len());
            ring.put(0, &rest[..count]);
            ring.commit(count, self.line.pipe.as_fd(), &mut self.line.counters);
            self.line.counters.ring_bytes += count as u64;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Writes what waits in the queue, which is empty before there is a ring; whether it is empty then.
    fn send_queue(&mut self, mode: Mode) -> io::Result<bool> {
        while self.sent < self.queue.len() {
            self.line.counters.system_calls += 1;
            // Consumers that come meanwhile wait: this is before anything in a ring.
            match write_some(self.line.pipe.as_fd(), &self.queue[self.sent..], mode)? {
                Some(count) => self.sent += count,
                None if mode == Mode::Now => return Ok(false),
                None => {
                    self.line.counters.system_calls += 1;
                    wait_for_room(self.line.pipe.as_fd())?;
                }
            }
        }
        self.queue.clear();
        self.sent = 0;
        Ok(true)
    }

    fn write_pipe(&mut self, bytes: &[u8], mode: Mode) -> io::Result<Option<usize>> {
        // While a consumer may come, waiting is for both.
        let mode = match self.listener.is_some() {
            true => Mode::Now,
            false => mode,
        };
        self.writes = self.writes.wrapping_add(1);
        self.line.counters.system_calls += 1;
        write_some(self.line.pipe.as_fd(), bytes, mode)
    }

    /// Waits until the pipe has room or a consumer comes nearer.
    fn wait_for_pipe(&mut self) -> io::Result<()> {
        self.line.wait()?;
        self.attend()
    }

    fn is_time_to_look(&self) -> bool {
        match &self.phase {
            Phase::Plain => {
                self.writes < WRITES_PER_LOOK / 2 || self.writes.is_multiple_of(WRITES_PER_LOOK)
            }
            _ => true,
        }
    }

    /// Takes the next step towards a ring, if the other end has taken its own. The last one waits until the
    /// queue is empty.
    fn attend(&mut self) -> io::Result<()> {
        let is_sent = self.queue.is_empty();
        match std::mem::replace(&mut self.phase, Phase::Plain) {
            Phase::Plain => self.accept(),
            Phase::Pending(memory) => match memory.word(control::STATE) {
                control::LIVE if is_sent => {
                    self.start(memory, Link::Kernel(kernel::Side::Write))?
                }
                control::PENDING | control::LIVE => self.phase = Phase::Pending(memory),
                _ => self.phase = Phase::Dead,
            },
            Phase::Talking(talk, mut memory) => {
                self.line.counters.system_calls += 1;
                match talk.hear() {
                    Heard::Nothing => self.phase = Phase::Talking(talk, memory),
                    Heard::Said(Message::Ready, Some(page)) if is_mapped(&mut memory, &page) => {
                        self.phase = Phase::Agreed(talk, memory);
                        return self.attend();
                    }
                    // Another client may do better.
                    Heard::Gone | Heard::Said(..) => self.listen(true)?,
                }
            }
            Phase::Agreed(talk, memory) if is_sent => {
                self.line.counters.system_calls += 1;
                match talk.say(Message::Switch, None) {
                    true => self.start(memory, Link::Shared(talk))?,
                    false => self.listen(true)?,
                }
            }
            Phase::Agreed(talk, memory) => {
                self.line.counters.system_calls += 1;
                match talk.hear() {
                    Heard::Nothing => self.phase = Phase::Agreed(talk, memory),
                    Heard::Gone | Heard::Said(..) => self.listen(true)?,
                }
            }
            other => self.phase = other,
        }
        Ok(())
    }

    fn accept(&mut self) {
        let (Some(listener), Some(ready)) = (&self.listener, &self.line.ready) else {
            return;
        };
        self.line.counters.system_calls += 1;
        let connection = match listener.accept() {
            Ok(Some(connection)) => connection,
            Ok(None) => return,
            Err(_) => {
                // It would be ready for ever, and nobody could come.
                self.listener = None;
                return;
            }
        };
        let talk = Talk::new(connection.into_stream());
        let made = share::create_ring(self.line.options.size_bytes);
        let Ok((file, memory)) = made else { return };
        let offer = Message::Offer(self.line.options.size_bytes.into());
        self.line.counters.system_calls += 1;
        // One at a time: others wait in the backlog.
        if talk.say(offer, Some(file.as_fd()))
            && ready.add(&talk).is_ok()
            && self.listen(false).is_ok()
        {
            self.phase = Phase::Talking(talk, memory);
        }
    }

    /// Whether a client that comes is of interest to those who wait.
    fn listen(&self, on: bool) -> io::Result<()> {
        match (&self.listener, &self.line.ready, on) {
            (Some(listener), Some(ready), true) => ready.add(listener)?,
            (Some(listener), Some(ready), false) => ready.forget(listener)?,
            _ => {}
        }
        Ok(())
    }

    fn start(&mut self, memory: Memory, link: Link) -> io::Result<()> {
        let shared = matches!(link, Link::Shared(_));
        let ring = match RingWriter::new(memory, link, self.line.options.spin) {
            Ok(ring) => ring,
            Err(error) => return Err(self.fail(error)),
        };
        if let (true, Some(ready)) = (shared, &self.line.ready) {
            // Room in the pipe is of no interest now; that it breaks is.
            ready.change(&self.line.pipe, EventFlags::empty())?;
        }
        self.line.note_ring(ring.way());
        self.phase = Phase::Ring(ring);
        Ok(())
    }

    /// The consumer is gone: what it has not taken goes to the pipe, and so does everything after.
    fn leave(&mut self) -> io::Result<()> {
        let Phase::Ring(ring) = &mut self.phase else {
            return Ok(());
        };
        if let Err(error) = ring.take_back(&mut self.queue) {
            return Err(self.fail(error));
        }
        self.phase = Phase::Plain;
        self.writes = 0;
        if let Some(ready) = &self.line.ready {
            ready.change(&self.line.pipe, EventFlags::OUT)?;
        }
        self.listen(true)
    }
}

/// The consumer says where its page is: whether that is sound, and mapped.
fn is_mapped(memory: &mut Memory, page: &OwnedFd) -> bool {
    let page_bytes = rustix::param::page_size() as u64;
    share::check(page, page_bytes).is_ok() && memory.map_consumer(page.as_fd()).is_ok()
}

impl AsFd for Producer {
    /// Readable when there may be room: for polling, after [`Producer::prepare_to_poll`]. Stays the same.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

impl io::Write for Producer {
    /// Waits until at least one byte fits; up to 4096 bytes are written as a whole.
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let whole = bytes.len().min(WHOLE_BYTES);
        self.make_room(whole, Mode::Wait)?;
        let count = match &mut self.phase {
            Phase::Ring(ring) => {
                let count = match bytes.len() > whole {
                    true => ring.room()?.min(bytes.len()),
                    false => whole,
                };
                ring.put(0, &bytes[..count]);
                ring.commit(count, self.line.pipe.as_fd(), &mut self.line.counters);
                self.line.counters.ring_bytes += count as u64;
                count
            }
            _ => {
                self.push(bytes, Mode::Wait)?;
                bytes.len()
            }
        };
        self.line.counters.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Producer::flush(self)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if !self.line.is_ours() {
            return;
        }
        // A consumer that is gone has left bytes for others. Whoever wants to know of errors calls `finish`.
        self.ask_peer();
        let _checked = self.check_peer();
        if let Phase::Ring(ring) = &mut self.phase {
            ring.close(self.line.pipe.as_fd(), &mut self.line.counters);
        } else {
            let _sent = self.send_queue(Mode::Now);
        }
    }
}
