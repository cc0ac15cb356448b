//! How a client is recognised when it comes back.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::engine::process::Process;

/// What a client is recognised by. Both parts outlive a server that dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The in-flight memory that it presents.
    pub memory: Option<MemoryId>,
    /// The process that made the connection.
    pub process: Option<Process>,
}

/// The inode of a memory file. The kernel does not give its number again while the machine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MemoryId {
    pub(super) device: u64,
    pub(super) inode: u64,
}

impl MemoryId {
    /// The id of an open file.
    ///
    /// # Errors
    ///
    /// When the kernel does not tell.
    pub fn of(file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

impl Identity {
    /// Whether a client that presents `other` is the one that was known as this. One that has in-flight memory
    /// is known by that alone: a process may have several clients.
    pub(super) fn is(&self, other: &Self) -> bool {
        match self.memory {
            Some(_) => self.memory == other.memory,
            None => self.process.is_some() && self.process == other.process,
        }
    }

    /// What of this does not fit a client that presents `other` as well: a client and its successor may be
    /// of one process.
    pub(super) fn without(self, other: &Self) -> Self {
        Self {
            memory: self.memory.filter(|_| self.memory != other.memory),
            process: self.process.filter(|_| self.process != other.process),
        }
    }

    /// Whether any of this fits a client that presents `other`.
    pub(super) fn shares(&self, other: &Self) -> bool {
        self.memory.is_some() && self.memory == other.memory
            || self.process.is_some() && self.process == other.process
    }

    /// Whether there is nothing to recognise it by.
    pub(super) fn is_unknown(&self) -> bool {
        *self == Self::default()
    }

    /// The identity of a client that has nothing in flight. It may come back with other memory: QEMU
    /// gets new memory after a reset of the device.
    pub(super) fn at_rest(self) -> Self {
        Self {
            memory: self.memory.filter(|_| self.process.is_none()),
            ..self
        }
    }

    /// What it is recognised by, for messages.
    pub(super) fn by(&self) -> &'static str {
        match self {
            Self {
                memory: Some(_), ..
            } => "known by its in-flight memory",
            Self {
                process: Some(_), ..
            } => "known by its process",
            _ => "not known, so the first client is taken for it",
        }
    }
}
