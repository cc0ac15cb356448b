//! The client's side of an admin socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::protocol::{Command, ExportStatus, Left, MAX_ANSWER_BYTES, Refused, Resized, Stopped};

/// Asks the export whose admin socket is `path` how it is.
///
/// # Errors
///
/// When there is no answer within `limit`.
pub fn stat(path: &Path, limit: Duration) -> Result<ExportStatus> {
    ask(path, Command::Stat, limit)
}

/// Tells the export whose admin socket is `path` to stop, and waits until it has.
///
/// # Errors
///
/// When the export is in use, unless `force` is true; when there is no answer within `limit`.
pub fn stop(path: &Path, force: bool, limit: Duration) -> Result<()> {
    let Stopped { stopped: _ } = ask(path, Command::Stop { force }, limit)?;
    Ok(())
}

/// Tells the export whose admin socket is `path` to hand over to another server, and waits until it
/// has.
///
/// # Errors
///
/// When no other server could take the export over, or there is no answer within `limit`.
pub fn leave(path: &Path, limit: Duration) -> Result<()> {
    let Left { left: _ } = ask(path, Command::Leave, limit)?;
    Ok(())
}

/// Gives an export another size.
///
/// # Errors
///
/// When the server refuses or does not answer.
pub fn resize(
    path: &Path,
    size_bytes: Option<u64>,
    shrink: bool,
    limit: Duration,
) -> Result<Resized> {
    ask(path, Command::Resize { size_bytes, shrink }, limit)
}

fn ask<A: for<'a> Deserialize<'a>>(path: &Path, command: Command, limit: Duration) -> Result<A> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    (&stream).write_all(format!("{}\n", serde_json::to_string(&command)?).as_bytes())?;
    let mut line = String::new();
    match BufReader::new((&stream).take(MAX_ANSWER_BYTES)).read_line(&mut line) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            bail!("no answer within {} s", limit.as_secs())
        }
        Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        other => other?,
    };
    if let Ok(Refused { error }) = serde_json::from_str(&line) {
        bail!("{error}");
    }
    serde_json::from_str(&line).context("the answer makes no sense (another version?)")
}
