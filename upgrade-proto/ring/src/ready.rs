//! One descriptor to poll for everything that an end waits for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

/// Readable while one of the watched descriptors has what it is watched for, or is gone.
#[derive(Debug)]
pub(crate) struct Ready(OwnedFd);

impl Ready {
    /// Watches `first`; `None` if it is of a kind that is always ready and cannot be watched.
    pub(crate) fn watching(first: impl AsFd, what: EventFlags) -> Result<Option<Self>, Errno> {
        let this = Self(epoll::create(CreateFlags::CLOEXEC)?);
        match epoll::add(&this.0, first, EventData::new_u64(0), what) {
            Ok(()) => Ok(Some(this)),
            Err(Errno::PERM) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Watches one more. Closing it ends that.
    pub(crate) fn add(&self, other: impl AsFd) -> Result<(), Errno> {
        epoll::add(&self.0, other, EventData::new_u64(0), EventFlags::IN)
    }

    /// Watches `known` for something else; with nothing, still for its end.
    pub(crate) fn change(&self, known: impl AsFd, what: EventFlags) -> Result<(), Errno> {
        epoll::modify(&self.0, known, EventData::new_u64(0), what)
    }

    /// Watches `known` no more, not even for its end.
    pub(crate) fn forget(&self, known: impl AsFd) -> Result<(), Errno> {
        epoll::delete(&self.0, known)
    }
}

impl AsFd for Ready {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
