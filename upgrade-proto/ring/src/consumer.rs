//! The reading end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, ioctl_fionread};

use crate::bytes::Bytes;
use crate::counters::Counters;
use crate::end::Link;
use crate::line::{Line, repeat};
use crate::mapped::RingReader;
use crate::memory::{Memory, Pieces, Role, control};
use crate::pipe::{Mode, read_some, wait};
use crate::talk::{Heard, Message, Talk};
use crate::{MAX_RECORD_BYTES, Options, RingError, Way, is_pipe, is_size, kernel, service, share};
use upgrade_proto::{Answer, connect};

/// After so many bytes from the pipe a consumer asks for a ring once more, then after twice as many.
const BYTES_PER_TRY: u64 = 64 << 10;

#[derive(Debug)]
enum Phase {
    /// The pipe.
    Plain,
    /// The pipe, until a producer asks the kernel for the ring as well.
    Pending(Memory),
    /// The pipe, until the producer offers memory.
    Talking(Talk),
    /// The pipe, until the producer has written its last byte to it.
    Accepted(Talk, Memory),
    /// So many more bytes of the pipe.
    Draining(Talk, Memory, u64),
    Ring(RingReader),
    Dead,
}

/// What was in the pipe.
enum Pulled {
    Bytes(usize),
    Nothing,
    End,
    /// The bytes are elsewhere from now on.
    Switched,
}

/// Reads from a pipe, or from the ring that took its place.
///
/// Dropping it closes the descriptor. Bytes that were peeked or read ahead and not consumed go with it.
#[derive(Debug)]
pub struct Consumer {
    // The ring is closed before the pipe.
    phase: Phase,
    line: Line,
    has_rings: bool,
    /// Bytes from the pipe, and records that straddle a change of ways: from `start` to `end`.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    pipe_bytes: u64,
    next_try: u64,
}

impl Consumer {
    /// Makes the reading end of `pipe`, which need not be a pipe: others are read plainly.
    ///
    /// Never waits for a producer: one that offers a ring later is found when its first bytes are read.
    pub fn new(pipe: OwnedFd, options: &Options) -> io::Result<Self> {
        let line = Line::new(pipe, options, EventFlags::IN)?;
        let has_rings = is_pipe(&line.pipe)? && line.ready.is_some();
        let mut this = Self {
            phase: Phase::Plain,
            line,
            has_rings,
            buffer: vec![0; MAX_RECORD_BYTES],
            start: 0,
            end: 0,
            pipe_bytes: 0,
            next_try: 0,
        };
        if has_rings && let Some(memory) = this.line.ask_kernel(Role::Consumer) {
            this.phase = Phase::Pending(memory);
        }
        this.attend()?;
        Ok(this)
    }

    /// How bytes come at this moment.
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

    /// Waits until the ring is there, at most so long, reading ahead what is in the pipe; how bytes come
    /// then.
    pub fn upgrade(&mut self, limit: Duration) -> io::Result<Way> {
        repeat(limit, || {
            if let Phase::Ring(ring) = &mut self.phase
                && ring.way() == Way::Shared
                && ring.is_peer_gone()?
                && ring.look(self.line.pipe.as_fd(), &mut self.line.counters)? == 0
            {
                self.leave()?;
            }
            // What is left of the pipe comes before the ring.
            let room = self.buffer.len() - self.end;
            if room > 0
                && !matches!(self.phase, Phase::Ring(_))
                && let Pulled::End = self.pull_into_buffer(Mode::Now)?
            {
                return Ok(true);
            }
            self.next_try = self.pipe_bytes;
            self.attend()?;
            Ok(self.way() != Way::Plain)
        })?;
        Ok(self.way())
    }

    /// The bytes that are there, after waiting until there are `at_least` so many, and one. Fewer: the stream
    /// ends with these. Peeking again shows the same bytes, and perhaps more.
    #[inline]
    pub fn peek(&mut self, at_least: usize) -> io::Result<Bytes<'_>> {
        self.fill(at_least, Mode::Wait)?;
        Ok(self.view())
    }

    /// The bytes that are there if they are `at_least` so many, or the last ones. Otherwise see
    /// [`Consumer::prepare_to_poll`]. Who asks again and again instead sees somewhat later that a producer was
    /// killed, or that others wrote to the pipe.
    #[inline]
    pub fn try_peek(&mut self, at_least: usize) -> io::Result<Option<Bytes<'_>>> {
        match self.fill(at_least, Mode::Now)? {
            true => Ok(Some(self.view())),
            false => Ok(None),
        }
    }

    /// To be called before polling the descriptor of [`AsFd`] for reading, after `try_peek` had too little.
    /// False: something changed already, try again without polling.
    pub fn prepare_to_poll(&mut self) -> io::Result<bool> {
        match &mut self.phase {
            Phase::Ring(ring) => Ok(!ring.arm()),
            Phase::Dead => Err(RingError::Dead.into()),
            _ => Ok(true),
        }
    }

    /// Takes the first `len_bytes` of what was peeked.
    ///
    /// # Panics
    /// There are not so many.
    #[inline]
    pub fn consume(&mut self, len_bytes: usize) {
        let buffered = self.buffered();
        match &mut self.phase {
            Phase::Ring(ring) if buffered == 0 => {
                assert!(
                    len_bytes <= ring.filled(),
                    "more is consumed than was peeked"
                );
                self.line.counters.ring_bytes += len_bytes as u64;
                ring.consume(len_bytes, self.line.pipe.as_fd(), &mut self.line.counters);
            }
            _ => {
                assert!(len_bytes <= buffered, "more is consumed than was peeked");
                self.start += len_bytes;
            }
        }
        self.line.counters.bytes += len_bytes as u64;
    }

    #[inline]
    fn buffered(&self) -> usize {
        self.end - self.start
    }

    #[inline]
    fn view(&self) -> Bytes<'_> {
        match &self.phase {
            Phase::Ring(ring) if self.buffered() == 0 => ring.bytes(),
            _ => Bytes::of(&self.buffer[self.start..self.end]),
        }
    }

    /// Whether `at_least` bytes are there, or the end; false only if it may not wait.
    #[inline]
    fn fill(&mut self, at_least: usize, mode: Mode) -> io::Result<bool> {
        if let Phase::Ring(ring) = &self.phase
            && ring.filled() >= at_least.max(1)
            && self.buffered() == 0
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
            if self.buffered() >= at_least {
                return Ok(true);
            }
            match &self.phase {
                Phase::Dead => return Err(RingError::Dead.into()),
                Phase::Ring(_) => {
                    let filled = self.fill_from_ring(at_least, mode);
                    match filled.map_err(|error| self.fail(error))? {
                        Some(answer) => return Ok(answer),
                        None => continue,
                    }
                }
                _ => match self.pull_into_buffer(mode)? {
                    Pulled::Bytes(_) | Pulled::Switched => {}
                    Pulled::End => return Ok(true),
                    Pulled::Nothing if mode == Mode::Now => return Ok(false),
                    Pulled::Nothing => self.line.wait()?,
                },
            }
        }
    }

    /// One round with a ring; `None`: look again.
    fn fill_from_ring(&mut self, at_least: usize, mode: Mode) -> io::Result<Option<bool>> {
        let buffered = self.buffered();
        let (Phase::Ring(ring), Some(ready)) = (&mut self.phase, &self.line.ready) else {
            return Ok(None);
        };
        let pipe = self.line.pipe.as_fd();
        let polled = ring.is_armed();
        // Whether it is gone must be known before the last look at what it wrote.
        let gone = ring.is_peer_gone()?;
        let filled = ring.look(pipe, &mut self.line.counters)?;
        if buffered == 0 && filled >= at_least {
            return Ok(Some(true));
        }
        if filled > 0 {
            // Too little, or the rest of what began in the pipe. While it waits in the buffer the ring is
            // empty: whoever polls is not told of it again and again, and the pipe may go on.
            self.move_from_ring(at_least - buffered);
            return Ok(None);
        }
        if gone {
            return match ring.way() {
                Way::Kernel => Ok(Some(true)),
                _ => {
                    // The pipe goes on after the ring.
                    self.leave()?;
                    Ok(None)
                }
            };
        }
        if mode == Mode::Now {
            // Whoever asks again and again without polling makes hardly any system calls.
            let asks = polled || ring.looked_in_vain(&mut self.line.counters);
            let more = asks && self.pull_aside()?;
            return Ok(Some(more && self.buffered() >= at_least));
        }
        ring.sleep(ready.as_fd(), &mut self.line.counters)?;
        if ring.look(pipe, &mut self.line.counters)? == 0 {
            self.pull_aside()?;
        }
        Ok(None)
    }

    /// Takes what other writers put into the pipe while a ring is there, between two of the producer's
    /// commits: the ring is empty.
    fn pull_aside(&mut self) -> io::Result<bool> {
        if self.way() != Way::Shared {
            return Ok(false);
        }
        self.compact();
        self.line.counters.system_calls += 1;
        let room = &mut self.buffer[self.end..];
        match read_some(self.line.pipe.as_fd(), room, Mode::Now)? {
            Some(0) => {
                // Nobody has it any more, not even the producer: it would be ready for ever.
                if let Some(ready) = &self.line.ready {
                    ready.forget(&self.line.pipe).or_else(unless_so)?;
                }
                Ok(false)
            }
            Some(count) => {
                self.pipe_bytes += count as u64;
                self.end += count;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Copies up to `len_bytes` from the ring to the end of the buffer.
    fn move_from_ring(&mut self, len_bytes: usize) {
        self.compact();
        let Phase::Ring(ring) = &mut self.phase else {
            return;
        };
        let space = &mut self.buffer[self.end..];
        let count = ring.bytes().first(len_bytes).copy_to(space);
        ring.consume(count, self.line.pipe.as_fd(), &mut self.line.counters);
        self.line.counters.ring_bytes += count as u64;
        self.end += count;
    }

    fn compact(&mut self) {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    fn pull_into_buffer(&mut self, mode: Mode) -> io::Result<Pulled> {
        self.compact();
        let mut buffer = std::mem::take(&mut self.buffer);
        let pulled = self.pull(&mut buffer[self.end..], mode);
        self.buffer = buffer;
        if let Ok(Pulled::Bytes(count)) = pulled {
            self.end += count;
        }
        pulled
    }

    /// Reads from the pipe, as far as the bytes are there.
    fn pull(&mut self, into: &mut [u8], mode: Mode) -> io::Result<Pulled> {
        self.attend()?;
        let most = match &mut self.phase {
            Phase::Ring(_) | Phase::Dead => return Ok(Pulled::Switched),
            Phase::Draining(_, _, left) => {
                usize::try_from(*left).unwrap_or(usize::MAX).min(into.len())
            }
            _ => into.len(),
        };
        // Who talks must not sleep in read(2) alone.
        let quiet = matches!(self.phase, Phase::Plain | Phase::Pending(_));
        let how = if quiet { mode } else { Mode::Now };
        self.line.counters.system_calls += 1;
        let count = match read_some(self.line.pipe.as_fd(), &mut into[..most], how)? {
            None if matches!(self.phase, Phase::Draining(..)) => return self.drained(),
            None => return Ok(Pulled::Nothing),
            Some(count) => count,
        };
        self.pipe_bytes += count as u64;
        match &mut self.phase {
            Phase::Draining(_, _, left) if count > 0 => {
                *left -= count as u64;
                Ok(Pulled::Bytes(count))
            }
            // Another reader took them.
            Phase::Draining(..) => self.drained(),
            Phase::Talking(_) | Phase::Accepted(..) if count == 0 => self.last_words(mode),
            _ if count == 0 => Ok(Pulled::End),
            _ => Ok(Pulled::Bytes(count)),
        }
    }

    fn drained(&mut self) -> io::Result<Pulled> {
        if let Phase::Draining(_, _, left) = &mut self.phase {
            *left = 0;
        }
        self.attend()?;
        Ok(Pulled::Switched)
    }

    /// The pipe ends, but its producer may have said something on the socket before: a ring may be full.
    fn last_words(&mut self, mode: Mode) -> io::Result<Pulled> {
        loop {
            self.attend()?;
            let talk = match &self.phase {
                Phase::Talking(talk) | Phase::Accepted(talk, _) => talk,
                Phase::Plain => return Ok(Pulled::End),
                _ => return Ok(Pulled::Switched),
            };
            if mode == Mode::Now {
                // It has ended, and would be ready until the socket says more.
                if let Some(ready) = &self.line.ready {
                    ready.forget(&self.line.pipe).or_else(unless_so)?;
                }
                return Ok(Pulled::Nothing);
            }
            self.line.counters.system_calls += 1;
            wait(talk.as_fd())?;
        }
    }

    fn fail(&mut self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::InvalidData {
            self.phase = Phase::Dead;
        }
        error
    }

    /// Takes the next step towards a ring, if the other end has taken its own.
    fn attend(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.phase, Phase::Plain) {
            Phase::Plain => self.ask(),
            Phase::Pending(memory) => match memory.word(control::STATE) {
                control::PENDING => self.phase = Phase::Pending(memory),
                control::LIVE => self.start(memory, Link::Kernel(kernel::Side::Read))?,
                _ => self.phase = Phase::Dead,
            },
            Phase::Talking(talk) => {
                self.line.counters.system_calls += 1;
                match talk.hear() {
                    Heard::Nothing => self.phase = Phase::Talking(talk),
                    Heard::Said(Message::Offer(size), Some(file)) => {
                        self.line.counters.system_calls += 1;
                        match self.accept(size, &talk, &file) {
                            Some(memory) => self.phase = Phase::Accepted(talk, memory),
                            None => self.watch_pipe()?,
                        }
                    }
                    Heard::Gone | Heard::Said(..) => self.watch_pipe()?,
                }
            }
            Phase::Accepted(talk, memory) => {
                self.line.counters.system_calls += 1;
                match talk.hear() {
                    Heard::Nothing => self.phase = Phase::Accepted(talk, memory),
                    Heard::Said(Message::Switch, _) => {
                        // All that the producer wrote to the pipe is among these bytes.
                        self.line.counters.system_calls += 1;
                        let left = ioctl_fionread(&self.line.pipe)?;
                        self.phase = Phase::Draining(talk, memory, left);
                        return self.attend();
                    }
                    Heard::Gone | Heard::Said(..) => self.watch_pipe()?,
                }
            }
            Phase::Draining(talk, memory, 0) => self.start(memory, Link::Shared(talk))?,
            other => self.phase = other,
        }
        Ok(())
    }

    /// Asks whether the producer offers a ring: at once, when its first bytes were read (it offers before
    /// it writes), and ever more rarely after that.
    fn ask(&mut self) {
        if !self.has_rings || !self.line.options.shared || self.pipe_bytes < self.next_try {
            return;
        }
        self.next_try = match self.pipe_bytes {
            0 => 1,
            bytes => bytes + bytes.max(BYTES_PER_TRY),
        };
        let (Some(ready), Ok(name)) = (&self.line.ready, service()) else {
            return;
        };
        self.line.counters.system_calls += 1;
        let answer = connect(&self.line.pipe, &name, &self.line.options.lookup);
        if let Ok(Answer::Found(connection)) = answer {
            let talk = Talk::new(connection.into_stream());
            if ready.add(&talk).is_ok() {
                self.phase = Phase::Talking(talk);
            }
        }
    }

    /// Maps what was offered, if it is sound, and says so.
    fn accept(&self, size: u64, talk: &Talk, file: &OwnedFd) -> Option<Memory> {
        let most = u64::from(self.line.options.size_bytes);
        let size = u32::try_from(size).ok()?;
        if !is_size(size) || u64::from(size) > most {
            return None;
        }
        share::check(file, Memory::file_bytes(size)).ok()?;
        let page = share::create(rustix::param::page_size() as u64).ok()?;
        let pieces = Pieces {
            main: file.as_fd(),
            consumer: Some((page.as_fd(), 0)),
            control_writable: false,
        };
        let memory = Memory::map(Role::Consumer, size, &pieces).ok()?;
        share::seal(&page).ok()?;
        talk.say(Message::Ready, Some(page.as_fd()))
            .then_some(memory)
    }

    fn start(&mut self, memory: Memory, link: Link) -> io::Result<()> {
        match RingReader::new(memory, link, self.line.options.spin) {
            Ok(ring) => {
                self.line.note_ring(ring.way());
                self.phase = Phase::Ring(ring);
                Ok(())
            }
            Err(error) => {
                self.phase = Phase::Dead;
                Err(error)
            }
        }
    }

    /// The producer is gone and its ring is empty: the pipe goes on, perhaps with another producer.
    fn leave(&mut self) -> io::Result<()> {
        self.phase = Phase::Plain;
        self.next_try = self.pipe_bytes + 1;
        self.watch_pipe()
    }

    /// The pipe is of interest again, if it was not.
    fn watch_pipe(&self) -> io::Result<()> {
        if let Some(ready) = &self.line.ready {
            ready.add(&self.line.pipe).or_else(unless_so)?;
        }
        Ok(())
    }
}

/// That something is watched, or is not, already is no error.
fn unless_so(errno: Errno) -> Result<(), Errno> {
    match errno {
        Errno::EXIST | Errno::NOENT => Ok(()),
        _ => Err(errno),
    }
}

impl AsFd for Consumer {
    /// Readable when there may be bytes: for polling, after [`Consumer::prepare_to_poll`]. Stays the same.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

impl io::Read for Consumer {
    /// Waits until there is a byte; zero is the end.
    #[inline]
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        if target.is_empty() {
            return Ok(0);
        }
        // A pipe is read without a stop in the buffer.
        while self.buffered() == 0 && !matches!(self.phase, Phase::Ring(_) | Phase::Dead) {
            match self.pull(target, Mode::Wait)? {
                Pulled::Bytes(count) => {
                    self.line.counters.bytes += count as u64;
                    return Ok(count);
                }
                Pulled::End => return Ok(0),
                Pulled::Nothing => self.line.wait()?,
                Pulled::Switched => break,
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
        if !self.line.is_ours() {
            return;
        }
        match &mut self.phase {
            Phase::Ring(ring) => ring.close(self.line.pipe.as_fd(), &mut self.line.counters),
            // The producer may be writing to it already.
            Phase::Accepted(_, memory) | Phase::Draining(_, memory, _) => memory.abandon(),
            _ => {}
        }
    }
}
