//! Messages of the vhost-user protocol on the socket (vhost-user, "Message Specification").
//!
//! A message is read once: header, payload, and the descriptors that come with either. The requests and their
//! payloads are the `vhost` crate's definitions; what they do to a session is in [`session`](super::session).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag,
    VhostUserMsgValidator,
};

/// How long a client may leave its answers unread, or a message half sent.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);

/// The version of the protocol, which is in the flags of every message.
const VERSION: u32 = 1;

/// Bytes of a message's header: request, flags, size of the payload.
const HEADER_BYTES: usize = 12;

/// Descriptors that the kernel passes at once (`SCM_MAX_FD`).
const MAX_PASSED: usize = 253;

const CUT_SHORT: &str = "the client hung up in the middle of a message";

/// Why a session ends.
#[derive(Debug)]
pub(super) enum Error {
    /// The client hung up.
    Disconnected,
    /// The client broke the protocol, or the server could not do what it asked for.
    Refused(io::Error),
}

pub(super) type Result<T> = std::result::Result<T, Error>;

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Disconnected,
            _ => Self::Refused(error),
        }
    }
}

impl From<Errno> for Error {
    fn from(error: Errno) -> Self {
        io::Error::from(error).into()
    }
}

pub(super) fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::Refused(io::Error::other(why.into())))
}

/// A message of the client.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: FrontendReq,
    /// Whether the client wants an acknowledgement.
    pub(super) need_reply: bool,
    payload: Vec<u8>,
    pub(super) files: Vec<OwnedFd>,
}

impl Message {
    /// Waits for the next message: for its first byte without a limit, for the rest no longer than
    /// [`CLIENT_LIMIT`].
    pub(super) fn receive(stream: &UnixStream) -> Result<Self> {
        wait(stream, PollFlags::IN, None)?;
        let deadline = Instant::now() + CLIENT_LIMIT;
        let (mut header, mut files) = ([0; HEADER_BYTES], Vec::new());
        match fill(stream, &mut header, &mut files, deadline)? {
            HEADER_BYTES => {}
            0 => return Err(Error::Disconnected),
            _ => return refuse(CUT_SHORT),
        }
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|n| header[at + n]));
        let (request, flags, len_bytes) = (word(0), word(4), word(8) as usize);
        let Ok(request) = FrontendReq::try_from(request) else {
            return refuse(format!("a message with the unknown number {request}"));
        };
        let need_reply = VhostUserHeaderFlag::NEED_REPLY.bits();
        if flags & !need_reply != VERSION {
            return refuse(format!(
                "{request:?} with the flags {flags:#x}: another version, or no request"
            ));
        }
        if len_bytes > MAX_MSG_SIZE {
            return refuse(format!(
                "{request:?} with {len_bytes} bytes, at most {MAX_MSG_SIZE} are allowed"
            ));
        }
        let mut payload = vec![0; len_bytes];
        if fill(stream, &mut payload, &mut files, deadline)? < len_bytes {
            return refuse(CUT_SHORT);
        }
        Ok(Self {
            request,
            need_reply: flags & need_reply != 0,
            payload,
            files,
        })
    }

    /// Refuses a message whose payload or descriptors are not those of its request.
    pub(super) fn malformed<T>(&self) -> Result<T> {
        refuse(format!(
            "{:?} makes no sense with this payload of {} bytes and {} descriptors",
            self.request,
            self.payload.len(),
            self.files.len()
        ))
    }

    /// The one descriptor of the message.
    pub(super) fn file(&mut self) -> Result<File> {
        match self.files.pop() {
            Some(file) if self.files.is_empty() => Ok(file.into()),
            _ => self.malformed(),
        }
    }

    /// The payload of a message that has no descriptors, or none left.
    pub(super) fn body<T: VhostUserMsgValidator + Default>(&self) -> Result<T> {
        match self.parts()? {
            (body, []) => Ok(body),
            _ => self.malformed(),
        }
    }

    /// The same, of a payload that begins with a `T`; and the rest of the payload.
    pub(super) fn parts<T: VhostUserMsgValidator + Default>(&self) -> Result<(T, &[u8])> {
        let mut body = T::default();
        let Some((first, rest)) = self.payload.split_at_checked(size_of::<T>()) else {
            return self.malformed();
        };
        body.as_mut_slice().copy_from_slice(first);
        if !body.is_valid() || !self.files.is_empty() {
            return self.malformed();
        }
        Ok((body, rest))
    }

    /// Answers the message.
    pub(super) fn answer(
        &self,
        stream: &UnixStream,
        payload: &[u8],
        file: Option<&File>,
    ) -> Result<()> {
        if !wait(stream, PollFlags::OUT, Some(CLIENT_LIMIT))? {
            return refuse("the client does not read its answers");
        }
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let header = header(self.request as u32, flags, payload.len());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = file.map(File::as_fd);
        if !fds.as_slice().is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds.as_slice()));
        }
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        // A socket that can be written to has room for more than the longest answer.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = sendmsg(stream, &parts, &mut control, flags)?;
        if sent < HEADER_BYTES + payload.len() {
            return refuse("the client does not read its answers");
        }
        Ok(())
    }
}

/// The message to the client that its configuration space has changed: no answer wanted, no payload.
pub(super) fn config_change() -> [u8; HEADER_BYTES] {
    header(BackendReq::CONFIG_CHANGE_MSG as u32, VERSION, 0)
}

fn header(request: u32, flags: u32, len_bytes: usize) -> [u8; HEADER_BYTES] {
    // A payload is shorter than a page or two.
    let len_bytes = u32::try_from(len_bytes).unwrap_or(u32::MAX);
    let mut header = [0; HEADER_BYTES];
    for (bytes, word) in header.chunks_exact_mut(4).zip([request, flags, len_bytes]) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    header
}

/// Fills `bytes`, and takes the descriptors that come with them. Returns how many bytes came before the client hung
/// up.
fn fill(
    stream: &UnixStream,
    bytes: &mut [u8],
    files: &mut Vec<OwnedFd>,
    deadline: Instant,
) -> Result<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if !wait(stream, PollFlags::IN, Some(left))? {
            return refuse("the client sent half a message and not the rest");
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PASSED))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut bytes[filled..])],
            &mut control,
            flags,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                files.extend(passed);
            }
        }
        // There is room for all that can be passed at once.
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return refuse(
                "descriptors that came with a message could not be received: this process has as many open \
                 as its limit allows (ulimit -n)",
            );
        }
        if files.len() > MAX_ATTACHED_FD_ENTRIES {
            return refuse(format!(
                "a message with more than {MAX_ATTACHED_FD_ENTRIES} descriptors"
            ));
        }
        if received.bytes == 0 {
            break;
        }
        filled += received.bytes;
    }
    Ok(filled)
}

/// Waits for an event; false when there is none for `limit`.
fn wait(stream: &UnixStream, what: PollFlags, limit: Option<Duration>) -> Result<bool> {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    loop {
        match poll(&mut [PollFd::new(stream, what)], limit.as_ref()) {
            Err(Errno::INTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
