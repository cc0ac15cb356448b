//! What happens to a running server.

use std::fmt;

use super::addition::{Addition, Answer};

/// Which door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `/dev/ublkbN`.
    Ublk,
    /// The vhost-user-blk socket.
    Vhost,
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ublk => "ublk",
            Self::Vhost => "vhost-user-blk",
        })
    }
}

/// What happens to a running server. Exports are told apart by [numbers](super::Export::number): another one may have the
/// name by now.
#[derive(Debug)]
pub enum Event {
    /// An export has ended.
    Ended {
        /// The number that it got when it began to end.
        number: u64,
        /// Whether all its requests had ended before.
        in_order: bool,
    },
    /// The program for as long as which the exports are served has ended.
    ProgramEnded,
    /// A signal that asks the server to end.
    Signal(i32),
    /// A command asked to serve one more export.
    Add {
        /// The export.
        addition: Box<Addition>,
        /// Who waits for it.
        answer: Answer,
    },
    /// An export that was added is served, or is not.
    Added,
    /// A command asked to stop this export.
    Stop {
        /// The number of the export.
        export: u64,
    },
    /// A server asked for this export.
    Leave {
        /// The number of the export.
        export: u64,
    },
    /// Another server has taken the storage of an export.
    Fenced {
        /// The export.
        export: u64,
        /// By whom.
        why: String,
    },
    /// Another program may have changed the size of the storage of an export.
    StorageChanged {
        /// The number of the export.
        export: u64,
    },
    /// A door closed by itself.
    Closed {
        /// The number of the export.
        export: u64,
        /// Which of its doors.
        door: Door,
        /// Why.
        why: String,
    },
}
