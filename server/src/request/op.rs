//! What can be asked of a disk.

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffers from the disk.
    Read,
    /// Write the buffers to the disk. With `fua` the data is durable before the request completes.
    Write {
        /// Force unit access: durable at completion.
        fua: bool,
    },
    /// Make every write that completed before this request was started durable.
    Flush,
    /// The content of the range is no longer of interest.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// The storage may release the space behind the range.
        unmap: bool,
        /// Force unit access: durable at completion.
        fua: bool,
    },
}

impl Op {
    /// Its number: where latencies are counted, and in probes (docs/operations.md, "Tracing").
    #[must_use]
    pub fn number(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write { .. } => 1,
            Self::Flush => 2,
            Self::Discard => 3,
            Self::WriteZeroes { .. } => 4,
        }
    }

    /// Whether the operation changes what the disk holds.
    #[must_use]
    pub fn is_write(self) -> bool {
        match self {
            Self::Read | Self::Flush => false,
            Self::Write { .. } | Self::Discard | Self::WriteZeroes { .. } => true,
        }
    }

    /// Whether the request carries data buffers.
    #[must_use]
    pub fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. })
    }
}
