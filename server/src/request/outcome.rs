//! How a request goes on, and how it ends.

/// Why a request failed. Closed and small: each door maps it to its wire once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The storage failed, or the request was malformed (out of range, unaligned, unmapped).
    #[error("input/output error")]
    Io,
    /// The operation, or a flag of it, is not offered.
    #[error("not supported")]
    Unsupported,
    /// A write to a read-only disk.
    #[error("read-only disk")]
    ReadOnly,
    /// The storage has no room left.
    #[error("no space left")]
    NoSpace,
    /// A write through a door that may not write now: a client of another has the disk.
    #[error("another client has the disk")]
    Conflict,
}

impl IoError {
    /// The errno that a kernel interface uses for this error (positive).
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::Io => libc::EIO,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::ReadOnly => libc::EPERM,
            Self::NoSpace => libc::ENOSPC,
            // What the block layer calls a reservation conflict.
            Self::Conflict => libc::EBADE,
        }
    }

    /// The error for a (positive) errno that the storage answered with.
    #[must_use]
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT => Self::NoSpace,
            libc::EOPNOTSUPP => Self::Unsupported,
            libc::EROFS => Self::ReadOnly,
            _ => Self::Io,
        }
    }
}

/// How a request ended. Success always means the whole request: storages resume short transfers.
pub type Outcome = Result<(), IoError>;

/// What a storage says after it was given a request or a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// The request ended.
    Done(Outcome),
    /// Work is under way on the thread's ring; a completion will follow.
    Pending,
    /// No room right now; give the same request again after the next reap. Never an error.
    Full,
}
