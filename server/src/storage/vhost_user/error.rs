//! Why a vhost-user server cannot be used.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why the disk of a vhost-user server cannot be served. Each names the socket and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// No server listens there.
    #[error("cannot connect to vhost-user:{}: {source}{hint}", socket.display())]
    Connect {
        /// The server's socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The server does not answer, or has hung up.
    #[error("vhost-user:{}: cannot {what}: {why}", socket.display())]
    Step {
        /// The server's socket.
        socket: PathBuf,
        /// The step.
        what: &'static str,
        /// How it failed.
        why: String,
    },
    /// The server's disk cannot be used, or is another one than before.
    #[error("vhost-user:{}: {why}", socket.display())]
    Disk {
        /// The server's socket.
        socket: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
}

impl VhostUserError {
    /// Whether another attempt may succeed: a server that is being started listens late, or has the client of before.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Step { .. } => true,
            Self::Connect { source, .. } => matches!(
                source.raw_os_error(),
                Some(libc::EAGAIN | libc::ECONNREFUSED)
            ),
            Self::Disk { .. } => false,
        }
    }
}

/// Why a message of the protocol has failed, in a user's words.
pub(super) fn explain(error: &vhost::Error, limit: Duration) -> String {
    use vhost::vhost_user::Error as Protocol;
    let vhost::Error::VhostUserProtocol(error) = error else {
        return error.to_string();
    };
    match error {
        Protocol::Disconnected | Protocol::PartialMessage => format!(
            "the server hung up, or did not answer for {} s (it serves one client at a time: another one may have it)",
            limit.as_secs()
        ),
        Protocol::BackendInternalError => "the server refused it".into(),
        other => other.to_string(),
    }
}
