//! Messages as bytes, for what the protocol's crate does not send.

use std::io::{self, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
pub use vhost::vhost_user::message::FrontendReq;

/// Bytes of a message before its payload: request, flags, length.
pub const HEADER_BYTES: usize = 12;

/// The version, which is in the flags of every message.
const VERSION: u32 = 1;

/// The flag of an answer.
const REPLY: u32 = 4;

/// The flag of a message that wants to be acknowledged.
pub const NEED_REPLY: u32 = 8;

/// The descriptors that fit into one message here.
pub const MAX_DESCRIPTORS: usize = 32;

/// A message without its descriptors.
#[must_use]
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a payload is small");
    let header = [request, VERSION | flags, len].map(u32::to_ne_bytes);
    [&header.concat(), payload].concat()
}

/// Two 32-bit numbers as one word of a payload.
#[must_use]
pub fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

/// Sends bytes and descriptors in one piece; no signal if the server has hung up.
///
/// # Errors
/// The server has hung up (EPIPE or ECONNRESET), or there are too many descriptors.
pub fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(ErrorKind::ArgumentListTooLong.into());
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    match sent == bytes.len() {
        true => Ok(()),
        false => Err(ErrorKind::WriteZero.into()),
    }
}

/// Reads an answer that is one word.
///
/// # Errors
/// There is none, or it answers something else.
pub fn answer(mut stream: &UnixStream, request: u32) -> Result<u64> {
    let mut bytes = [0; HEADER_BYTES + 8];
    stream
        .read_exact(&mut bytes)
        .context("there is no answer")?;
    let (header, word) = bytes.split_at(HEADER_BYTES);
    let expected = [request, VERSION | REPLY, 8].map(u32::to_ne_bytes).concat();
    ensure!(
        header == expected,
        "request {request} was answered with the header {header:?}"
    );
    Ok(u64::from_ne_bytes(word.try_into()?))
}

/// Waits until the server has hung up; false if it says something instead.
#[must_use]
pub fn is_closed(mut stream: &UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(len) => len == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}
