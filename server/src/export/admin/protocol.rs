//! What is asked and answered at an admin socket, each as one line of JSON.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::SavedExport;
use crate::door::ownership::{KeptFor, OwnershipState};
use crate::door::ublk::DataPath;
use crate::door::vhost::SessionState;
use crate::engine::SnapshotStep;
use crate::engine::counters::Totals;
use crate::engine::latency::Latency;
use crate::engine::sandbox;
use crate::engine::throttle::RateLimits;

/// A request may be this long.
pub(super) const MAX_LINE_BYTES: usize = 64 << 10;

/// An answer may be this long.
pub(super) const MAX_ANSWER_BYTES: usize = 16 << 20;

/// How long `stop` waits for a program that has the block device open, and how often it tries. As libdevmapper does.
pub const OPEN_LIMIT: Duration = Duration::from_secs(5);

/// How often it is looked whether it still is.
pub const OPEN_INTERVAL: Duration = Duration::from_millis(200);

/// The version of what is said here. Within one, fields and events are added, and nothing else changes (docs/admin.md).
pub const SCHEMA: u32 = 1;

/// What a client asks, and of which export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The export. At its own socket it may be left out; at the socket of a server that stands for all of them.
    pub export: Option<String>,
    /// What is asked.
    pub command: Command,
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    ///
    /// When it is none. Unknown fields are refused: a client that asks for something new must not believe that it was
    /// done.
    pub fn parse(line: &str) -> serde_json::Result<Self> {
        let mut fields: serde_json::Map<String, Value> = serde_json::from_str(line)?;
        let export = fields.remove("export").filter(|export| !export.is_null());
        Ok(Self {
            export: export.map(serde_json::from_value).transpose()?,
            command: serde_json::from_value(Value::Object(fields))?,
        })
    }

    /// As a line without its end.
    ///
    /// # Errors
    ///
    /// None: all of it can be written.
    pub fn line(&self) -> serde_json::Result<String> {
        let mut fields = serde_json::to_value(&self.command)?;
        if let Some(export) = &self.export {
            fields["export"] = Value::String(export.clone());
        }
        serde_json::to_string(&fields)
    }
}

impl From<Command> for Request {
    fn from(command: Command) -> Self {
        Self {
            export: None,
            command,
        }
    }
}

/// What a client asks. All have braces: serde refuses unknown fields of those only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
pub enum Command {
    /// How is the export?
    Stat {},
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
    Leave {},
    /// Give it another size.
    Resize {
        /// Which; that of the storage if there is none.
        size_bytes: Option<u64>,
        /// Whether something may be cut off.
        shrink: bool,
    },
    /// Do a step of a snapshot of its image.
    Snapshot {
        /// Which.
        step: SnapshotStep,
    },
    /// Change options while it is served.
    Set {
        /// Key and value of each, as in a SPEC; `log` is that of the server.
        options: BTreeMap<String, String>,
    },
    /// Which server is this? Only at the socket of a server.
    Server {},
    /// Serve one more export. Only at the socket of a server, for its user and root.
    Add(Box<NewExport>),
    /// Tell what happens from now on, a line for each event, until the client hangs up.
    Events {},
}

/// An export that is to be added, opened by the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewExport {
    /// What is to be served, as in the note `served`.
    pub served: SavedExport,
    /// Which of the server's spare folders has become that of the export; none, if it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spare: Option<u32>,
    /// The mark with which its block device is to be made, if there is to be one: a random number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<u64>,
    /// The marks of block devices that a dead server of the name may have left.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_marks: Vec<u64>,
    /// The descriptors that come with the first byte of the request, in their order.
    pub descriptors: Vec<HandedOver>,
}

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandedOver {
    /// The file `lock` of the export's folder, locked.
    Lock,
    /// The export's admin socket, listening.
    Control,
    /// The vhost-user socket, listening.
    VhostUserBlk,
    /// The image.
    Image,
}

/// What a confined server has the client of `add` open while it opens the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// The character device of the ublk device with this number, where the server reaches it.
    UblkDevice(u32),
    /// The socket of the entry in the registry of upgrades for the disk of the ublk device with this number.
    UpgradeEntry(u32),
}

/// A line before the answer to `add`. The client answers with [`Opened`] or [`Refused`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Wants {
    pub(super) wants: Wanted,
}

/// It is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Opened {
    pub(super) opened: bool,
}

/// The first line of an answer to `events`, and each line that tells of a gap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum StreamLine {
    /// The stream begins.
    Begin {
        /// [`SCHEMA`].
        schema: u32,
        /// Version of the server.
        version: String,
    },
    /// Events were dropped because this client read too slowly.
    Lost {
        /// How many.
        count: u64,
    },
}

/// What a server says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Its version.
    pub version: String,
    /// Its name.
    pub server: String,
    /// Its process.
    pub pid: u32,
    /// When it was started, in seconds since 1970-01-01 UTC.
    pub started_unix_seconds: u64,
    /// How it is confined.
    pub sandbox: sandbox::Status,
    /// Whether an export that is added may have a block device.
    #[serde(default)]
    pub makes_block_devices: bool,
    /// Lines of its log that could not be written.
    pub lost_log_lines: usize,
    /// Its exports.
    pub exports: Vec<String>,
}

/// What a server answers to `stat` for all its exports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllStatus {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Each export.
    pub exports: Vec<ExportStatus>,
}

/// What an export says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// [`SCHEMA`]; zero for servers before there was one.
    #[serde(default)]
    pub schema: u32,
    /// Version of the server.
    #[serde(default)]
    pub version: String,
    /// Name of the server.
    #[serde(default)]
    pub server: String,
    /// When the export was opened, in seconds since 1970-01-01 UTC.
    #[serde(default)]
    pub started_unix_seconds: u64,
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
    /// What clients may do, if that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<RateLimits>,
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
    /// Requests that have not ended.
    #[serde(default)]
    pub in_flight: u64,
    /// What it did.
    pub counters: Totals,
    /// How long that took, for each kind of requests that there were.
    #[serde(default)]
    pub latency: Vec<Latency>,
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
    /// Requests that have not ended.
    #[serde(default)]
    pub in_flight: u64,
    /// What it did, ended sessions included.
    pub counters: Totals,
    /// How long that took, for each kind of requests that there were.
    #[serde(default)]
    pub latency: Vec<Latency>,
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

#[derive(Serialize, Deserialize)]
pub(super) struct Changed {
    pub(super) changed: bool,
}

/// What became of a disk that got another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

/// An answer, or why there is none.
pub(super) fn answer_with<A: Serialize>(result: Result<A>) -> serde_json::Result<String> {
    match result {
        Ok(answer) => serde_json::to_string(&answer),
        Err(error) => serde_json::to_string(&Refused {
            error: crate::export::explain(&error),
        }),
    }
}

/// What an answer says, if it is not a refusal.
pub(super) fn understand<A: for<'a> Deserialize<'a>>(line: &str) -> Result<A> {
    if let Ok(Refused { error }) = serde_json::from_str(line) {
        bail!("{error}");
    }
    serde_json::from_str(line).context("the answer makes no sense (another version?)")
}
