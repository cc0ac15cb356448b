//! Reads and writes of the pipe itself that do or do not wait, independent of O_NONBLOCK.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2, read, retry_on_intr, write};

/// The offset that means the current position.
const HERE: u64 = u64::MAX;

/// A write of no more than this is all or nothing (pipe(7)).
const ATOMIC_BYTES: usize = 4096;

/// Whether to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Wait, unless the descriptor has O_NONBLOCK.
    Wait,
    /// Do not wait.
    Now,
}

fn events_now(pipe: BorrowedFd<'_>, events: PollFlags) -> Result<PollFlags, Errno> {
    let mut fds = [PollFd::from_borrowed_fd(pipe, events)];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(fds[0].revents())
}

/// Waits until the descriptor is writable, or for a signal.
pub(crate) fn wait_for_room(pipe: BorrowedFd<'_>) -> io::Result<()> {
    wait_for(pipe, PollFlags::OUT)
}

/// Waits until the descriptor is readable, or for a signal.
pub(crate) fn wait(ready: BorrowedFd<'_>) -> io::Result<()> {
    wait_for(ready, PollFlags::IN)
}

fn wait_for(fd: BorrowedFd<'_>, events: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, events)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether the other end is closed.
pub(crate) fn is_broken(pipe: BorrowedFd<'_>) -> bool {
    events_now(pipe, PollFlags::empty())
        .is_ok_and(|events| events.intersects(PollFlags::ERR | PollFlags::HUP))
}

/// Makes an attempt, again after a signal; `None` if it would wait.
fn attempt(make: impl FnMut() -> Result<usize, Errno>) -> io::Result<Option<usize>> {
    match retry_on_intr(make) {
        Ok(count) => Ok(Some(count)),
        Err(Errno::AGAIN) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The result of a call with RWF_NOWAIT, or, for a kind of file without that (a FIFO, a terminal), of `plain` if the
/// file is ready for it.
fn or_if_ready(
    result: Result<usize, Errno>,
    pipe: BorrowedFd<'_>,
    events: PollFlags,
    plain: impl FnOnce() -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    match result {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::SPIPE | Errno::INVAL) => {
            match events_now(pipe, events)?.is_empty() {
                true => Err(Errno::AGAIN),
                false => plain(),
            }
        }
        other => other,
    }
}

/// Reads; `None` if it would wait.
pub(crate) fn read_some(
    pipe: BorrowedFd<'_>,
    buffer: &mut [u8],
    mode: Mode,
) -> io::Result<Option<usize>> {
    attempt(|| match mode {
        Mode::Wait => read(pipe, &mut *buffer),
        Mode::Now => {
            let buffers = &mut [IoSliceMut::new(buffer)];
            let result = preadv2(pipe, buffers, HERE, ReadWriteFlags::NOWAIT);
            or_if_ready(result, pipe, PollFlags::IN, || read(pipe, &mut *buffer))
        }
    })
}

/// Writes; `None` if it would wait.
pub(crate) fn write_some(
    pipe: BorrowedFd<'_>,
    bytes: &[u8],
    mode: Mode,
) -> io::Result<Option<usize>> {
    // poll(2) promises this much.
    let part = &bytes[..bytes.len().min(ATOMIC_BYTES)];
    attempt(|| match mode {
        Mode::Wait => write(pipe, bytes),
        Mode::Now => {
            let result = pwritev2(pipe, &[IoSlice::new(bytes)], HERE, ReadWriteFlags::NOWAIT);
            or_if_ready(result, pipe, PollFlags::OUT, || write(pipe, part))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn now_never_waits_and_changes_no_flags() {
        let (reader, writer) = io::pipe().expect("a pipe");
        let mut buffer = [0; 8];
        assert_eq!(
            read_some(reader.as_fd(), &mut buffer, Mode::Now).expect("asked"),
            None
        );
        let page = [7; 4096];
        let mut written = 0;
        while let Some(count) = write_some(writer.as_fd(), &page, Mode::Now).expect("written") {
            written += count;
        }
        assert!(written >= 65536, "{written}");
        let flags = rustix::fs::fcntl_getfl(&writer).expect("flags");
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
        assert_eq!(
            read_some(reader.as_fd(), &mut buffer, Mode::Now).expect("read"),
            Some(8)
        );
        assert!(!is_broken(writer.as_fd()));
        drop(reader);
        assert!(is_broken(writer.as_fd()));
        let error = write_some(writer.as_fd(), &page, Mode::Now).expect_err("broken");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
