//! What is asked and answered at an admin socket, each as one line of JSON.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::door::ownership::{KeptFor, OwnershipState};
use crate::door::ublk::DataPath;
use crate::door::vhost::SessionState;
use crate::engine::counters::Totals;
use crate::engine::sandbox;

/// A request may be this long.
pub(super) const MAX_LINE_BYTES: usize = 4096;

/// An answer may be this long.
pub(super) const MAX_ANSWER_BYTES: usize = 1 << 20;

/// How long `stop` waits for a program that has the block device open, and how often it tries. As libdevmapper does.
pub const OPEN_LIMIT: Duration = Duration::from_secs(5);

/// How often it is looked whether it still is.
pub const OPEN_INTERVAL: Duration = Duration::from_millis(200);

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
pub enum Command {
    /// How is the export?
    Stat,
    /// Drain it and take it down.
    Stop {
        /// Also if it is in use.
        #[serde(default)]
        force: bool,
        /// The processes that have the block device open; empty: none that the client can see, missing: it has not
        /// looked. The server cannot, in its sandbox.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        openers: Option<String>,
    },
    /// End serving it, and leave its block device and its clients to another server.
    Leave,
    /// Give it another size.
    Resize {
        /// Which; that of the storage if there is none.
        size_bytes: Option<u64>,
        /// Whether something may be cut off.
        shrink: bool,
    },
}

/// What an export says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// `serving` or `stopping`.
    pub state: String,
    /// Who may write.
    pub access: OwnershipState,
    /// For which client the disk is kept, while its access is `waiting`.
    #[serde(default)]
    pub kept_for: Option<KeptFor>,
    /// The server's process.
    pub pid: u32,
    /// The storage, as a SPEC.
    pub backend: String,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Logical block.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether completed writes need a flush to be durable.
    pub write_cache: bool,
    /// What the disk calls itself.
    pub serial: String,
    /// How long an idle queue thread looks for work, as `--poll-us` says it.
    pub poll_us: String,
    /// The processors of the queue threads, if they have some of their own.
    pub cpus: Option<String>,
    /// How the server is confined.
    #[serde(default)]
    pub sandbox: sandbox::Status,
    /// The last request that the storage failed.
    #[serde(default)]
    pub last_error: Option<String>,
    /// Lines of the server's log that could not be written.
    #[serde(default)]
    pub lost_log_lines: usize,
    /// The ublk door, if it is open.
    pub ublk: Option<UblkStatus>,
    /// The vhost door, if it is open.
    pub vhost: Option<VhostStatus>,
}

/// What the ublk door says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UblkStatus {
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// Hardware queues, each with a thread.
    pub queues: u16,
    /// Requests under way per queue at most.
    pub depth: u16,
    /// How data gets to the storage and back.
    pub data: DataPath,
    /// What it has of what the driver offers, as the driver names it.
    pub features: Vec<String>,
    /// The processors of each queue's thread, if it keeps to where the requests come from.
    pub affinity: Option<Vec<String>>,
    /// What it did.
    pub counters: Totals,
}

/// What the vhost door says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostStatus {
    /// Where it listens.
    pub socket: PathBuf,
    /// Queues that clients are told to use.
    pub queues: u16,
    /// Threads that serve the queues of a client.
    pub threads: u16,
    /// How clients come from the block device: `kernel`, `registry`; empty if they cannot.
    pub upgrade: Vec<String>,
    /// The last client that was turned away.
    #[serde(default)]
    pub refused: Option<RefusalStatus>,
    /// Who is connected.
    pub sessions: Vec<SessionStatus>,
    /// What it did, ended sessions included.
    pub counters: Totals,
}

/// One front-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its process, as the kernel told it when it connected.
    pub pid: Option<i32>,
    /// What it is doing.
    pub state: SessionState,
    /// Virtqueues being served.
    pub vrings: usize,
    /// Seconds since it connected.
    pub age_seconds: u64,
}

/// A front-end that was not admitted, or whose session ended with an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalStatus {
    /// Its process.
    pub pid: Option<i32>,
    /// Why.
    pub why: String,
    /// Seconds since then.
    pub age_seconds: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Stopped {
    pub(super) stopped: bool,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Left {
    pub(super) left: bool,
}

/// What became of a disk that got another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resized {
    /// Its size now.
    pub size_bytes: u64,
    /// Its size before.
    pub old_size_bytes: u64,
    /// Clients of the vhost door that cannot be told.
    pub untold_clients: usize,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Refused {
    pub(super) error: String,
}
