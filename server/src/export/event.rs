//! What happens to a running server.

use std::fmt;

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

/// What happens to a running server.
#[derive(Debug)]
pub enum Event {
    /// An export has ended.
    Ended {
        /// Its name.
        name: String,
        /// Whether all its requests had ended before.
        in_order: bool,
    },
    /// The program for as long as which the exports are served has ended.
    ProgramEnded,
    /// A signal that asks the server to end.
    Signal(i32),
    /// A command asked to stop this export.
    Stop {
        /// The export.
        name: String,
    },
    /// A server asked for this export.
    Leave {
        /// The export.
        name: String,
    },
    /// A door closed by itself.
    Closed {
        /// The export.
        name: String,
        /// Which of its doors.
        door: Door,
        /// Why.
        why: String,
    },
}
