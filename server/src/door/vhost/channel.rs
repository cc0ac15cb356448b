//! The back-end channel: what the server tells a client by itself (vhost-user, "Back-end
//! communication").
//!
//! The client sends its end with `SET_BACKEND_REQ_FD`. The `vhost` crate keeps that descriptor to
//! itself and knows no message that a disk has to send, so the message is looked at before the crate
//! reads it: a look leaves it where it is, and gives a copy of the descriptor.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no answer wanted, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// Waits for the next message. The descriptor in it, if it is the one that sets the channel.
pub(super) fn look_for_channel(stream: &UnixStream) -> Option<OwnedFd> {
    let mut request = [0; 4];
    let whole = RecvFlags::PEEK | RecvFlags::WAITALL;
    // Whatever goes wrong here goes wrong again for whoever reads the message.
    let (_, len) = recv(stream, &mut request[..], whole).ok()?;
    if len < request.len() || u32::from_ne_bytes(request) != SET_BACKEND_REQ_FD {
        return None;
    }
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
