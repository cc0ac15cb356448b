//! What the tests of both ends in one process share.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

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

/// A generator of pseudo-random numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
