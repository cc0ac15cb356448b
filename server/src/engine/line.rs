//! A line from a socket whose other end need not be friendly, with descriptors beside it.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// More descriptors than any line has.
const MAX_DESCRIPTORS: usize = 8;

/// Reads a line, or what there is of it at the end of the stream or after `max_bytes`. A peer that sends it byte by byte has
/// no more time than any other.
///
/// # Errors
///
/// [`io::ErrorKind::WouldBlock`] when `deadline` has passed, [`io::ErrorKind::InvalidData`] if it is no text; else what
/// the system said.
pub fn read_line(
    stream: &UnixStream,
    max_bytes: usize,
    deadline: Instant,
) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptors = Vec::new();
    let mut piece = [0; 4096];
    while line.len() < max_bytes && !line.contains(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        stream.set_read_timeout(Some(left))?;
        match receive(stream, &mut piece, &mut descriptors) {
            Ok(0) => break,
            Ok(count) => line.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    line.truncate(
        line.iter()
            .position(|&byte| byte == b'\n')
            .unwrap_or(max_bytes),
    );
    let line = String::from_utf8(line);
    let line = line.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((line, descriptors))
}

/// Reads what there is, and collects the descriptors that come with it. The kernel closes those for which there is no room.
fn receive(
    stream: &UnixStream,
    piece: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(piece)];
    let got = recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            let room = MAX_DESCRIPTORS - descriptors.len();
            descriptors.extend(received.take(room));
        }
    }
    Ok(got.bytes)
}

/// Sends a line with descriptors beside it, which arrive with its first bytes.
///
/// # Errors
///
/// When there are too many, or what the system said.
pub fn send_line(
    mut stream: &UnixStream,
    line: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let has_room = descriptors.len() <= MAX_DESCRIPTORS;
    let fit = descriptors.is_empty()
        || has_room && control.push(SendAncillaryMessage::ScmRights(descriptors));
    if !fit {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let sent = sendmsg(
        stream,
        &[IoSlice::new(line)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    stream.write_all(&line[sent..])
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_brings_its_descriptors_and_no_more_than_there_is_room_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (pipe, _other_end) = std::io::pipe().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        for count in [0, 1, MAX_DESCRIPTORS] {
            let descriptors = vec![pipe.as_fd(); count];
            send_line(&ours, b"text\n", &descriptors).unwrap();
            let (line, got) = read_line(&theirs, 100, deadline).unwrap();
            assert_eq!((line.as_str(), got.len()), ("text", count));
        }
        let too_many = vec![pipe.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(send_line(&ours, b"text\n", &too_many).is_err());
        for part in [&b"te"[..], b"xt\n"] {
            send_line(&ours, part, &too_many[1..]).unwrap();
        }
        let (line, got) = read_line(&theirs, 100, deadline).unwrap();
        assert_eq!((line.as_str(), got.len()), ("text", MAX_DESCRIPTORS));
    }
}
