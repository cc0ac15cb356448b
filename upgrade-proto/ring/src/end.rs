//! A ring that is mapped and live: one end of it, with its sleeping and waking.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::thread::{ClockId, futex};

use crate::counters::Counters;
use crate::memory::{FullFence, Memory, Role, control};
use crate::patience::{Lateness, Spin, is_alone};
use crate::pipe::wait;
use crate::protocol::{self, Seen, WAIT_FUTEX, WAIT_LATE, WAIT_POLL, Word};
use crate::talk::Talk;
use crate::{RingError, Way, kernel};

/// How long an end sleeps in a futex before it sleeps in poll(2). A futex is the shorter way for a pair
/// that is busy; poll(2) also hears of a peer that was killed.
const FUTEX_PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// How long a consumer that asked to be woken late sleeps before it looks by itself.
const LATE_PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Woken late is: when so much of the ring is filled, as one part of the size.
const LATE_PART: u32 = 16;

/// An end that looks again and again instead of sleeping asks after so many looks in vain whether its peer
/// is alive: one that was killed did not say that it left.
const LOOKS_PER_QUESTION: u32 = 1024;

/// How the ends wake each other and learn that the other is gone.
#[derive(Debug)]
pub(crate) enum Link {
    /// By the kernel, through the pipe itself.
    Kernel(kernel::Side),
    /// By the socket on which they met.
    Shared(Talk),
}

/// What both ends have.
#[derive(Debug)]
pub(crate) struct End {
    pub memory: Memory,
    pub link: Link,
    spin: Spin,
    lateness: Lateness,
    /// The peer left or died; its position is final.
    pub peer_left: bool,
    /// Said that it polls, and has not been awake since.
    pub armed: bool,
    /// How often the peer's position was looked at in vain, and what it was.
    vain: (u32, u32),
}

impl End {
    pub(crate) fn new(role: Role, memory: Memory, link: Link, spin: bool) -> Self {
        let alone = is_alone();
        Self {
            memory,
            link,
            spin: Spin::new(spin, alone),
            lateness: Lateness::new(role == Role::Consumer),
            peer_left: false,
            armed: false,
            vain: (0, 0),
        }
    }

    /// So full is the ring when a consumer that asked for that is woken.
    #[inline]
    pub(crate) fn late_bytes(&self) -> u32 {
        self.memory.size() / LATE_PART
    }

    /// Whether the peer has said, or the kernel for it, that it is gone.
    #[inline]
    pub(crate) fn has_closed(&self) -> bool {
        match &self.link {
            Link::Kernel(side) => self.memory.word(control::CLOSED) & side.peer_bit() != 0,
            Link::Shared(_) => protocol::has_closed(self.memory.peer()),
        }
    }

    pub(crate) fn is_peer_gone(&mut self) -> bool {
        match self.link {
            Link::Kernel(_) => self.has_closed(),
            Link::Shared(_) => {
                self.peer_left |= self.has_closed();
                self.peer_left
            }
        }
    }

    pub(crate) fn way(&self) -> Way {
        match self.link {
            Link::Kernel(_) => Way::Kernel,
            Link::Shared(_) => Way::Shared,
        }
    }

    pub(crate) fn check_alive(&self) -> io::Result<()> {
        match self.memory.word(control::STATE) {
            control::LIVE => Ok(()),
            _ => Err(RingError::Dead.into()),
        }
    }

    /// Wakes a peer that sleeps.
    #[inline]
    pub(crate) fn wake(&mut self, seen: Seen, pipe: BorrowedFd<'_>, counters: &mut Counters) {
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
    pub(crate) fn sleep(
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
        if self.lateness.is_due() {
            let is_news = self.doze(WAIT_FUTEX | WAIT_LATE, seen, LATE_PATIENCE, counters)?;
            let came = self.memory.peer().position.load(ACQUIRE).wrapping_sub(seen);
            // That nothing came says nothing: whoever is woken at once from here on loses nothing either.
            if came != 0 {
                self.lateness.learn(came >= self.late_bytes());
            }
            if is_news {
                return Ok(());
            }
        }
        if self.doze(WAIT_FUTEX, seen, FUTEX_PATIENCE, counters)? {
            return Ok(());
        }
        self.arm();
        if !self.has_news(seen) {
            counters.system_calls += 1;
            wait(ready)?;
        }
        self.disarm(counters);
        Ok(())
    }

    /// Sleeps in a futex, for a while; whether there is news.
    fn doze(
        &mut self,
        how: u32,
        seen: u32,
        limit: Timespec,
        counters: &mut Counters,
    ) -> io::Result<bool> {
        protocol::announce_sleep::<_, FullFence>(self.memory.own(), how);
        let dozed = match self.link {
            Link::Kernel(_) => {
                self.wait_for_two_words(seen, limit, counters);
                Ok(())
            }
            Link::Shared(_) => self.wait_for_a_word(seen, limit, counters),
        };
        protocol::awake(self.memory.own());
        dozed.map(|()| self.has_news(seen))
    }

    /// The kernel changes another word than the peer does.
    fn wait_for_two_words(&self, seen: u32, limit: Timespec, counters: &mut Counters) {
        let limit = now().and_then(|now| now.checked_add(limit));
        loop {
            let event = self.memory.word(control::EVENT);
            if self.has_news(seen) {
                return;
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
                // Who may not make this system call has poll(2) left.
                Err(_) => return,
            }
        }
    }

    fn wait_for_a_word(
        &self,
        seen: u32,
        limit: Timespec,
        counters: &mut Counters,
    ) -> io::Result<()> {
        while !self.has_news(seen) {
            counters.system_calls += 1;
            let word = self.memory.peer().position.atomic();
            match futex::wait(word, futex::Flags::empty(), seen, Some(&limit)) {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::TIMEDOUT) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// To be called by an end that found nothing, and will not sleep; whether it is time for system calls.
    pub(crate) fn looked_in_vain(&mut self, seen: u32, counters: &mut Counters) -> bool {
        self.vain = match self.vain {
            (times, last) if last == seen => (times.wrapping_add(1), seen),
            _ => (1, seen),
        };
        let is_time = self.vain.0.is_multiple_of(LOOKS_PER_QUESTION);
        if is_time {
            self.ask(counters);
        }
        is_time
    }

    /// Asks whether the peer still is there. What the kernel knows, it has said.
    pub(crate) fn ask(&mut self, counters: &mut Counters) {
        if let Link::Shared(talk) = &self.link {
            counters.system_calls += 1;
            self.peer_left |= !talk.drain();
        }
    }

    /// Whether there is something else to do than to sleep.
    pub(crate) fn has_news(&self, seen: u32) -> bool {
        self.peer_left
            || self.memory.peer().position.load(ACQUIRE) != seen
            || self.has_closed()
            || self.check_alive().is_err()
    }

    pub(crate) fn arm(&mut self) {
        // The kernel sees for itself who polls a pipe.
        if let Link::Shared(_) = self.link {
            self.armed = true;
            protocol::announce_sleep::<_, FullFence>(self.memory.own(), WAIT_POLL);
        }
    }

    pub(crate) fn disarm(&mut self, counters: &mut Counters) {
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
    pub(crate) fn close(&mut self, pipe: BorrowedFd<'_>, counters: &mut Counters) {
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
