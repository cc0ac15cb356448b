//! What the tests of both ends in one process share.

#[path = "random.rs"]
mod random;

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use random::Random;

/// Whether polling for reading returns at once.
pub fn is_ready(fd: &impl AsFd) -> bool {
    is_ready_within(fd, Duration::ZERO)
}

/// Whether polling for reading returns because of an event, within `limit`.
pub fn is_ready_within(fd: &impl AsFd, limit: Duration) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let limit = Timespec::try_from(limit).expect("a time");
    poll(&mut fds, Some(&limit)).expect("polled") != 0
}
