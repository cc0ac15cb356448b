//! A split ring on the driver's side.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::VringConfigData;
use vmm_sys_util::eventfd::EventFd;

use super::{Memory, USER_BASE};
use crate::wait::{PATIENCE, eventually};

/// A ring on the driver's side. Its parts are spaced for the largest size used here.
#[derive(Debug)]
pub struct Vring {
    /// Its number.
    pub index: usize,
    /// Its entries.
    pub size: u16,
    /// Where the descriptor table is.
    pub descriptors: u64,
    /// Where the available ring is.
    pub available: u64,
    /// Where the used ring is.
    pub used: u64,
    /// The driver's available index.
    pub next_available: u16,
    /// The next used entry to be read.
    pub next_used: u16,
    /// Tells the device.
    pub kick: EventFd,
    /// Told by the device.
    pub call: EventFd,
    /// Told by the device when the ring is broken.
    pub error: EventFd,
    /// Whether `VIRTIO_RING_F_EVENT_IDX` was accepted.
    pub event_index: bool,
    /// Kicks so far.
    pub kicks: u64,
}

impl Vring {
    /// An empty ring.
    #[must_use]
    pub fn new(index: usize, size: u16) -> Self {
        let base = 0x1_0000 * (index as u64);
        Self {
            index,
            size,
            descriptors: base,
            available: base + 0x8000,
            used: base + 0xa000,
            next_available: 0,
            next_used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            error: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            event_index: false,
            kicks: 0,
        }
    }

    /// Where it is, as the device is told; its used ring is not to be logged.
    #[must_use]
    pub fn addresses(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: USER_BASE + self.descriptors,
            used_ring_addr: USER_BASE + self.used,
            avail_ring_addr: USER_BASE + self.available,
            log_addr: None,
        }
    }

    /// Makes a chain available without a kick.
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        memory
            .word(self.available + 4 + 2 * entry)
            .store(head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        memory
            .word(self.available + 2)
            .store(self.next_available, Ordering::Release);
    }

    /// Kicks if the device wants it, as it was after `old` (the index before the offers).
    pub fn kick_if_wanted(&mut self, memory: &Memory, old: u16) {
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let at = self.used + 4 + 8 * u64::from(self.size);
            let event = memory.word(at).load(Ordering::Relaxed);
            let new = self.next_available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            memory.word(self.used).load(Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kicks += 1;
            self.kick.write(1).unwrap();
        }
    }

    /// Waits until the device sleeps and has taken everything that was offered. Needs the event
    /// index, which says up to where it looked.
    pub fn wait_taken(&self, memory: &Memory) {
        assert!(self.event_index);
        let at = self.used + 4 + 8 * u64::from(self.size);
        eventually("the device takes what was offered", || {
            memory.word(at).load(Ordering::Acquire) == self.next_available
        });
    }

    /// The device's used index.
    #[must_use]
    pub fn used_index(&self, memory: &Memory) -> u16 {
        memory.word(self.used + 2).load(Ordering::Acquire)
    }

    /// The next used entry if there is one: head and length.
    pub fn reap(&mut self, memory: &Memory) -> Option<(u32, u32)> {
        if self.used_index(memory) == self.next_used {
            return None;
        }
        let entry = u64::from(self.next_used % self.size);
        let bytes = memory.get(self.used + 4 + 8 * entry, 8);
        self.next_used = self.next_used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Sleeps until the device has returned something, woken by nothing but its notification.
    pub fn wait(&mut self, memory: &Memory) -> (u32, u32) {
        loop {
            if self.event_index {
                let at = self.available + 4 + 2 * u64::from(self.size);
                memory.word(at).store(self.next_used, Ordering::Relaxed);
                fence(Ordering::SeqCst);
            }
            if let Some(entry) = self.reap(memory) {
                return entry;
            }
            assert!(readable(&self.call, PATIENCE), "no notification came");
            self.call.read().unwrap();
        }
    }
}

/// Whether an event arrives within the limit.
///
/// # Panics
/// The descriptor cannot be polled.
#[must_use]
pub fn readable(fd: &EventFd, limit: Duration) -> bool {
    // SAFETY: the descriptor stays open during the borrow.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let limit = Timespec::try_from(limit).unwrap();
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&limit),
    )
    .unwrap()
        > 0
}
