//! What the two ends say to each other on the socket, and the bell that it becomes afterwards.
//!
//! ```text
//! consumer ── connects ─────────────────────▶ producer
//!          ◀── OFFER size, memory ───────────
//!          ── READY, the consumer's page ───▶
//!          ◀── SWITCH ───────────────────────   the producer wrote its last byte to the pipe before this
//! ```
//!
//! Neither ever waits for an answer: both go on with the pipe until the next message is there. After
//! SWITCH every byte on the socket is a ring of the bell, and its end is the end of the peer.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, send, sendmsg,
};

const MAGIC: u64 = u64::from_le_bytes(*b"fd-ring\0");
const VERSION: u32 = 1;
const MESSAGE_BYTES: usize = 32;

/// System calls that listen to the bell, at most. A peer that wakes once per sleep needs one.
const DRAINS_MAX: u32 = 16;

/// A message without its descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Memory for a ring with this many bytes of data; with the file.
    Offer(u64),
    /// The consumer has mapped it; with the file of its page.
    Ready,
    /// Everything from here on is in the ring.
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
        // Whatever else differs is of another version.
        (message.encode() == *bytes).then_some(message)
    }
}

/// What was on the socket.
#[derive(Debug)]
pub(crate) enum Heard {
    Nothing,
    /// The peer closed it, died, or does not speak as we do.
    Gone,
    Said(Message, Option<OwnedFd>),
}

/// A connected socket; never blocks.
#[derive(Debug)]
pub(crate) struct Talk(OwnedFd);

impl Talk {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(stream.into())
    }

    /// Says something; whether it could be said.
    pub(crate) fn say(&self, message: Message, file: Option<BorrowedFd<'_>>) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        if !files.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&files)) {
            return false;
        }
        let bytes = message.encode();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut rights, flags) {
                Err(Errno::INTR) => {}
                // The buffer of a new socket holds many messages: a shorter one means a strange peer.
                other => return other == Ok(bytes.len()),
            }
        }
    }

    /// Takes one message.
    pub(crate) fn hear(&self) -> Heard {
        let mut bytes = [0; MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            match recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut rights,
                flags,
            ) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        let len_bytes = match received {
            Err(Errno::AGAIN) => return Heard::Nothing,
            Err(_) => return Heard::Gone,
            Ok(received) => received.bytes,
        };
        let mut files = rights.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let file = files.by_ref().flatten().next();
        if len_bytes != bytes.len() {
            return Heard::Gone;
        }
        match Message::decode(&bytes) {
            Some(message) => Heard::Said(message, file),
            None => Heard::Gone,
        }
    }

    /// Wakes a peer that polls; whether it still is there. A full socket is bell enough.
    pub(crate) fn ring(&self) -> bool {
        loop {
            match send(&self.0, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) | Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Takes what the bell left; whether the peer still is there. Of a peer that rings without end some is
    /// left for the next time.
    pub(crate) fn drain(&self) -> bool {
        let mut bytes = [0_u8; 64];
        for _ in 0..DRAINS_MAX {
            match recv(&self.0, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, len_bytes)) if len_bytes == bytes.len() => {}
                Ok((_, len_bytes)) => return len_bytes != 0,
                Err(Errno::INTR) => {}
                Err(errno) => return errno == Errno::AGAIN,
            }
        }
        true
    }
}

impl AsFd for Talk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Talk, Talk) {
        let (a, b) = UnixStream::pair().expect("a pair");
        (Talk::new(a), Talk::new(b))
    }

    #[test]
    fn what_is_said_is_heard_with_its_descriptor() {
        let (a, b) = pair();
        assert!(matches!(b.hear(), Heard::Nothing));
        let (read, _write) = std::io::pipe().expect("a pipe");
        assert!(a.say(Message::Offer(65536), Some(read.as_fd())));
        assert!(a.say(Message::Switch, None));
        assert!(matches!(
            b.hear(),
            Heard::Said(Message::Offer(65536), Some(_))
        ));
        assert!(matches!(b.hear(), Heard::Said(Message::Switch, None)));
        drop(a);
        assert!(matches!(b.hear(), Heard::Gone));
        assert!(!b.say(Message::Ready, None) && !b.ring() && !b.drain());
    }

    #[test]
    fn noise_is_a_peer_that_is_gone() {
        let good = Message::Offer(4096).encode();
        assert_eq!(Message::decode(&good), Some(Message::Offer(4096)));
        for place in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good;
                bad[place] ^= 1 << bit;
                let decoded = Message::decode(&bad);
                let size_alone = (16..24).contains(&place);
                assert_eq!(decoded.is_some(), size_alone, "byte {place} bit {bit}");
            }
        }
        let (a, b) = pair();
        send(&a, &good[..31], SendFlags::empty()).expect("sent");
        assert!(matches!(b.hear(), Heard::Gone));
    }

    #[test]
    fn a_bell_that_nobody_answers_never_blocks() {
        let (a, b) = pair();
        for _ in 0..100_000 {
            assert!(a.ring());
        }
        while matches!(b.hear(), Heard::Gone) {
            assert!(b.drain());
        }
        assert!(b.drain());
    }

    #[test]
    fn a_bell_that_rings_without_end_holds_nobody() {
        let (a, b) = pair();
        let noise = [1; 4096];
        let mut sent = 0;
        while let Ok(count) = send(&a, &noise, SendFlags::DONTWAIT) {
            sent += count;
        }
        assert!(sent > 3 * 64 * DRAINS_MAX as usize, "{sent}");
        assert!(b.drain());
        assert!(matches!(b.hear(), Heard::Gone), "it was all taken");
        drop(a);
        let mut drains = 1;
        while b.drain() {
            drains += 1;
        }
        assert!(drains > 1, "the end is heard after the noise");
    }
}
