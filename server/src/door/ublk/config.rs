//! What a ublk device shall be, and what it turned out to be.

use std::path::PathBuf;
use std::sync::Arc;
use std::{fmt, io};

use super::error::UblkError;
use super::features::Features;
use crate::engine::cpus::Cpus;
use crate::engine::threads::ThreadOptions;
use crate::engine::throttle::Throttle;

/// What a ublk device shall be.
#[derive(Clone, Debug)]
pub struct UblkConfig {
    /// Its number; `None` lets the driver choose.
    pub id: Option<u32>,
    /// Queues, each served by a thread. The driver makes no more than the machine has CPUs.
    pub queues: u16,
    /// Requests under way per queue, 4096 at most.
    pub depth: u16,
    /// How queue threads run.
    pub threads: ThreadOptions,
    /// What clients may do.
    pub throttle: Arc<Throttle>,
    /// Whether the thread of a queue runs only where the requests of that queue come from. By default
    /// it does with several queues, unless processors are chosen for the threads or for this process.
    pub affinity: Option<bool>,
    /// Whether the kernel looks for partitions when the disk appears.
    pub scan_partitions: bool,
    /// How data gets to the storage and back.
    pub data: DataPath,
    /// Places in a ring's table for the data of requests, if not one for each; the driver cannot
    /// register what finds none. For tests.
    pub ring_places: Option<u16>,
    /// What becomes of the device when its server dies.
    pub recovery: Recovery,
    /// A number by which a new device is known again ([`marked`](super::marked)); the driver keeps it.
    pub mark: u64,
    /// A device that waits for a server, to be taken over instead of a new one
    /// being made. It keeps its id, its queues and its depth.
    pub take_over: Option<u32>,
    /// Begin without writes; see [`UblkDoor::writes`](super::UblkDoor::writes).
    pub refuse_writes: bool,
    /// Where the character device is, if this process does not reach all of `/dev`.
    pub elsewhere: Option<NodeElsewhere>,
}

/// A character device that another process makes reachable.
#[derive(Clone)]
pub struct NodeElsewhere {
    /// The folder into which it links the device, for a moment.
    pub folder: PathBuf,
    /// Has it link the device with this number.
    pub link: Arc<dyn Fn(u32) -> io::Result<()> + Send + Sync>,
}

impl fmt::Debug for NodeElsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NodeElsewhere").field(&self.folder).finish()
    }
}

/// How the data of a request gets to the storage and back.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum DataPath {
    /// Without a copy if the driver can and the storage does less work for it.
    #[default]
    Auto,
    /// The driver copies between the request's pages and a buffer of the server.
    Copy,
    /// The server copies between the request's pages and its buffer (`UBLK_F_USER_COPY`, Linux 6.5).
    UserCopy,
    /// The driver registers the request's pages with the ring (`UBLK_F_AUTO_BUF_REG`, Linux 6.16).
    ZeroCopy,
}

/// What happens to a device when its server dies or leaves it to another one.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Recovery {
    /// As reissue if the data outlives the server (a file) and the driver can, else as off.
    #[default]
    Auto,
    /// It stays, and requests wait for the next server, which also serves those that were in flight
    /// (`UBLK_F_USER_RECOVERY_REISSUE`, Linux 6.1).
    Reissue,
    /// It stays, and requests fail until there is a server again (`UBLK_F_USER_RECOVERY_FAIL_IO`,
    /// Linux 6.12).
    FailIo,
    /// Requests fail, and it is removed.
    Off,
}

/// What a device turned out to be.
#[derive(Clone, Debug)]
pub struct Facts {
    /// How many queues it has.
    pub queues: u16,
    /// Requests under way per queue at most.
    pub depth: u16,
    /// How data gets to the storage and back; never [`DataPath::Auto`].
    pub data: DataPath,
    /// What it has of what the driver offers.
    pub features: Features,
    /// Where the thread of each queue runs, if it keeps to where the requests come from.
    pub affinity: Option<Vec<Cpus>>,
}

/// How a door ended that was not stopped.
#[derive(Debug)]
pub enum DoorEnd {
    /// Another program stopped or deleted the device. It is removed.
    Outside,
    /// A queue failed, or the device could not be removed.
    Failed(UblkError),
}
