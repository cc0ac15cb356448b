//! What can go wrong with a ring and not with a pipe.

use std::io;

use crate::memory::MAX_RECORD_BYTES;
use crate::protocol::Corrupt;

/// An error of a ring, as the inner error of an [`io::Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The peer broke the protocol. The handle is of no further use.
    #[error("the ring is dead: the program at its other end broke the protocol")]
    Dead,
    /// More than [`MAX_RECORD_BYTES`] in one call.
    #[error("{0} bytes in one call are too many: the most is {MAX_RECORD_BYTES}")]
    TooLong(usize),
    /// Not a valid size of a ring.
    #[error("a ring cannot have {0} bytes: choose a power of two from 131072 to 2^30")]
    Size(u32),
    /// The descriptor is open for both reading and writing.
    #[error("the descriptor is open for reading and writing: make a Producer or a Consumer of it")]
    BothWays,
}

impl From<RingError> for io::Error {
    fn from(error: RingError) -> Self {
        let kind = match error {
            RingError::Dead => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}

impl From<Corrupt> for io::Error {
    fn from(_: Corrupt) -> Self {
        RingError::Dead.into()
    }
}
