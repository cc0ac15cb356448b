//! The words of ownership: who takes part, what `stat` shows, why a client is refused.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::identity::Identity;

/// The ublk door, as far as the right to write goes.
pub trait BlockDoor: Send + Sync {
    /// Refuses writes from now on. Returns when those that were accepted are complete.
    ///
    /// # Errors
    ///
    /// When they are not within `limit`; writes are then accepted as before.
    fn close(&self, limit: Duration) -> Result<(), String>;

    /// Accepts writes again.
    fn open(&self);

    /// What uses the block device so that it cannot be taken away, if that is known: a mounted file
    /// system, say.
    fn in_use(&self) -> Option<String>;
}

/// What `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OwnershipState {
    /// The ublk door may write.
    Block,
    /// There is no ublk door, and no client has the disk.
    Free,
    /// One side finishes its writes before the other may begin.
    Draining,
    /// A vhost client has the disk.
    Upgraded,
    /// The disk is kept for a client that disconnected without stopping.
    Waiting,
    /// A client has stopped for a live migration; another may take the disk over.
    Moving,
    /// The disk is read-only: any number of clients may use it.
    Shared,
}

impl fmt::Display for OwnershipState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Block => "block",
            Self::Free => "free",
            Self::Draining => "draining",
            Self::Upgraded => "upgraded",
            Self::Waiting => "waiting",
            Self::Moving => "moving",
            Self::Shared => "shared",
        })
    }
}

/// Why a client does not get the disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Another client has it.
    #[error("{0} has the disk")]
    Taken(String),
    /// It is kept for another client.
    #[error(
        "the disk is kept for {client} for {seconds} s more (--reconnect-grace): other clients get it after that"
    )]
    Kept {
        /// The client that may come back.
        client: String,
        /// How long it is kept yet.
        seconds: u64,
    },
    /// It is kept for the client to which this one was moving.
    #[error(
        "this client had stopped for a migration, and the disk is kept for the target for {seconds} s more \
         (--reconnect-grace)"
    )]
    Moving {
        /// How long it is kept yet.
        seconds: u64,
    },
    /// This client gave the disk away.
    #[error(
        "another client took the disk over from this one in a migration; it does not get the disk again while the \
         export is served (ublkup stop, then serve, forgets that)"
    )]
    Succeeded,
    /// The block device is in use.
    #[error("the block device is in use ({0}): the writes of a client would go behind its back")]
    InUse(String),
    /// Another server has the storage.
    #[error("{0}")]
    Storage(String),
    /// The ublk door's writes did not end.
    #[error("the ublk door cannot be drained: {0}")]
    Drain(String),
    /// The runtime directory is full, say.
    #[error("cannot note in the runtime directory that a client has the disk: {0}")]
    Note(String),
    /// The export is being opened or closed.
    #[error("the export is not open")]
    NotOpen,
}

/// A client that wants the disk.
#[derive(Clone)]
pub struct Client {
    /// Its name for messages: `session 3 of process 4711`.
    pub name: String,
    /// Whether it is gone already, and only its session has not noticed.
    pub gone: Arc<dyn Fn() -> bool + Send + Sync>,
    /// How it is recognised when it comes back.
    pub identity: Identity,
}

/// For which client a disk is kept that no client has.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct KeptFor {
    /// The client.
    pub client: String,
    /// How long it is kept yet.
    pub seconds: u64,
}
