//! What a vhost door shall be, and why it cannot be opened.

use std::io;
use std::sync::Arc;

use crate::door::ownership::Ownership;
use crate::engine::socket::Socket;
use crate::engine::threads::ThreadOptions;
use crate::engine::throttle::Throttle;

/// Vrings one session may have. A vring costs nothing before it is set up.
pub const MAX_VRINGS: u16 = 256;

/// What a door is made of.
#[derive(Debug)]
pub struct VhostConfig {
    /// The name of the export, for messages.
    pub name: String,
    /// Where clients connect.
    pub socket: Socket,
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
    /// The number of queue threads.
    #[error("{0} queue threads per client are not possible; choose 1 to {MAX_VRINGS}")]
    QueueThreads(u16),
    /// Threads or descriptors.
    #[error("cannot start the vhost door: {0}")]
    System(#[from] io::Error),
}
