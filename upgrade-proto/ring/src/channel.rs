//! The control channel of a shared ring: a socket for the negotiation, and for notifications afterwards.
//!
//! ```text
//! consumer ── connects ─────────────────────▶ producer
//!          ◀── OFFER size, memory ───────────
//!          ── READY, the consumer's page ───▶
//!          ◀── SWITCH ───────────────────────   the producer has written its last byte to the pipe
//! ```
//!
//! Neither end waits for an answer: both use the pipe until the next message has arrived. After SWITCH every
//! byte on the socket is a notification, and its end of file means that the peer is gone.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, send, sendmsg,
};

use upgrade_proto::{Error, Name};

use crate::kernel;

/// The service of a pipe by which producer and consumer meet.
pub const SERVICE: &str = "ring-buffer";

/// [`SERVICE`] as a name.
pub(crate) fn service() -> Result<Name, Error> {
    Name::new(SERVICE)
}

const MAGIC: u64 = u64::from_le_bytes(*b"fd-ring\0");
const VERSION: u32 = 1;
const MESSAGE_BYTES: usize = 32;

/// Calls of recv(2) in one [`ControlChannel::drain`], at most. One suffices for a peer that notifies once per
/// sleep.
const DRAINS_MAX: u32 = 16;

/// A message without its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Memory for a ring with so many bytes of data; with the file.
    Offer(u64),
    /// The consumer has mapped it; with the file of its index page.
    Ready,
    /// All further bytes are in the ring.
    Switch,
}

impl Message {
    fn encode(self) -> [u8; MESSAGE_BYTES] {
        let (kind, size) = match self {
            Self::Offer(size) => (1_u32, size),
            Self::Ready => (2, 0),
            Self::Switch => (3, 0),
        };
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&kind.to_le_bytes());
        bytes[16..24].copy_from_slice(&size.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; MESSAGE_BYTES]) -> Option<Self> {
        let (kind, size) = (&bytes[12..16], &bytes[16..24]);
        let kind = u32::from_le_bytes(kind.try_into().ok()?);
        let size = u64::from_le_bytes(size.try_into().ok()?);
        let message = match kind {
            1 => Self::Offer(size),
            2 => Self::Ready,
            3 => Self::Switch,
            _ => return None,
        };
        // Other magic, version or reserved bytes: not this protocol.
        (message.encode() == *bytes).then_some(message)
    }
}

/// What was on the socket.
#[derive(Debug)]
pub(crate) enum Received {
    Nothing,
    /// The peer closed it, died, or sent something that is not of this protocol.
    Gone,
    Message(Message, Option<OwnedFd>),
}

/// How the ends of a ring notify each other, and learn that the other one is gone.
#[derive(Debug)]
pub(crate) enum Channel {
    /// Through the kernel, by the pipe itself.
    Kernel(kernel::Side),
    /// Through the socket of the negotiation.
    Socket(ControlChannel),
}

/// A connected socket; no call blocks.
#[derive(Debug)]
pub(crate) struct ControlChannel(OwnedFd);

impl ControlChannel {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(stream.into())
    }

    /// Sends a message; whether that worked.
    pub(crate) fn send(&self, message: Message, file: Option<BorrowedFd<'_>>) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        if !files.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&files)) {
            return false;
        }
        let bytes = message.encode();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = retry_on_intr(|| sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut rights, flags));
        // The buffer of a new socket holds many messages: only a misbehaving peer has it full.
        sent == Ok(bytes.len())
    }

    /// Receives one message.
    pub(crate) fn receive(&self) -> Received {
        let mut bytes = [0; MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let buffers = &mut [IoSliceMut::new(&mut bytes)];
        let received = retry_on_intr(|| recvmsg(&self.0, buffers, &mut rights, flags));
        let len_bytes = match received {
            Err(Errno::AGAIN) => return Received::Nothing,
            Err(_) => return Received::Gone,
            Ok(received) => received.bytes,
        };
        let mut files = rights.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let file = files.by_ref().flatten().next();
        if len_bytes != bytes.len() {
            return Received::Gone;
        }
        match Message::decode(&bytes) {
            Some(message) => Received::Message(message, file),
            None => Received::Gone,
        }
    }

    /// Wakes a peer that polls; false if it is gone. A full socket wakes it already.
    pub(crate) fn notify(&self) -> bool {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = retry_on_intr(|| send(&self.0, &[1], flags));
        matches!(sent, Ok(_) | Err(Errno::AGAIN))
    }

    /// Takes the notifications that are there; false if the peer is gone. The number of system calls is bounded:
    /// a peer that floods the socket leaves some for the next time.
    pub(crate) fn drain(&self) -> bool {
        let mut bytes = [0_u8; 64];
        for _ in 0..DRAINS_MAX {
            match retry_on_intr(|| recv(&self.0, &mut bytes, RecvFlags::DONTWAIT)) {
                Ok((_, len_bytes)) if len_bytes == bytes.len() => {}
                Ok((_, len_bytes)) => return len_bytes != 0,
                Err(errno) => return errno == Errno::AGAIN,
            }
        }
        true
    }
}

impl AsFd for ControlChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests;
