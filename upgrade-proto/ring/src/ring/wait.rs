//! How the ends of a ring sleep and wake each other.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Acquire;

use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::thread::{ClockId, futex};

use super::Ring;
use crate::channel::Channel;
use crate::counters::Counters;
use crate::memory::{FullFence, control};
use crate::pipe::wait;
use crate::pipe_end::PipeEnd;
use crate::protocol::{self, Cursor, Seen, WAIT_COALESCED, WAIT_FUTEX, WAIT_POLL, Word};

/// How long an end sleeps in a futex before it sleeps in poll(2). The futex is faster for a busy pair; poll(2)
/// also notices a peer that was killed.
const FUTEX_TIMEOUT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// How long a consumer sleeps that asked for a coalesced wake-up.
const COALESCED_TIMEOUT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// A coalesced wake-up is sent when the ring is filled to this fraction of its size.
const COALESCED_PART: u32 = 16;

/// An end that never sleeps, but tries again and again, checks after this many misses whether its peer was
/// killed.
const MISSES_PER_PROBE: u32 = 1024;

impl<C: Cursor> Ring<C> {
    /// Bytes in the ring at which a coalesced wake-up is sent.
    #[inline]
    pub(super) fn coalesced_mark(&self) -> u32 {
        self.memory.size() / COALESCED_PART
    }

    /// Wakes the peer if it sleeps.
    #[inline]
    pub(super) fn wake(&mut self, seen: Seen, pipe: &mut PipeEnd) {
        let in_kernel = match self.channel {
            Channel::Kernel(side) => self.memory.word(control::WAITING) & side.sleeper_bit(),
            Channel::Socket(_) => 0,
        };
        if seen.waiting | in_kernel != 0 {
            self.wake_sleeper(seen.waiting, in_kernel != 0, pipe);
        }
    }

    #[cold]
    fn wake_sleeper(&mut self, how: u32, in_kernel: bool, pipe: &mut PipeEnd) {
        pipe.counters.wakes += 1;
        match &self.channel {
            Channel::Kernel(side) if in_kernel => {
                pipe.counters.system_calls += 1;
                // Wakes futexes, too.
                side.wake_peer(pipe.fd.as_fd());
                return;
            }
            Channel::Socket(socket) if how & WAIT_POLL != 0 => {
                pipe.counters.system_calls += 1;
                self.peer_left |= !socket.notify();
            }
            _ => {}
        }
        if how & WAIT_FUTEX != 0 {
            pipe.counters.system_calls += 1;
            let word = self.memory.own().position.atomic();
            // An error would mean that nothing waits there.
            let _woken = futex::wake(word, futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    /// Returns when the peer's position is another one than was seen last, the peer is gone, or another polled
    /// descriptor has an event.
    pub(crate) fn sleep(&mut self, pipe: &mut PipeEnd) -> io::Result<()> {
        let seen = self.cursor.seen();
        let peer = self.memory.peer();
        let moved = || peer.position.load(Acquire) != seen;
        if self.spin.until(moved, &mut pipe.counters) {
            return Ok(());
        }
        pipe.counters.sleeps += 1;
        if self.coalescing.is_due() {
            let how = WAIT_FUTEX | WAIT_COALESCED;
            let changed = self.sleep_in_futex(how, COALESCED_TIMEOUT, &mut pipe.counters)?;
            let arrived = self.memory.peer().position.load(Acquire).wrapping_sub(seen);
            // Without any bytes there is nothing to learn: waking at once would not have been better or worse.
            if arrived != 0 {
                self.coalescing.learn(arrived >= self.coalesced_mark());
            }
            if changed {
                return Ok(());
            }
        }
        if self.sleep_in_futex(WAIT_FUTEX, FUTEX_TIMEOUT, &mut pipe.counters)? {
            return Ok(());
        }
        if !self.arm() {
            pipe.counters.system_calls += 1;
            wait(pipe.as_fd())?;
        }
        self.disarm(pipe);
        Ok(())
    }

    /// Sleeps in a futex, no longer than `timeout`; whether anything changed.
    fn sleep_in_futex(
        &mut self,
        how: u32,
        timeout: Timespec,
        counters: &mut Counters,
    ) -> io::Result<bool> {
        protocol::announce_sleep::<_, FullFence>(self.memory.own(), how);
        let slept = match self.channel {
            Channel::Kernel(_) => {
                self.wait_for_two_words(timeout, counters);
                Ok(())
            }
            Channel::Socket(_) => self.wait_for_position(timeout, counters),
        };
        protocol::announce_awake(self.memory.own());
        slept.map(|()| self.has_changed())
    }

    /// Waits for the peer's position and for the word that the kernel changes when it acts on the ring.
    fn wait_for_two_words(&self, timeout: Timespec, counters: &mut Counters) {
        let deadline = now().and_then(|now| now.checked_add(timeout));
        loop {
            let event = self.memory.word(control::EVENT);
            if self.has_changed() {
                return;
            }
            let words = [
                (self.memory.peer().position.atomic(), self.cursor.seen()),
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
            match futex::waitv(&waits, flags, deadline.as_ref(), ClockId::Monotonic) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                // The timeout, or a system call that is forbidden; poll(2) follows.
                Err(_) => return,
            }
        }
    }

    fn wait_for_position(&self, timeout: Timespec, counters: &mut Counters) -> io::Result<()> {
        while !self.has_changed() {
            counters.system_calls += 1;
            let word = self.memory.peer().position.atomic();
            let seen = self.cursor.seen();
            match futex::wait(word, futex::Flags::empty(), seen, Some(&timeout)) {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::TIMEDOUT) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Whether there is a reason not to sleep.
    fn has_changed(&self) -> bool {
        self.peer_left
            || self.memory.peer().position.load(Acquire) != self.cursor.seen()
            || self.has_closed()
            || self.check_alive().is_err()
    }

    /// Counts an attempt that found nothing and does not sleep. True if it is time for system calls: then the
    /// peer was probed.
    pub(crate) fn note_miss(&mut self, pipe: &mut PipeEnd) -> bool {
        let seen = self.cursor.seen();
        self.misses = match self.misses {
            (times, last) if last == seen => (times.wrapping_add(1), seen),
            _ => (1, seen),
        };
        let is_due = self.misses.0.is_multiple_of(MISSES_PER_PROBE);
        if is_due {
            self.probe_peer(pipe);
        }
        is_due
    }

    /// Announces that this end polls; true if there is no need to. In the kernel's ring the kernel sees who
    /// polls the pipe.
    pub(crate) fn arm(&mut self) -> bool {
        if let Channel::Socket(_) = self.channel {
            self.armed = true;
            protocol::announce_sleep::<_, FullFence>(self.memory.own(), WAIT_POLL);
        }
        self.has_changed()
    }

    /// Announces that this end does not poll any more, and takes the notifications from the socket.
    pub(crate) fn disarm(&mut self, pipe: &mut PipeEnd) {
        if std::mem::take(&mut self.armed) {
            protocol::announce_awake(self.memory.own());
            self.probe_peer(pipe);
        }
    }

    /// Whether this end was armed and has not been disarmed.
    pub(crate) fn is_armed(&self) -> bool {
        self.armed
    }
}

/// CLOCK_MONOTONIC. rustix's function panics without a vDSO, as in User Mode Linux.
fn now() -> Option<Timespec> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call writes one timespec, to `now`.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (answer == 0).then_some(Timespec {
        tv_sec: now.tv_sec,
        tv_nsec: now.tv_nsec,
    })
}
