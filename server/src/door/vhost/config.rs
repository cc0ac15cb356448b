//! What a vhost door shall be, and why it cannot be opened.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::door::ownership::Ownership;
use crate::engine::socket::SocketError;
use crate::engine::threads::ThreadOptions;
use crate::engine::throttle::Throttle;

/// Vrings one session may have. A vring costs nothing before it is set up.
pub const MAX_VRINGS: u16 = 256;

/// What a door is made of.
#[derive(Clone, Debug)]
pub struct VhostConfig {
    /// The name of the export, for messages.
    pub name: String,
    /// Where clients connect.
    pub socket: PathBuf,
    /// Virtqueues that clients are told to use; they may have [`MAX_VRINGS`].
    pub queues: u16,
    /// Queue threads per session, 1 at least and [`MAX_VRINGS`] at most.
    pub queue_threads: u16,
    /// How they run.
    pub threads: ThreadOptions,
    /// What clients may do.
    pub throttle: Arc<Throttle>,
    /// Who may write.
    pub ownership: Arc<Ownership>,
}

/// Why a door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The number of queue threads.
    #[error("{0} queue threads per client are not possible; choose 1 to {MAX_VRINGS}")]
    QueueThreads(u16),
    /// Threads or descriptors.
    #[error("cannot start the vhost door: {0}")]
    System(#[from] io::Error),
}
