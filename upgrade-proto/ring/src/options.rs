//! What a handle may use, and what it ended up with.

use std::io;
use std::time::Duration;

use upgrade_proto::Lookup;

use crate::error::RingError;
use crate::memory::Memory;

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// The pipe's own ring, made by the kernel.
    Kernel,
    /// A ring in memory that the two processes share.
    Shared,
    /// The pipe, by read(2) and write(2).
    Plain,
}

/// What a handle may use, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether to ask the kernel for the pipe's own ring, by system calls 473 and 474. Off by default: only Linux
    /// with the out-of-tree ringbuffer series has them. A seccomp filter may kill a process that makes them,
    /// and another kernel may have given the numbers to something else.
    pub kernel: bool,
    /// Whether to offer (producer) or ask for (consumer) a ring in shared memory.
    pub shared: bool,
    /// Data bytes of a ring: a power of two from 128 KiB to 2^30. The producer's value counts; a consumer
    /// refuses more than its own.
    pub size_bytes: u32,
    /// Whether to poll the peer's position for some microseconds before sleeping. On a single processor the
    /// handle yields a few times instead.
    pub spin: bool,
    /// How a producer offers its ring.
    pub offer: upgrade_proto::Options,
    /// Where a consumer looks for an offer.
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
    /// The plain pipe only.
    #[must_use]
    pub fn plain() -> Self {
        Self {
            shared: false,
            ..Self::default()
        }
    }

    pub(crate) fn check(&self) -> io::Result<()> {
        match Memory::is_size(self.size_bytes.into()) {
            true => Ok(()),
            false => Err(RingError::Size(self.size_bytes).into()),
        }
    }
}
