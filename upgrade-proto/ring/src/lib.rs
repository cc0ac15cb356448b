//! A ring buffer behind a file descriptor: the same reads and writes, without system calls.
//!
//! A program that writes to a pipe makes a [`Producer`] of its descriptor, one that reads a [`Consumer`].
//! Both work at once, as the pipe does. If the program at the other end does the same, the two find each
//! other and the bytes go through memory they share; if it is `cat`, they never do. Either way the same
//! bytes arrive in the same order.
//!
//! ```no_run
//! use std::io::{Read, Write};
//! use std::os::fd::AsFd;
//! use fd_ring::{Consumer, Options, Producer};
//!
//! // In one process:
//! let mut out = Producer::new(std::io::stdout().as_fd().try_clone_to_owned()?, &Options::default())?;
//! let mut record = out.reserve(16)?;
//! record.copy_from_slice(b"sixteen bytes !\n");
//! record.commit(16)?;
//! out.finish()?;
//!
//! // In the other:
//! let mut input = Consumer::new(std::io::stdin().as_fd().try_clone_to_owned()?, &Options::default())?;
//! let record: Option<[u8; 16]> = input.peek(16)?.array();
//! input.consume(if record.is_some() { 16 } else { 0 });
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Three ways, the best that both ends have; [`Producer::way`] and [`Consumer::way`] say which it is:
//!
//! 1. [`Way::Kernel`]: the pipe's own ring, on kernels with the system call `ringbuffer`, and if
//!    [`Options::kernel`] asks for it.
//! 2. [`Way::Shared`]: memory of the two processes. They meet at the service `ring-buffer` of the pipe (see
//!    [`upgrade_proto::connect`]), which the producer offers and the consumer asks for.
//! 3. [`Way::Plain`]: read(2) and write(2).
//!
//! # Guarantees
//!
//! - Nobody waits for a peer that knows nothing of rings. All negotiation happens beside reads and writes.
//! - No byte is lost, doubled or reordered by a change of ways, in either direction. What a consumer that
//!   leaves has not taken out of a shared ring, the producer writes to the pipe.
//! - In steady state there is no system call, no allocation and no lock per record. A system call is made to
//!   sleep when the ring is empty or full, and to wake a peer that sleeps.
//! - A peer that closes or dies is the end of the stream for a consumer and [`BrokenPipe`] for a producer, as
//!   with a pipe, unless others have the pipe: then the rest goes through the pipe.
//! - A hostile peer can send wrong bytes, none, or [`RingError::Dead`]. It cannot make this process read or
//!   write elsewhere, or raise SIGBUS. What the producer has written and the consumer not yet copied can be
//!   changed by the producer and, in the kernel's ring, by whoever else may write to the pipe: so a
//!   [`Grant`] is only written to, and [`Bytes`] are only copied out of.
//! - Reads and writes of up to 4096 bytes are whole, as a pipe's are.
//!
//! # Limits
//!
//! - A ring has one producer and one consumer. Other writers of the same pipe still write to the pipe; by
//!   the shared way the consumer takes their bytes when the ring is empty, by the kernel's way they must not
//!   write while the producer is mapped. Other readers get nothing while a ring is there.
//! - A producer notices a consumer that was killed when it next waits, that is after at most one ring full of
//!   bytes, or when it is finished or dropped; of what that consumer took at last, up to 4096 bytes may come
//!   again for the next one.
//! - Bytes that a producer left in a shared ring when it ended are the consumer's; if that one ends too
//!   without taking them, they are gone.
//! - There is no SIGPIPE: in a ring a broken pipe is an error only.
//! - After fork(2) only the parent may use a handle. The child has no ring, and dropping its copy does
//!   nothing.
//!
//! [`BrokenPipe`]: std::io::ErrorKind::BrokenPipe

mod bytes;
mod consumer;
mod counters;
mod end;
mod grant;
mod kernel;
mod line;
mod mapped;
mod memory;
mod patience;
mod pipe;
mod producer;
#[doc(hidden)]
pub mod protocol;
mod ready;
mod share;
mod talk;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use upgrade_proto::{Lookup, Name};

pub use bytes::Bytes;
pub use consumer::Consumer;
pub use counters::Counters;
pub use grant::Grant;
pub use producer::Producer;

use memory::Memory;

/// The service by which producer and consumer meet.
pub const SERVICE: &str = "ring-buffer";

/// The most that can be reserved or peeked at once, in bytes.
pub const MAX_RECORD_BYTES: usize = 64 << 10;

/// The least size of a ring. With two records' room a producer that waits for room for one and a consumer
/// that waits for the whole of another cannot wait for each other.
pub const MIN_SIZE_BYTES: u32 = 128 << 10;

/// How the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// Through the pipe's own ring.
    Kernel,
    /// Through memory that the two processes share.
    Shared,
    /// Through read(2) and write(2).
    Plain,
}

/// What a handle may use, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether the kernel's ring is asked for, by system calls 473 and 474. Off by default: only Linux with the
    /// out-of-tree ringbuffer series knows them. A seccomp filter may kill a process for them, and on another
    /// kernel they may be something else.
    pub kernel: bool,
    /// Whether a ring in shared memory is offered (producer) or asked for (consumer).
    pub shared: bool,
    /// Bytes of a ring: a power of two from 128 KiB to 2^30. The producer's counts, up to the consumer's.
    pub size_bytes: u32,
    /// Whether to look at the peer's position for some microseconds before sleeping; on one processor, to
    /// let others run first.
    pub spin: bool,
    /// How a producer offers its ring.
    pub offer: upgrade_proto::Options,
    /// Where a consumer looks for one.
    pub lookup: Lookup,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: false,
            shared: true,
            size_bytes: 256 << 10,
            spin: true,
            offer: upgrade_proto::Options {
                backlog: 4,
                ..upgrade_proto::Options::default()
            },
            lookup: Lookup {
                timeout: Duration::from_millis(50),
                ..Lookup::default()
            },
        }
    }
}

impl Options {
    /// The plain pipe, whatever there is.
    #[must_use]
    pub fn plain() -> Self {
        Self {
            shared: false,
            ..Self::default()
        }
    }

    fn check(&self) -> io::Result<()> {
        match is_size(self.size_bytes) {
            true => Ok(()),
            false => Err(RingError::Size(self.size_bytes).into()),
        }
    }
}

/// What goes wrong with rings and not with pipes; inside an [`io::Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The peer broke the rules; the ring is of no use any more.
    #[error("the ring is dead: the program at its other end broke the rules")]
    Dead,
    /// More than [`MAX_RECORD_BYTES`] at once.
    #[error("{0} bytes at once do not fit: the most is 65536")]
    TooLong(usize),
    /// Not a size for a ring.
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

/// One end or the other.
#[derive(Debug)]
pub enum End {
    /// Of a descriptor for writing.
    Producer(Producer),
    /// Of a descriptor for reading.
    Consumer(Consumer),
}

/// Makes the handle that a descriptor's access mode calls for.
pub fn connect(fd: OwnedFd, options: &Options) -> io::Result<End> {
    match fcntl_getfl(&fd)? & OFlags::ACCMODE {
        OFlags::WRONLY => Producer::new(fd, options).map(End::Producer),
        OFlags::RDWR => Err(RingError::BothWays.into()),
        _ => Consumer::new(fd, options).map(End::Consumer),
    }
}

fn service() -> io::Result<Name> {
    Name::new(SERVICE).map_err(io::Error::other)
}

fn is_size(size_bytes: u32) -> bool {
    size_bytes >= MIN_SIZE_BYTES && Memory::is_size(size_bytes.into())
}

/// Only pipes and FIFOs have rings.
fn is_pipe(fd: &OwnedFd) -> io::Result<bool> {
    let stat = fstat(fd)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}
