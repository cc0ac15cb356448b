//! A line from a socket whose other end need not be friendly.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// Reads a line, or what there is of it at the end of the stream or after `max_bytes`. A peer that sends it byte by byte has
/// no more time than any other.
///
/// # Errors
///
/// [`io::ErrorKind::WouldBlock`] when `deadline` has passed, [`io::ErrorKind::InvalidData`] if it is no text; else what
/// the system said.
pub(super) fn read_line(
    mut stream: &UnixStream,
    max_bytes: usize,
    deadline: Instant,
) -> io::Result<String> {
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    while line.len() < max_bytes && !line.contains(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece) {
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
    String::from_utf8(line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
