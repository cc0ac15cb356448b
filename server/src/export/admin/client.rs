//! The client's side of an admin socket.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use upgrade_proto::{Peer, connect_within};

use super::protocol::{
    Changed, Command, ExportStatus, Left, MAX_ANSWER_BYTES, NewExport, OPEN_INTERVAL, OPEN_LIMIT,
    Opened, Request, Resized, ServerStatus, Stopped, StreamLine, Wanted, Wants, answer_with,
    understand,
};
use crate::door::ublk::openers_of;
use crate::engine::line::{read_line, send_line};
use crate::engine::wait::repeat_while;
use crate::engine::{SnapshotProgress, SnapshotStep};

/// What takes longer than this is a delay.
const DELAY: Duration = Duration::from_secs(5);

/// Asks the export whose admin socket is `path` how it is.
///
/// # Errors
///
/// When there is no answer within `limit`.
pub fn stat(path: &Path, limit: Duration) -> Result<ExportStatus> {
    ask(path, Command::Stat {}, limit)
}

/// Tells the export whose admin socket is `path` to stop, and waits until it has. `on_delay` is called once if that
/// takes long.
///
/// # Errors
///
/// When the export is in use, unless `force` is true; when there is no answer within `limit`.
pub fn stop(path: &Path, force: bool, limit: Duration, on_delay: impl FnOnce()) -> Result<()> {
    let openers = match force {
        true => None,
        false => seen_openers(path),
    };
    let command = Command::Stop { force, openers };
    let Stopped { stopped: _ } = ask_patiently(path, (command, &[]), limit, on_delay)?;
    Ok(())
}

/// The processes that have the block device of an export open, empty if none is seen; a moment is waited for them to
/// close it. `None` if the server does not say what the device is.
fn seen_openers(path: &Path) -> Option<String> {
    let device = stat(path, DELAY).ok()?.ublk.map(|door| door.device);
    let openers = device.and_then(|device| {
        let look = || openers_of(&device);
        repeat_while(OPEN_LIMIT, OPEN_INTERVAL, look, Option::is_some)
    });
    Some(openers.unwrap_or_default())
}

/// Tells the export whose admin socket is `path` to hand over to another server, and waits until it
/// has.
///
/// # Errors
///
/// When no other server could take the export over, or there is no answer within `limit`.
pub fn leave(path: &Path, limit: Duration) -> Result<()> {
    let Left { left: _ } = ask(path, Command::Leave {}, limit)?;
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

/// Has an export do a step of a snapshot.
///
/// # Errors
///
/// When the server refuses or does not answer.
pub fn snapshot(path: &Path, step: SnapshotStep, limit: Duration) -> Result<SnapshotProgress> {
    ask(path, Command::Snapshot { step }, limit)
}

/// The process that answers at an admin socket, as the kernel tells it.
///
/// # Errors
///
/// When it cannot be connected to.
pub fn server_process(path: &Path, limit: Duration) -> Result<i32> {
    Ok(Peer::of(&connect_within(path, limit)?)?.pid)
}

/// Changes options of an export while it is served.
///
/// # Errors
///
/// When the server refuses or does not answer.
pub fn set(path: &Path, options: BTreeMap<String, String>, limit: Duration) -> Result<()> {
    let Changed { changed: _ } = ask(path, Command::Set { options }, limit)?;
    Ok(())
}

/// Asks the server whose admin socket is `path` what it is.
///
/// # Errors
///
/// When there is no answer within `limit`.
pub fn server(path: &Path, limit: Duration) -> Result<ServerStatus> {
    ask(path, Command::Server {}, limit)
}

/// What the client of `add` does for the server.
pub trait Help {
    /// Opens something.
    ///
    /// # Errors
    ///
    /// Why not.
    fn open(&mut self, server: Peer, wanted: Wanted) -> Result<Option<OwnedFd>>;

    /// Takes back what is there for a moment only: the server has used it, or does not.
    fn settle(&mut self);
}

/// For how long what was opened stays there if the server says nothing.
const SETTLED: Duration = Duration::from_secs(5);

/// Has the server whose admin socket is `path` serve one more export, with what was opened for it, and waits until it does.
/// `help` opens what the server wants while it opens the export.
///
/// # Errors
///
/// When the server refuses, or does not answer within `limit`; it may serve the export later then.
pub fn add(
    path: &Path,
    new: NewExport,
    descriptors: &[BorrowedFd<'_>],
    limit: Duration,
    mut help: impl Help,
) -> Result<ExportStatus> {
    let deadline = Instant::now() + limit;
    let in_time = |error| no_answer(error, limit);
    let stream = connect_within(path, limit).map_err(in_time)?;
    stream.set_write_timeout(Some(limit))?;
    let server = Peer::of(&stream)?;
    let command = Command::Add(new.into());
    let mut line = exchange(&stream, (command, descriptors), deadline, || {}).map_err(in_time)?;
    while let Ok(Wants { wants }) = serde_json::from_str(&line) {
        let (answer, opened) = match help.open(server, wants) {
            Ok(opened) => (Ok(Opened { opened: true }), opened),
            Err(error) => (Err(error), None),
        };
        let descriptors: Vec<_> = opened.iter().map(AsFd::as_fd).collect();
        let answer = answer_with(answer)?;
        send_line(&stream, format!("{answer}\n").as_bytes(), &descriptors)?;
        let settled = Timespec::try_from(SETTLED).map_err(io::Error::other)?;
        // Early or late, it says something more.
        let _ = poll(&mut [PollFd::new(&stream, PollFlags::IN)], Some(&settled));
        help.settle();
        line = answer_line(&stream, deadline).map_err(in_time)?;
    }
    understand(&line)
}

/// The lines of an event stream.
#[derive(Debug)]
pub struct Watch {
    /// The first line, until it is taken.
    begin: Option<String>,
    lines: BufReader<UnixStream>,
}

/// Watches the events of the server or export whose admin socket is `path`. The lines are as they come; the first
/// tells that the stream begins.
///
/// # Errors
///
/// When it does not begin within `limit`.
pub fn watch(path: &Path, export: Option<&str>, limit: Duration) -> Result<Watch> {
    let mut stream = connect_within(path, limit)?;
    stream.set_write_timeout(Some(limit))?;
    let request = Request {
        export: export.map(str::to_owned),
        command: Command::Events {},
    };
    stream.write_all(format!("{}\n", request.line()?).as_bytes())?;
    stream.set_read_timeout(Some(limit))?;
    let mut watch = Watch {
        begin: None,
        lines: BufReader::new(stream),
    };
    let begin = watch.next().context("it hung up")??;
    let _: StreamLine = understand(&begin)?;
    watch.begin = Some(begin);
    watch.lines.get_ref().set_read_timeout(None)?;
    Ok(watch)
}

impl Iterator for Watch {
    type Item = io::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(begin) = self.begin.take() {
            return Some(Ok(begin));
        }
        let mut line = String::new();
        let limit = u64::try_from(MAX_ANSWER_BYTES).unwrap_or(u64::MAX);
        match (&mut self.lines).take(limit).read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(Ok(line.trim_end_matches('\n').to_owned())),
            Err(error) => Some(Err(error)),
        }
    }
}

fn ask<A: for<'a> Deserialize<'a>>(path: &Path, command: Command, limit: Duration) -> Result<A> {
    ask_patiently(path, (command, &[]), limit, || {})
}

/// Asks, with descriptors beside the command.
fn ask_patiently<A: for<'a> Deserialize<'a>>(
    path: &Path,
    asked: (Command, &[BorrowedFd<'_>]),
    limit: Duration,
    on_delay: impl FnOnce(),
) -> Result<A> {
    let deadline = Instant::now() + limit;
    let line = connect_within(path, limit).and_then(|stream| {
        stream.set_write_timeout(Some(limit))?;
        exchange(&stream, asked, deadline, on_delay)
    });
    understand(&line.map_err(|error| no_answer(error, limit))?)
}

fn no_answer(error: io::Error, limit: Duration) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => anyhow!("no answer within {} s", limit.as_secs_f32()),
        _ => error.into(),
    }
}

/// The answer to a command on a connection. Calls `on_delay` if it does not come soon.
pub(super) fn exchange(
    stream: &UnixStream,
    (command, descriptors): (Command, &[BorrowedFd<'_>]),
    deadline: Instant,
    on_delay: impl FnOnce(),
) -> io::Result<String> {
    let line = format!("{}\n", Request::from(command).line()?);
    match send_line(stream, line.as_bytes(), descriptors) {
        // A server that is busy has answered already.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    let delay = DELAY.min(deadline.saturating_duration_since(Instant::now()));
    let delay = Timespec::try_from(delay).map_err(io::Error::other)?;
    if poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&delay)) == Ok(0) {
        on_delay();
    }
    answer_line(stream, deadline)
}

fn answer_line(stream: &UnixStream, deadline: Instant) -> io::Result<String> {
    let (line, _) = read_line(stream, MAX_ANSWER_BYTES, deadline)?;
    match line.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(line),
    }
}
