//! The events that a client watches, as lines. A client that does not read holds up its own thread and nothing else.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;

use super::protocol::{SCHEMA, StreamLine};
use crate::engine::events::{Item, Reader};

/// Lines are written together up to about this size.
const PIECE_BYTES: usize = 4 << 10;

/// Sends events until the client hangs up or the reader is ended.
///
/// # Errors
///
/// What the system said of the connection.
pub(super) fn send(mut stream: &UnixStream, events: &Reader) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut unsent = Vec::new();
    add_line(
        &mut unsent,
        &StreamLine::Begin {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
        },
    )?;
    let mut listens = true;
    loop {
        // While the client reads slowly, only room or the end is waited for.
        events.quiet();
        // Asked first: what was told before the end is sent.
        let is_last = events.is_ended();
        let mut has_all = false;
        while !has_all && unsent.len() < PIECE_BYTES {
            match events.next() {
                Some(Item::Event(event)) => add_line(&mut unsent, &event)?,
                Some(Item::Lost(count)) => add_line(&mut unsent, &StreamLine::Lost { count })?,
                None => has_all = true,
            }
        }
        match stream.write(&unsent) {
            _ if unsent.is_empty() => {}
            Ok(count) => drop(unsent.drain(..count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_last => {}
            Err(error) => return Err(error),
        }
        match (unsent.is_empty(), has_all) {
            (true, true) if is_last => return Ok(()),
            (true, false) => continue,
            _ => {}
        }
        // A connection that was closed is told whatever is asked for.
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::OUT, !unsent.is_empty());
        wanted.set(PollFlags::IN, listens);
        let mut both = [
            PollFd::new(stream, wanted),
            PollFd::new(events, PollFlags::IN),
        ];
        match poll(&mut both, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let told = both[0].revents();
        if told.intersects(PollFlags::HUP | PollFlags::ERR) {
            return Ok(());
        }
        if told.contains(PollFlags::IN) {
            // It has nothing to say. One that closes its side only, as `nc` does, still reads.
            listens = stream.read(&mut [0; 4096])? > 0;
        }
    }
}

fn add_line(to: &mut Vec<u8>, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *to, line)?;
    to.push(b'\n');
    Ok(())
}
