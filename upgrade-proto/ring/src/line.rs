//! What both ends have beside a ring: the pipe, and how they wait for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use crate::counters::Counters;
use crate::memory::{Memory, Role};
use crate::pipe::wait;
use crate::ready::Ready;
use crate::{Options, Way, kernel};

#[derive(Debug)]
pub(crate) struct Line {
    pub pipe: OwnedFd,
    /// For everything that this end waits for; nothing if the file is always ready.
    pub ready: Option<Ready>,
    pub options: Options,
    pub counters: Counters,
    pub last_ring: Option<Way>,
    owner_pid: u32,
}

impl Line {
    /// Watches the pipe for what this end does with it.
    pub(crate) fn new(pipe: OwnedFd, options: &Options, what: EventFlags) -> io::Result<Self> {
        options.check()?;
        let ready = Ready::watching(&pipe, what)?;
        Ok(Self {
            pipe,
            ready,
            options: options.clone(),
            counters: Counters::default(),
            last_ring: None,
            owner_pid: std::process::id(),
        })
    }

    /// This side of the kernel's ring, if there is one and it may be used.
    pub(crate) fn ask_kernel(&self, role: Role) -> Option<Memory> {
        if !self.options.kernel {
            return None;
        }
        let size = self.options.size_bytes.into();
        kernel::open(self.pipe.as_fd(), role, size).ok()
    }

    /// Waits until something happens at what is watched.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        self.counters.sleeps += 1;
        self.counters.system_calls += 1;
        match &self.ready {
            Some(ready) => wait(ready.as_fd()),
            None => Err(Errno::AGAIN.into()),
        }
    }

    /// A ring takes the pipe's place.
    pub(crate) fn note_ring(&mut self, way: Way) {
        self.counters.upgrades += 1;
        self.last_ring = Some(way);
    }

    /// False in a forked child: it has no ring, and its parent goes on with it.
    pub(crate) fn is_ours(&self) -> bool {
        std::process::id() == self.owner_pid
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.ready {
            Some(ready) => ready.as_fd(),
            None => self.pipe.as_fd(),
        }
    }
}

/// Calls `step` until it says that nothing is left to wait for, or the time is over.
pub(crate) fn repeat(
    limit: Duration,
    mut step: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
    // Beyond what the clock can say is for ever.
    let deadline = Instant::now().checked_add(limit);
    while !step()? {
        let left = deadline.map_or(Duration::MAX, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        if left.is_zero() {
            break;
        }
        // The pipe is ready all the time, which is of no interest here.
        std::thread::sleep(left.min(Duration::from_millis(1)));
    }
    Ok(())
}
