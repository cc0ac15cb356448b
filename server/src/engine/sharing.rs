//! Memory that requests lie in, for storages that hand it on to another process.
//!
//! A door tells such a storage ([`StorageControl::sharing`]) of memory before the first request lies in it, and keeps the
//! [`SharedMemory`] until no request does. Other storages have no part in it: a door asks once, when it is opened.
//!
//! [`StorageControl::sharing`]: super::StorageControl::sharing

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;

/// A part of a file that is mapped here.
#[derive(Clone, Copy, Debug)]
pub struct MappedFile<'a> {
    /// The file. It may be closed afterwards.
    pub file: BorrowedFd<'a>,
    /// Where the part begins in it.
    pub offset_bytes: u64,
    /// Where it is mapped in this process.
    pub address: usize,
    /// How long it is.
    pub len_bytes: u64,
}

/// Takes memory that requests will lie in.
pub trait Sharing: Send + Sync {
    /// Hands memory on. Requests may lie in it from now on until the value is dropped, which is before it is unmapped.
    /// Memory that the storage cannot hand on is copied from and to.
    ///
    /// # Errors
    ///
    /// When there is no descriptor for it.
    fn share(&self, memory: MappedFile<'_>) -> std::io::Result<SharedMemory>;
}

/// Memory that a storage has handed on. Dropping it ends that.
pub struct SharedMemory(
    #[allow(dead_code, reason = "kept for its drop")] Box<dyn Any + Send + Sync>,
);

impl SharedMemory {
    /// Memory that is handed on as long as `hold` exists.
    #[must_use]
    pub fn new(hold: impl Any + Send + Sync) -> Self {
        Self(Box::new(hold))
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedMemory")
    }
}
