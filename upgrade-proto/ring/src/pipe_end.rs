//! A handle's end of the pipe, the set of descriptors that it polls, and its statistics.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{FileType, Stat, fstat};
use rustix::io::Errno;

use crate::channel::{ControlChannel, Received};
use crate::counters::Counters;
use crate::kernel::{self, PendingRing};
use crate::memory::Role;
use crate::options::{Options, Transport};
use crate::pipe::wait;

#[derive(Debug)]
pub(crate) struct PipeEnd {
    pub fd: OwnedFd,
    /// The epoll instance for everything that this end waits for; `None` if the file cannot be polled (it is
    /// always ready, and has no ring).
    epoll: Option<OwnedFd>,
    pub options: Options,
    pub counters: Counters,
    /// The ring in use, or the last one that was.
    pub last_ring: Option<Transport>,
    owner_pid: u32,
}

impl PipeEnd {
    /// Polls the pipe for `events`.
    pub(crate) fn new(fd: OwnedFd, options: &Options, events: EventFlags) -> io::Result<Self> {
        options.check()?;
        let set = epoll::create(CreateFlags::CLOEXEC)?;
        let epoll = match epoll::add(&set, &fd, EventData::new_u64(0), events) {
            Ok(()) => Some(set),
            Err(Errno::PERM) => None,
            Err(errno) => return Err(errno.into()),
        };
        Ok(Self {
            fd,
            epoll,
            options: options.clone(),
            counters: Counters::default(),
            last_ring: None,
            owner_pid: std::process::id(),
        })
    }

    /// Whether a ring can take its place: it is a pipe or a FIFO.
    pub(crate) fn may_have_ring(&self) -> io::Result<bool> {
        let kind = FileType::from_raw_mode(fstat(&self.fd)?.st_mode);
        Ok(kind == FileType::Fifo && self.epoll.is_some())
    }

    /// Asks for the kernel's ring, if the caller wants that.
    pub(crate) fn ask_for_kernel_ring(&self, role: Role) -> Option<PendingRing> {
        if !self.options.kernel {
            return None;
        }
        let size = self.options.size_bytes.into();
        kernel::ask(self.fd.as_fd(), role, size).ok()
    }

    /// Whether this process's messages of errors go to the pipe, too. They would not be where they belong beside a ring:
    /// the consumer takes what is in the pipe before it begins with a shared one, and when that is empty; write(2) fails
    /// while the kernel's is mapped.
    pub(crate) fn is_standard_error(&self) -> bool {
        let file = |stat: Stat| (stat.st_dev, stat.st_ino);
        match (fstat(&self.fd), fstat(io::stderr())) {
            (Ok(pipe), Ok(stderr)) => file(pipe) == file(stderr),
            _ => false,
        }
    }

    /// Polls another descriptor, for reading. Closing it ends that.
    pub(crate) fn watch(&self, other: impl AsFd) -> io::Result<()> {
        self.change(|set| epoll::add(set, &other, EventData::new_u64(0), EventFlags::IN))
    }

    /// Stops polling a descriptor, or the pipe itself, even for its hang-up.
    pub(crate) fn unwatch(&self, known: impl AsFd) -> io::Result<()> {
        self.change(|set| epoll::delete(set, &known))
    }

    /// Polls the pipe for `events`; for none, still for its hang-up.
    pub(crate) fn watch_pipe(&self, events: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(0);
        self.change(|set| match epoll::modify(set, &self.fd, data, events) {
            Err(Errno::NOENT) => epoll::add(set, &self.fd, data, events),
            other => other,
        })
    }

    fn change(&self, change: impl FnOnce(&OwnedFd) -> Result<(), Errno>) -> io::Result<()> {
        match self.epoll.as_ref().map_or(Ok(()), change) {
            // It is so already.
            Ok(()) | Err(Errno::EXIST | Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for an event at anything that is polled.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        self.counters.sleeps += 1;
        self.counters.system_calls += 1;
        match &self.epoll {
            Some(set) => wait(set.as_fd()),
            None => Err(Errno::AGAIN.into()),
        }
    }

    /// Receives a message from a peer that negotiates.
    pub(crate) fn receive(&mut self, channel: &ControlChannel) -> Received {
        self.counters.system_calls += 1;
        channel.receive()
    }

    /// Notes that a ring replaces the pipe.
    pub(crate) fn note_ring(&mut self, transport: Transport) {
        self.counters.upgrades += 1;
        self.last_ring = Some(transport);
    }

    /// False in a forked child, which has no ring: the parent goes on using it.
    pub(crate) fn is_owner(&self) -> bool {
        std::process::id() == self.owner_pid
    }
}

impl AsFd for PipeEnd {
    /// The descriptor to poll.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_ref().unwrap_or(&self.fd).as_fd()
    }
}

/// Calls `step` every millisecond until it returns true or the time is over.
pub(crate) fn retry(limit: Duration, mut step: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    // A limit beyond the clock's range is no limit.
    let deadline = Instant::now().checked_add(limit);
    while !step()? {
        let left = deadline.map_or(Duration::MAX, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        if left.is_zero() {
            break;
        }
        // Polling would not help: the pipe is ready all the time.
        std::thread::sleep(left.min(Duration::from_millis(1)));
    }
    Ok(())
}
