//! The words that both doors and every storage share.
//!
//! A door parses what arrived on its wire **once** into a [`Request`]; from then on everything is
//! valid: the range lies inside the disk, the buffers are as long as the range, a read-only disk
//! gets no writes. A storage answers with [`Progress`] and, in the end, exactly one [`Outcome`].

mod buffers;
mod limits;
mod lists;
mod op;
mod outcome;
mod parsed;
mod size;

pub use buffers::{Buffer, Buffers, RingBuffer, zero};
#[cfg(any(test, feature = "testing"))]
pub use limits::small_disk;
pub use limits::{
    BadSerial, Capacity, Limits, MAX_DISK_BYTES, Range, SECTOR_BYTES, SECTOR_SHIFT, SERIAL_BYTES,
    Serial,
};
pub use lists::BufferLists;
pub use op::Op;
pub use outcome::{IoError, Outcome, Progress};
pub use parsed::Request;
pub use size::{BadSize, format_size, parse_size};
