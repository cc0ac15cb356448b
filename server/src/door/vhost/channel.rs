//! Messages that the `vhost` crate does not hand on: the back-end channel, by which the server tells a
//! client something by itself (vhost-user, "Back-end communication"), and the device's status.
//!
//! The client sends its end of the channel with `SET_BACKEND_REQ_FD`. The crate keeps that descriptor
//! to itself and knows no message that a disk has to send, so the message is looked at before the crate
//! reads it: a look leaves it where it is, and gives a copy of the descriptor. Messages about the status
//! end a session in the crate; they are read here.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

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

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no answer wanted, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// What the next message is.
#[derive(Debug)]
pub(super) enum Next {
    /// One for the crate.
    Other,
    /// The same, and it sets this channel.
    Channel(OwnedFd),
    /// One about the status, which nobody has read yet.
    Status,
}

/// Waits for the next message.
pub(super) fn look(stream: &UnixStream) -> Next {
    let mut request = [0; 4];
    let whole = RecvFlags::PEEK | RecvFlags::WAITALL;
    // Whatever goes wrong here goes wrong again for whoever reads the message.
    match recv(stream, &mut request[..], whole) {
        Ok((_, 4)) => match u32::from_ne_bytes(request) {
            SET_BACKEND_REQ_FD => descriptor(stream).map_or(Next::Other, Next::Channel),
            SET_STATUS | GET_STATUS => Next::Status,
            _ => Next::Other,
        },
        _ => Next::Other,
    }
}

/// Waits until there is room for an answer; false when there is none for `limit`, because the client does
/// not read. A socket that can be written has room for more than the longest answer.
pub(super) fn has_room(stream: &UnixStream, limit: &Timespec) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    loop {
        match poll(&mut fds, Some(limit)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}

/// A message about the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StatusMessage {
    Get,
    Set {
        status: u64,
        /// Whether it is to be acknowledged.
        need_reply: bool,
    },
}

/// Reads a message about the status.
///
/// # Errors
///
/// When it is none, or the client has gone.
pub(super) fn read_status(mut stream: &UnixStream) -> io::Result<StatusMessage> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let word = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&header[at..at + 4]);
        u32::from_ne_bytes(word)
    };
    let (request, flags, len_bytes) = (word(0), word(4), word(8));
    if flags & (VERSION_MASK | REPLY) != VERSION {
        return Err(io::Error::other(
            "a message about the status of another version",
        ));
    }
    match (request, len_bytes) {
        (GET_STATUS, 0) => Ok(StatusMessage::Get),
        (SET_STATUS, 8) => {
            let mut status = [0; 8];
            stream.read_exact(&mut status)?;
            Ok(StatusMessage::Set {
                status: u64::from_ne_bytes(status),
                need_reply: flags & NEED_REPLY != 0,
            })
        }
        _ => Err(io::Error::other(
            "a message about the status of the wrong length",
        )),
    }
}

/// Answers a message about the status.
///
/// # Errors
///
/// When the client has gone, or does not read.
pub(super) fn answer_status(
    mut stream: &UnixStream,
    message: StatusMessage,
    value: u64,
) -> io::Result<()> {
    let request = match message {
        StatusMessage::Get => GET_STATUS,
        StatusMessage::Set { .. } => SET_STATUS,
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
