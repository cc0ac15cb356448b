//! A ring buffer in shared memory in place of a pipe: the same reads and writes, without system calls.
//!
//! A program that writes to a pipe makes a [`Producer`] of its descriptor, one that reads a [`Consumer`].
//! Both work at once, as the pipe does. If the program at the other end does the same, the two negotiate a
//! ring in the background and the bytes go through memory that both have mapped; if it is `cat`, they keep
//! using the pipe. In both cases the same bytes arrive in the same order.
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
//! There are three transports. [`Producer::transport`] and [`Consumer::transport`] say which one is in use:
//!
//! 1. [`Transport::Kernel`]: the pipe's own ring, on kernels with the system call `ringbuffer`. Used only if
//!    [`Options::kernel`] asks for it.
//! 2. [`Transport::Shared`]: a ring in memory that the two processes share. They meet at the service
//!    [`SERVICE`] of the pipe (see [`upgrade_proto::connect`]): the producer listens, the consumer connects.
//! 3. [`Transport::Plain`]: read(2) and write(2).
//!
//! # Guarantees
//!
//! - A peer without support for rings is never waited for: all negotiation is done beside reads and writes
//!   that are made anyway.
//! - A change of transport, in either direction, loses, doubles and reorders no byte. What a consumer leaves
//!   unread in a shared ring, the producer writes to the pipe.
//! - In steady state a record costs no system call, no allocation and no lock. System calls are made to sleep
//!   when the ring is empty or full, and to wake a peer that sleeps.
//! - A peer that closes or dies is the end of the stream for a consumer and [`BrokenPipe`] for a producer, as
//!   with a pipe. If other processes have that end of the pipe open, the rest goes through the pipe.
//! - A hostile peer can send wrong bytes, no bytes, or cause [`RingError::Dead`]. It cannot make this process
//!   access other memory, or raise SIGBUS in it. Bytes that were committed but not yet copied out can still be
//!   changed by the producer and, in the kernel's ring, by any process that has its descriptor. Therefore a
//!   [`Reservation`] can only be written to, and [`Bytes`] can only be copied out of.
//! - Reads and writes of up to 4096 bytes are atomic, as a pipe's are.
//!
//! # Limits
//!
//! - A ring has one producer and one consumer. Other writers of the same pipe write to the pipe: beside a
//!   shared ring the consumer reads their bytes when the ring is empty, or before it begins; beside the kernel's
//!   ring their writes, and reads of other readers, fail with EBUSY while this end has it mapped. So a producer
//!   takes no ring for a pipe that is also its process's standard error. Other readers get nothing while a shared
//!   ring is in use.
//! - A producer notices that its consumer was killed when it next waits (after at most one ring of bytes), or
//!   when it is finished or dropped. Up to 4096 bytes that the killed consumer had read may be sent again to
//!   the next reader.
//! - Bytes that a producer left in a shared ring when it ended belong to its consumer. If that ends without
//!   reading them they are lost.
//! - There is no SIGPIPE for a ring: a broken pipe is an error only.
//! - After fork(2) only the parent may use a handle. The child does not have the ring mapped, and dropping the
//!   child's copy of the handle does nothing.
//!
//! [`BrokenPipe`]: std::io::ErrorKind::BrokenPipe

mod backoff;
mod bytes;
mod channel;
mod consumer;
mod counters;
mod error;
mod handle;
mod kernel;
mod memfd;
mod memory;
mod options;
mod pipe;
mod pipe_end;
mod producer;
#[doc(hidden)]
pub mod protocol;
mod ring;

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_getfl};

pub use bytes::Bytes;
pub use channel::SERVICE;
pub use consumer::Consumer;
pub use counters::Counters;
pub use error::RingError;
pub use memory::{MAX_RECORD_BYTES, MIN_SIZE_BYTES};
pub use options::{Options, Transport};
pub use producer::{Producer, Reservation};

/// One end or the other.
#[derive(Debug)]
pub enum End {
    /// Of a descriptor for writing.
    Producer(Producer),
    /// Of a descriptor for reading.
    Consumer(Consumer),
}

/// Makes the handle that the access mode of a descriptor calls for.
pub fn connect(fd: OwnedFd, options: &Options) -> io::Result<End> {
    match fcntl_getfl(&fd)? & OFlags::ACCMODE {
        OFlags::WRONLY => Producer::new(fd, options).map(End::Producer),
        OFlags::RDWR => Err(RingError::BothWays.into()),
        _ => Consumer::new(fd, options).map(End::Consumer),
    }
}
