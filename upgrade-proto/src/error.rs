//! What can fail, and why a service was not found.

use std::fmt;

use rustix::io::Errno;

/// A failure. "The object has no such service" is not one: see [`NoService`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name of a service is malformed.
    #[error("service name '{name}' is refused: {why}")]
    Name {
        /// The name as it was given, escaped.
        name: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// An fd address is malformed.
    #[error("address '{address}' is refused: {why}")]
    Address {
        /// The address as it was given, escaped.
        address: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Another server offers this service on this object.
    #[error(
        "service '{name}' of {object} is already offered by another server: stop that one first"
    )]
    InUse {
        /// The service.
        name: String,
        /// The object.
        object: String,
    },
    /// The descriptor is of a kind that can carry no service.
    #[error("descriptor {fd} can carry no service: {why}")]
    Unsupported {
        /// The descriptor.
        fd: i32,
        /// The reason.
        why: &'static str,
    },
    /// The registry cannot be trusted as it is.
    #[error("{path} is not trusted: {why}; correct or remove it")]
    Untrusted {
        /// The directory or socket.
        path: String,
        /// The rule it breaks.
        why: String,
    },
    /// A block device is in use.
    #[error("{device} is in use ({cause}): release it first")]
    Claimed {
        /// The device as it was given.
        device: String,
        /// What uses it, as far as is known.
        cause: String,
    },
    /// The names of descriptors, by which a file that was checked is used, are missing.
    #[error("/proc is not mounted here, and without it no file that was checked can be used")]
    NoProc,
    /// A system call failed.
    #[error("cannot {what} {on}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// On what.
        on: String,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl Error {
    pub(crate) fn system(what: &'static str, on: impl fmt::Display, errno: Errno) -> Self {
        Self::System {
            what,
            on: on.to_string(),
            errno,
        }
    }

    /// The error as an errno value, as the C interface reports it.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Name { .. } | Self::Address { .. } => Errno::INVAL,
            Self::InUse { .. } => Errno::ADDRINUSE,
            Self::Unsupported { .. } => Errno::OPNOTSUPP,
            Self::Untrusted { .. } => Errno::PERM,
            Self::Claimed { .. } => Errno::BUSY,
            Self::NoProc => Errno::NOENT,
            Self::System { errno, .. } => *errno,
        }
    }
}

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        error.errno()
    }
}

/// Names what a system call was for.
pub(crate) trait OrCannot<T> {
    /// The result with an error that says what was tried, and on what.
    fn or_cannot(self, what: &'static str, on: impl fmt::Display) -> Result<T, Error>;
}

impl<T> OrCannot<T> for Result<T, Errno> {
    fn or_cannot(self, what: &'static str, on: impl fmt::Display) -> Result<T, Error> {
        self.map_err(|errno| Error::system(what, on, errno))
    }
}

/// Why there is no service to use. The caller keeps using the object that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoService {
    /// No server offers it: neither the kernel nor the registry has the name for this object and side.
    NotOffered,
    /// The kernel knows the service and refuses this caller.
    Refused(Errno),
    /// The descriptor of a writable block device is open for reading only.
    ReadOnlyDescriptor,
    /// The descriptor of a block device is open for writing only.
    WriteOnlyDescriptor,
    /// The registry has an entry that breaks a rule of trust, or a path that cannot be followed; the text says which.
    Untrusted(String),
    /// The registry has an entry, and cannot be used: `/proc` is not mounted here.
    NoProc,
    /// The server is neither root nor the owner of the object.
    ForeignPeer {
        /// The server's user.
        uid: u32,
    },
    /// The process that listens for clients of a disk has ended, and another one has its socket.
    ServerEnded {
        /// The process that ended.
        pid: i32,
    },
    /// The key of the object changed while the connection was made.
    ObjectChanged,
}

impl NoService {
    /// The refusal as one of the values on which clients fall back.
    pub fn errno(&self) -> Errno {
        match self {
            Self::NotOffered | Self::ObjectChanged | Self::ServerEnded { .. } => Errno::CONNREFUSED,
            Self::Refused(errno) => *errno,
            Self::ReadOnlyDescriptor | Self::WriteOnlyDescriptor => Errno::ACCESS,
            Self::Untrusted(_) | Self::ForeignPeer { .. } => Errno::PERM,
            Self::NoProc => Errno::NOENT,
        }
    }
}

impl fmt::Display for NoService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOffered => f.write_str("no server offers this service on this object"),
            Self::Refused(errno) => write!(f, "the kernel refused the connection: {errno}"),
            Self::ReadOnlyDescriptor => {
                f.write_str("the descriptor is read-only and the device is not")
            }
            Self::WriteOnlyDescriptor => {
                f.write_str("the descriptor is write-only, and the service reads too")
            }
            Self::Untrusted(why) => write!(f, "the registry entry is not trusted: {why}"),
            Self::NoProc => write!(f, "{}", Error::NoProc),
            Self::ForeignPeer { uid } => {
                write!(
                    f,
                    "the server runs as user {uid}, which is neither root nor the owner of the object"
                )
            }
            Self::ServerEnded { pid } => {
                write!(
                    f,
                    "the server, process {pid}, has ended, and a process that inherited its socket never answers"
                )
            }
            Self::ObjectChanged => {
                f.write_str("the descriptor stood for another object after connecting")
            }
        }
    }
}
