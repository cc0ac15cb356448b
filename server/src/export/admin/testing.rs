//! Both sides of an admin socket on a connection of the caller's, for fuzz targets (`tests/fuzz`).
//!
//! Only in builds with the feature `testing`.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::client::exchange;
use super::protocol::{Command, ExportStatus, Resized, understand};
use super::server::{self, Service};

/// Answers a client on its connection.
///
/// # Errors
///
/// When the client does not say what it wants, or does not take the answer.
pub fn answer(stream: UnixStream, service: &impl Service) -> io::Result<()> {
    server::answer_one(stream, service)
}

/// Asks how an export is.
///
/// # Errors
///
/// What the server says, or that it says nothing sensible.
pub fn stat(stream: &UnixStream, limit: Duration) -> Result<ExportStatus> {
    understand(&exchange(
        stream,
        (Command::Stat {}, &[]),
        Instant::now() + limit,
        || {},
    )?)
}

/// Asks for another size.
///
/// # Errors
///
/// As for [`stat`].
pub fn resize(stream: &UnixStream, limit: Duration) -> Result<Resized> {
    let command = Command::Resize {
        size_bytes: None,
        shrink: false,
    };
    understand(&exchange(
        stream,
        (command, &[]),
        Instant::now() + limit,
        || {},
    )?)
}
