//! Messages as they come, and those that the `vhost` crate does not hand on: the back-end channel, by
//! which the server tells a client something by itself (vhost-user, "Back-end communication"), the
//! device's status, and the descriptor that signals changes of the dirty log.
//!
//! Every message is looked at before anybody reads it: a look leaves it where it is. So a message is
//! read only when all of it is there, and a client that sends a half keeps nobody waiting for the rest.
//!
//! The client sends its end of the channel with `SET_BACKEND_REQ_FD`. The crate keeps that descriptor
//! to itself and knows no message that a disk has to send; a look gives a copy of the descriptor. The
//! other messages named here end a session in the crate; they are read here.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

/// `VHOST_USER_SET_LOG_FD`.
const SET_LOG_FD: u32 = 7;

/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;

/// `VHOST_USER_SET_STATUS` and `VHOST_USER_GET_STATUS`.
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;

/// What a message's flags say: the version, that it is an answer, that one is wanted.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Bytes of a message's header: request, flags, size of the payload.
const HEADER_BYTES: usize = 12;

/// The longest payload that the crate reads.
const MAX_PAYLOAD_BYTES: u32 = 4096;

/// How often the rest of a message is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no answer wanted, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// What the next message is.
#[derive(Debug)]
pub(super) enum Next {
    /// One for the crate.
    Other,
    /// The same, and it sets this channel.
    Channel(OwnedFd),
    /// One that the crate does not know, which nobody has read yet.
    Ours,
    /// A part of one, and the rest did not come in time.
    Half,
}

/// Waits for the next message: for its first byte for ever, for the rest no longer than `limit`.
pub(super) fn look(stream: &UnixStream, limit: Duration) -> Next {
    // Whatever goes wrong here goes wrong again for whoever reads the message.
    match arrival(stream, limit) {
        Ok(Arrival::Whole(SET_BACKEND_REQ_FD)) => {
            descriptor(stream).map_or(Next::Other, Next::Channel)
        }
        Ok(Arrival::Whole(SET_STATUS | GET_STATUS | SET_LOG_FD)) => Next::Ours,
        Ok(Arrival::Whole(_) | Arrival::Over) | Err(_) => Next::Other,
        Ok(Arrival::Late) => Next::Half,
    }
}

/// What came.
enum Arrival {
    /// All of a message; the request.
    Whole(u32),
    /// The end of the connection.
    Over,
    /// Not all of a message, for too long.
    Late,
}

fn arrival(stream: &UnixStream, limit: Duration) -> rustix::io::Result<Arrival> {
    wait(stream, PollFlags::IN, None)?;
    let deadline = Instant::now() + limit;
    loop {
        // Asked before the bytes are counted: nothing comes after it.
        let over = wait(stream, PollFlags::RDHUP, Some(&Timespec::default()))?;
        let there = ioctl_fionread(stream)?;
        if there >= HEADER_BYTES as u64 {
            let mut header = [0; HEADER_BYTES];
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            let (_, seen) = recv(stream, &mut header[..], flags)?;
            let [request, _, len_bytes] = words(header);
            // One in pieces that carry descriptors cannot be looked at as a whole; whoever reads it has
            // a limit of his own.
            let in_pieces = seen < HEADER_BYTES;
            let whole = HEADER_BYTES as u64 + u64::from(len_bytes);
            if in_pieces || len_bytes > MAX_PAYLOAD_BYTES || there >= whole {
                return Ok(Arrival::Whole(request));
            }
        }
        if over {
            return Ok(Arrival::Over);
        }
        if Instant::now() >= deadline {
            return Ok(Arrival::Late);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Waits for an event; false when there is none for `limit`.
fn wait(
    stream: &UnixStream,
    what: PollFlags,
    limit: Option<&Timespec>,
) -> rustix::io::Result<bool> {
    loop {
        match poll(&mut [PollFd::new(stream, what)], limit) {
            Err(Errno::INTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

fn words(header: [u8; HEADER_BYTES]) -> [u32; 3] {
    let word = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&header[at..at + 4]);
        u32::from_ne_bytes(word)
    };
    [word(0), word(4), word(8)]
}

/// Waits until there is room for an answer; false when there is none for `limit`, because the client does
/// not read. A socket that can be written has room for more than the longest answer.
pub(super) fn has_room(stream: &UnixStream, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).ok();
    wait(stream, PollFlags::OUT, limit.as_ref()).unwrap_or(false)
}

/// A message that the crate does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub what: What,
    /// Whether it is to be acknowledged.
    pub need_reply: bool,
}

/// What it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    GetStatus,
    SetStatus(u64),
    /// A descriptor to be written when something was marked in the log of dirty pages. Whoever sends it
    /// need not be told, and is not: it would be a system call for each batch of requests.
    SetLogFd,
}

/// Reads a message that the crate does not know.
///
/// # Errors
///
/// When it makes no sense, or the client has gone.
pub(super) fn read(mut stream: &UnixStream) -> io::Result<Message> {
    let (header, descriptors) = read_header(stream)?;
    let [request, flags, len_bytes] = words(header);
    if flags & (VERSION_MASK | REPLY) != VERSION {
        return Err(io::Error::other("a message of another version"));
    }
    let what = match (request, len_bytes, descriptors) {
        (GET_STATUS, 0, 0) => What::GetStatus,
        (SET_STATUS, 8, 0) => {
            let mut status = [0; 8];
            stream.read_exact(&mut status)?;
            What::SetStatus(u64::from_ne_bytes(status))
        }
        (SET_LOG_FD, 0, 1) => What::SetLogFd,
        _ => {
            return Err(io::Error::other(format!(
                "message {request} with {len_bytes} bytes and {descriptors} descriptors"
            )));
        }
    };
    let need_reply = flags & NEED_REPLY != 0;
    Ok(Message { what, need_reply })
}

/// Reads a header, and counts the descriptors that came with it, which are closed. More than two are as
/// wrong as two.
fn read_header(mut stream: &UnixStream) -> io::Result<([u8; HEADER_BYTES], usize)> {
    let mut header = [0; HEADER_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let into = &mut [IoSliceMut::new(&mut header)];
    let read = recvmsg(stream, into, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let descriptors = control
        .drain()
        .map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.count(),
            _ => 0,
        })
        .sum();
    stream.read_exact(&mut header[read..])?;
    Ok((header, descriptors))
}

/// Answers a message that [`read`] returned.
///
/// # Errors
///
/// When the client has gone, or does not read.
pub(super) fn answer(mut stream: &UnixStream, message: Message, value: u64) -> io::Result<()> {
    let request = match message.what {
        What::GetStatus => GET_STATUS,
        What::SetStatus(_) => SET_STATUS,
        What::SetLogFd => SET_LOG_FD,
    };
    let mut answer = [0; HEADER_BYTES + 8];
    let (header, payload) = answer.split_at_mut(HEADER_BYTES);
    for (bytes, word) in header
        .chunks_exact_mut(4)
        .zip([request, VERSION | REPLY, 8])
    {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    payload.copy_from_slice(&value.to_ne_bytes());
    stream.write_all(&answer)
}

/// The descriptor in a message that is there.
fn descriptor(stream: &UnixStream) -> Option<OwnedFd> {
    let mut request = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut request)],
        &mut control,
        flags,
    )
    .ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

/// Tells the client to read the configuration space again. A client that does not read its messages is
/// not waited for: those that it has not read say the same.
pub(super) fn tell_config_change(channel: &OwnedFd) -> bool {
    let mut message = [0; 12];
    for (bytes, word) in message.chunks_exact_mut(4).zip(CONFIG_CHANGE) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
}
