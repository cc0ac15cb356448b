//! A ring that is mapped and live: one end of it, with its sleeping and waking.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::thread::{ClockId, futex};

use super::bytes::Bytes;
use super::counters::Counters;
use super::memory::{FullFence, Memory, SharedWord, control};
use super::protocol::{self, Page, Reader, Seen, WAIT_FUTEX, WAIT_POLL, Word, Writer};
use super::talk::Talk;
use super::{RingError, Way, kernel};

/// How long an end sleeps in a futex before it sleeps in poll(2). A futex is the shorter way for a pair
/// that is busy; poll(2) also hears of a peer that was killed.
const FUTEX_PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// Looks at the peer's position before going to sleep, at most.
const SPIN_MAX: u32 = 2_000;
const SPIN_MIN: u32 = 20;

/// On one processor: times it lets others run before going to sleep. A peer that need not wake us fills or
/// empties the ring meanwhile; woken for each record, we would take turns with it.
const YIELDS_MAX: u32 = 4;

/// After so many sleeps it looks that long again: the peer may be quicker now.
const SLEEPS_PER_TRY: u32 = 32;

/// Bytes that a consumer may have taken without saying so: what a pipe frees at once is a page, too.
const SILENT_BYTES: u32 = 4096;

/// How the ends wake each other and learn that the other is gone.
#[derive(Debug)]
pub(crate) enum Link {
    /// By the kernel, through the pipe itself.
    Kernel(kernel::Side),
    /// By the socket on which they met.
    Shared(Talk),
}

/// How long this end looks before it sleeps: longer when that helped, shorter when it did not.
#[derive(Debug)]
struct Spin {
    alone: bool,
    limit: u32,
    max: u32,
    sleeps: u32,
}

impl Spin {
    fn new(allowed: bool) -> Self {
        // On one processor the peer cannot move while we look.
        let alone = std::thread::available_parallelism().map_or(1, usize::from) == 1;
        let max = match (allowed, alone) {
            (false, _) => 0,
            (true, true) => YIELDS_MAX,
            (true, false) => SPIN_MAX,
        };
        Self {
            alone,
            limit: max,
            max,
            sleeps: 0,
        }
    }

    fn until(&mut self, moved: impl Fn() -> bool, counters: &mut Counters) -> bool {
        for _ in 0..self.limit {
            if moved() {
                self.limit = (self.limit * 2).min(self.max);
                return true;
            }
            match self.alone {
                true => {
                    counters.system_calls += 1;
                    rustix::thread::sched_yield();
                }
                false => std::hint::spin_loop(),
            }
        }
        self.sleeps = self.sleeps.wrapping_add(1);
        let least = if self.alone { 1 } else { SPIN_MIN };
        self.limit = match self.sleeps.is_multiple_of(SLEEPS_PER_TRY) {
            true => self.max,
            false => (self.limit / 2).max(least).min(self.max),
        };
        moved()
    }
}

/// What both ends have.
#[derive(Debug)]
struct End {
    memory: Memory,
    link: Link,
    spin: Spin,
    /// The peer left or died; its position is final.
    peer_left: bool,
    /// Said that it polls, and has not been awake since.
    armed: bool,
}

impl End {
    fn new(memory: Memory, link: Link, spin: bool) -> Self {
        Self {
            memory,
            link,
            spin: Spin::new(spin),
            peer_left: false,
            armed: false,
        }
    }

    /// Whether the peer has said, or the kernel for it, that it is gone.
    fn has_closed(&self) -> bool {
        match &self.link {
            Link::Kernel(side) => self.memory.word(control::CLOSED) & side.peer_bit() != 0,
            Link::Shared(_) => protocol::has_closed(self.memory.peer()),
        }
    }

    fn is_peer_gone(&mut self) -> bool {
        match self.link {
            Link::Kernel(_) => self.has_closed(),
            Link::Shared(_) => {
                self.peer_left |= self.has_closed();
                self.peer_left
            }
        }
    }

    fn way(&self) -> Way {
        match self.link {
            Link::Kernel(_) => Way::Kernel,
            Link::Shared(_) => Way::Shared,
        }
    }

    fn check_alive(&self) -> io::Result<()> {
        match self.memory.word(control::STATE) {
            control::LIVE => Ok(()),
            _ => Err(RingError::Dead.into()),
        }
    }

    /// Wakes a peer that sleeps.
    #[inline]
    fn wake(&mut self, seen: Seen, pipe: BorrowedFd<'_>, counters: &mut Counters) {
        let in_kernel = match self.link {
            Link::Kernel(side) => self.memory.word(control::WAITING) & side.sleeper_bit(),
            Link::Shared(_) => 0,
        };
        if seen.waiting | in_kernel != 0 {
            self.wake_slowly(seen.waiting, in_kernel != 0, pipe, counters);
        }
    }

    #[cold]
    fn wake_slowly(
        &mut self,
        how: u32,
        in_kernel: bool,
        pipe: BorrowedFd<'_>,
        counters: &mut Counters,
    ) {
        counters.wakes += 1;
        match &self.link {
            Link::Kernel(side) if in_kernel => {
                counters.system_calls += 1;
                side.wake_peer(pipe);
                return;
            }
            Link::Shared(talk) if how & WAIT_POLL != 0 => {
                counters.system_calls += 1;
                self.peer_left |= !talk.ring();
            }
            _ => {}
        }
        if how & WAIT_FUTEX != 0 {
            counters.system_calls += 1;
            let word = self.memory.own().position.atomic();
            // Nobody there any more is as good as woken.
            let _woken = futex::wake(word, futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    /// Returns when the peer's position is not `seen` any more, the peer is gone, or something else
    /// happened at the descriptors behind `ready`.
    fn sleep(
        &mut self,
        seen: u32,
        ready: BorrowedFd<'_>,
        counters: &mut Counters,
    ) -> io::Result<()> {
        let Self { memory, spin, .. } = self;
        let peer = memory.peer();
        let moved = || peer.position.load(ACQUIRE) != seen;
        if spin.until(moved, counters) {
            return Ok(());
        }
        counters.sleeps += 1;
        let is_news = match self.link {
            Link::Kernel(_) => self.sleep_on_two_words(seen, counters),
            Link::Shared(_) => self.doze(seen, counters)?,
        };
        if is_news {
            return Ok(());
        }
        self.arm();
        if !self.has_news(seen) {
            counters.system_calls += 1;
            match poll(&mut [PollFd::from_borrowed_fd(ready, PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.disarm(counters);
        Ok(())
    }

    /// Sleeps until the kernel or a mapped peer changes something, for a while; whether there is news.
    fn sleep_on_two_words(&mut self, seen: u32, counters: &mut Counters) -> bool {
        let limit = now().and_then(|now| now.checked_add(FUTEX_PATIENCE));
        protocol::announce_sleep::<_, FullFence>(self.memory.own(), WAIT_FUTEX);
        let done = loop {
            let event = self.memory.word(control::EVENT);
            if self.has_news(seen) || self.check_alive().is_err() {
                break true;
            }
            let words = [
                (self.memory.peer().position.atomic(), seen),
                (self.memory.control(control::EVENT).atomic(), event),
            ];
            let waits = words.map(|(word, value)| {
                let mut wait = futex::Wait::new();
                wait.val = value.into();
                wait.uaddr = futex::WaitPtr::new(word.as_ptr().cast());
                wait.flags = futex::WaitFlags::SIZE_U32;
                wait
            });
            counters.system_calls += 1;
            let flags = futex::WaitvFlags::empty();
            match futex::waitv(&waits, flags, limit.as_ref(), ClockId::Monotonic) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => break false,
            }
        };
        protocol::awake(self.memory.own());
        done
    }

    /// Sleeps in a futex, for a while; whether there is news.
    fn doze(&mut self, seen: u32, counters: &mut Counters) -> io::Result<bool> {
        protocol::announce_sleep::<_, FullFence>(self.memory.own(), WAIT_FUTEX);
        while !self.has_news(seen) {
            counters.system_calls += 1;
            let word = self.memory.peer().position.atomic();
            match futex::wait(word, futex::Flags::empty(), seen, Some(&FUTEX_PATIENCE)) {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::TIMEDOUT) => break,
                Err(errno) => {
                    protocol::awake(self.memory.own());
                    return Err(errno.into());
                }
            }
        }
        protocol::awake(self.memory.own());
        Ok(self.has_news(seen))
    }

    fn has_news(&self, seen: u32) -> bool {
        self.peer_left || self.memory.peer().position.load(ACQUIRE) != seen || self.has_closed()
    }

    fn arm(&mut self) {
        // The kernel sees for itself who polls a pipe.
        if let Link::Shared(_) = self.link {
            self.armed = true;
            protocol::announce_sleep::<_, FullFence>(self.memory.own(), WAIT_POLL);
        }
    }

    fn disarm(&mut self, counters: &mut Counters) {
        if !std::mem::take(&mut self.armed) {
            return;
        }
        protocol::awake(self.memory.own());
        if let Link::Shared(talk) = &self.link {
            counters.system_calls += 1;
            self.peer_left |= !talk.drain();
        }
    }

    /// Says goodbye.
    fn close(&mut self, pipe: BorrowedFd<'_>, counters: &mut Counters) {
        // The kernel knows by itself when a descriptor of its rings is closed.
        if let Link::Shared(_) = self.link {
            let (own, peer) = (self.memory.own(), self.memory.peer());
            let waiting = protocol::close::<_, FullFence>(own, peer);
            self.wake(
                Seen {
                    waiting,
                    closed: false,
                },
                pipe,
                counters,
            );
        }
    }
}

const ACQUIRE: std::sync::atomic::Ordering = std::sync::atomic::Ordering::Acquire;

fn corrupt(_: protocol::Corrupt) -> io::Error {
    RingError::Dead.into()
}

/// A length within a ring, whose size is at most 2^30.
fn to_u32(len_bytes: usize) -> u32 {
    u32::try_from(len_bytes).unwrap_or(u32::MAX)
}

fn positions(memory: &Memory) -> (u32, u32) {
    let at = |page: &Page<SharedWord>| page.position.load(ACQUIRE);
    (at(memory.own()), at(memory.peer()))
}

/// CLOCK_MONOTONIC. Not rustix's: that panics where there is no vDSO, as in User Mode Linux.
fn now() -> Option<Timespec> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes one timespec, into `now`, which is ours.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (answer == 0).then_some(Timespec {
        tv_sec: now.tv_sec,
        tv_nsec: now.tv_nsec,
    })
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
        let end = End::new(memory, link, spin);
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

    /// The next `len_bytes`, for which there is room.
    #[inline]
    pub(crate) fn slot(&mut self, len_bytes: usize) -> &mut [u8] {
        let len_bytes = len_bytes.min(self.core.room() as usize);
        let start = self.end.memory.at(self.core.position());
        // SAFETY: mapped for as long as `self`, writable by this end alone (sealed, or by the kernel), and
        // free: no consumer that keeps to the rules reads there, and one that does not changes nothing.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len_bytes) }
    }

    /// [`RingWriter::slot`], to look at.
    pub(crate) fn slot_ref(&self, len_bytes: usize) -> &[u8] {
        let len_bytes = len_bytes.min(self.core.room() as usize);
        let start = self.end.memory.at(self.core.position());
        // SAFETY: as for `slot`; nothing writes there while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), len_bytes) }
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
        let seen = self.core.commit::<_, FullFence>(own, peer, count);
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
        // SAFETY: mapped, written by this end alone, which does not write while this borrow lives.
        let bytes = unsafe { std::slice::from_raw_parts(start.as_ptr(), unread as usize) };
        into.extend_from_slice(bytes);
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
            end: End::new(memory, link, spin),
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
        // SAFETY: mapped as long as `self`, as many bytes as a ring holds; this process has them mapped for
        // reading only, but for a producer in the same process, which keeps to the free part.
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

/// Waits until `ready` is readable.
pub(crate) fn wait(ready: BorrowedFd<'_>, limit: Option<Duration>) -> io::Result<()> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(
        &mut [PollFd::from_borrowed_fd(ready, PollFlags::IN)],
        limit.as_ref(),
    ) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
