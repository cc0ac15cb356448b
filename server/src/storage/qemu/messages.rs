//! What keeper and server say to each other, and waiting for it.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::engine::line::read_line;
use crate::engine::{SnapshotProgress, SnapshotStep};

/// No order is longer.
const ORDER_BYTES: usize = 64;

/// How long a server may take to send one that it has begun to send.
pub(super) const ORDER_LIMIT: Duration = Duration::from_secs(1);

/// What the keeper tells its server, a line of JSON each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Told {
    /// The daemon serves the disk.
    Ready,
    /// It has ended, or was never there.
    Ended(String),
    /// The answer to an order.
    Answer(Answer),
}

/// What became of an order, or why it was not done.
pub(super) type Answer = Result<SnapshotProgress, String>;

impl Told {
    /// How the daemon ended, if that is told.
    pub(super) fn end(self) -> Option<String> {
        match self {
            Self::Ended(why) => Some(why),
            _ => None,
        }
    }
}

/// What a server can have done, a line of JSON each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Order {
    /// Give the disk another size.
    Resize(u64),
    /// A step of a snapshot.
    Snapshot(SnapshotStep),
}

/// Tells the server something.
pub(super) fn tell(mut server: &UnixStream, told: &Told) -> io::Result<()> {
    let line = serde_json::to_string(told)?;
    server.write_all(format!("{line}\n").as_bytes())
}

/// What comes from the server.
pub(super) enum Heard {
    /// What it wants.
    Order(Order),
    /// Nothing in time.
    Nothing,
    /// Its end.
    Gone,
}

/// What the server says until then. What is no order is refused.
pub(super) fn hear(server: &UnixStream, until: Instant) -> io::Result<Heard> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Heard::Nothing);
        }
        if wait(&[server.as_fd()], left)?.is_none() {
            continue;
        }
        let line = read_line(server, ORDER_BYTES, Instant::now() + ORDER_LIMIT);
        let line = match line {
            Ok((line, _)) if !line.is_empty() => line,
            _ => return Ok(Heard::Gone),
        };
        match serde_json::from_str(&line) {
            Ok(order) => return Ok(Heard::Order(order)),
            Err(error) => {
                let why = format!("not an order: {error}");
                let _ = tell(server, &Told::Answer(Err(why)));
            }
        }
    }
}

/// Waits until one of these can be read or is at its end; which one. A signal may end it early.
pub(super) fn wait(fds: &[BorrowedFd<'_>], limit: Duration) -> io::Result<Option<usize>> {
    let mut fds: Vec<_> = (fds.iter())
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    match poll(&mut fds, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(fds.iter().position(|fd| !fd.revents().is_empty()))
}
