//! The block door: a disk as `/dev/ublkbN`, for every program.
//!
//! [`UblkDoor::start`] adds a device, runs one thread per queue and makes the disk appear. A
//! supervisor thread sleeps until the door is stopped or the device dies by itself (a queue thread
//! failed, or somebody else stopped or deleted the device), and removes the device in either case.
//! Every command to the driver has a time limit.
//!
//! | file              | tells                                            |
//! |-------------------|--------------------------------------------------|
//! | `device.rs`       | the life of a device                             |
//! | `choice.rs`       | what a new device gets of what the driver offers |
//! | `queue.rs`        | commands to requests, outcomes to commits        |
//! | `fence.rs`        | writes, off while a vhost client has the disk    |
//! | `memory.rs`       | descriptors and data buffers                     |
//! | `params.rs`       | what the disk looks like to the block layer      |
//! | `control.rs`      | commands to `/dev/ublk-control`                  |
//! | `features.rs`     | what the driver can do                           |
//! | `stale_device.rs` | devices whose server has died                    |
//! | `users.rs`        | who has a disk open                              |
//! | `owner.rs`        | devices of ordinary users                        |
//!
//! The server never opens its own `/dev/ublkbN`: the last close of it can wait for the server.

mod choice;
mod control;
mod device;
mod error;
mod features;
mod fence;
mod memory;
mod owner;
mod params;
mod queue;
mod stale_device;
mod users;

use std::fs::File;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;

pub use error::{DeviceName, UblkError, Unavailable};
pub use features::{Features, available};
pub use owner::owner;
pub use stale_device::{
    RecoverableDevice, StaleDevice, marked, recoverable_device, remove, stale_devices,
};

use crate::door::ownership::BlockDoor;
use crate::engine::Storage;
use crate::engine::counters::Counters;
use crate::engine::cpus::Cpus;
use crate::engine::threads::ThreadOptions;
use crate::request::SECTOR_SHIFT;
use control::Control;
use device::{Device, Event, Wanted};
use features::features_of;
use fence::WriteGate;
use libublk::sys;

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
    /// Whether the thread of a queue runs only where the requests of that queue come from. If nobody says,
    /// it does where there are several queues and nobody chose processors for the threads or this process.
    pub affinity: Option<bool>,
    /// Whether the kernel looks for partitions when the disk appears.
    pub scan_partitions: bool,
    /// How data gets to the backend and back.
    pub data: DataPath,
    /// Places in a ring's table for the data of requests, if not one for each; the driver cannot
    /// register what finds none. For tests.
    pub ring_places: Option<u16>,
    /// What becomes of the device when its server dies.
    pub recovery: Recovery,
    /// A number by which a new device is known again ([`marked`]); the driver keeps it.
    pub mark: u64,
    /// A device that waits for a server, to be taken over instead of a new one
    /// being made. It keeps its id, its queues and its depth.
    pub take_over: Option<u32>,
    /// Begin without writes; see [`UblkDoor::writes`].
    pub refuse_writes: bool,
}

/// How the data of a request gets to the backend and back.
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
    /// Without a copy if the driver can and the backend does less work for it.
    #[default]
    Auto,
    /// The driver copies between the request's pages and a buffer of the server.
    Copy,
    /// The server copies between the request's pages and its buffer (`UBLK_F_USER_COPY`, Linux 6.5).
    UserCopy,
    /// The driver registers the request's pages with the ring (`UBLK_F_AUTO_BUF_REG`, Linux 6.16).
    ZeroCopy,
}

/// What becomes of a device when its server dies, or leaves it to another.
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
    /// It waits for the next server if the disk outlives this one (a file) and the driver can.
    #[default]
    Auto,
    /// It waits, and requests without an answer are done again (`UBLK_F_USER_RECOVERY_REISSUE`,
    /// Linux 6.1).
    Reissue,
    /// It stays, and requests fail until there is a server again (`UBLK_F_USER_RECOVERY_FAIL_IO`,
    /// Linux 6.12).
    FailIo,
    /// It goes.
    Off,
}

/// What a device turned out to be.
#[derive(Clone, Debug)]
pub struct Facts {
    /// How many queues it has.
    pub queues: u16,
    /// Requests under way per queue at most.
    pub depth: u16,
    /// How data gets to the backend and back; never [`DataPath::Auto`].
    pub data: DataPath,
    /// What it has of what the driver offers.
    pub features: Features,
    /// Where the thread of each queue runs, if it keeps to where the requests come from.
    pub affinity: Option<Vec<Cpus>>,
}

/// How a door ended that nobody stopped.
#[derive(Debug)]
pub enum DoorEnd {
    /// Somebody stopped or deleted the device behind our back. It is removed.
    Outside,
    /// A queue failed, or the device could not be removed.
    Failed(UblkError),
}

/// A disk that is served as `/dev/ublkbN`. Dropping it stops it.
#[derive(Debug)]
pub struct UblkDoor {
    id: u32,
    facts: Facts,
    fence: Arc<WriteGate>,
    /// Weak: the device can be removed only after this file was closed.
    char_device: Weak<File>,
    events: Sender<Event>,
    /// How the device ended; `None` once that was asked. The thread that says so is not joined:
    /// one whose command hangs in the driver cannot exit before the command does.
    result: Option<Receiver<Result<(), UblkError>>>,
}

impl UblkDoor {
    /// Serves `backend`. When this returns, the disk is there.
    ///
    /// `counters` is asked once per queue, on the calling thread. `on_end` is called, on a thread
    /// of the door, if the device ends without having been stopped; it must not wait for the door.
    ///
    /// # Errors
    ///
    /// What failed; no device is left then.
    pub fn start<B: Storage>(
        config: &UblkConfig,
        backend: &Arc<B>,
        counters: impl FnMut() -> Arc<Counters>,
        on_end: impl FnOnce(DoorEnd) + Send + 'static,
    ) -> Result<Self, UblkError> {
        let (mut device, events) = Device::start(config, backend, counters)?;
        let (id, facts) = (device.id(), device.facts().clone());
        let fence = Arc::new(device.fence());
        let char_device = device.char_device();
        let (say, result) = channel();
        let supervise = move || {
            let wanted = device.await_end();
            let mut result = match wanted {
                Wanted::Leave => device.leave(),
                Wanted::Stop | Wanted::Nothing => device.take_down(),
            };
            if wanted == Wanted::Nothing {
                on_end(result.map_or_else(DoorEnd::Failed, |()| DoorEnd::Outside));
                result = Ok(());
            }
            // Before the answer, so that nothing of the device is left when it arrives.
            drop(device);
            let _ = say.send(result);
        };
        thread::Builder::new()
            .name(format!("ublk{id}"))
            .spawn(supervise)
            // The device went down with the closure.
            .map_err(|source| UblkError::Thread { id, source })?;
        Ok(Self {
            id,
            facts,
            fence,
            char_device,
            events,
            result: Some(result),
        })
    }

    /// The number of the device.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What the device turned out to be.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The disk.
    #[must_use]
    pub fn block_path(&self) -> PathBuf {
        format!("/dev/ublkb{}", self.id).into()
    }

    /// The device through which it is served.
    #[must_use]
    pub fn char_path(&self) -> PathBuf {
        char_path(self.id)
    }

    /// The open character device, for binding sockets to the disk. Keep it no longer than that: the
    /// device cannot be removed while it is open. `None` when the device is on its way out.
    #[must_use]
    pub fn char_device(&self) -> Option<Arc<File>> {
        self.char_device.upgrade()
    }

    /// Major and minor number of the disk; `None` when it has gone.
    #[must_use]
    pub fn disk_number(&self) -> Option<(u32, u32)> {
        fence::disk_number(self.id)
    }

    /// The sequence number of the disk; `None` when it has gone.
    #[must_use]
    pub fn disk_sequence(&self) -> Option<u64> {
        disk_sequence(self.id)
    }

    /// Gives the disk another size, which its users see at once.
    ///
    /// # Errors
    ///
    /// When the driver cannot (Linux 6.16 can).
    pub fn resize(&self, capacity_bytes: u64) -> Result<(), UblkError> {
        // While it is open nobody else's device has the number.
        let Some(_open) = self.char_device() else {
            return Err(UblkError::Config(format!(
                "ublk{} has just been removed",
                self.id
            )));
        };
        let control = Control::open()?;
        if !features_of(&control)?.has(sys::UBLK_F_UPDATE_SIZE) {
            return Err(UblkError::Config(
                "this kernel's driver cannot give a disk another size (UBLK_F_UPDATE_SIZE, Linux \
                 6.16)"
                    .into(),
            ));
        }
        control.info(self.id)?;
        control.update_size(self.id, capacity_bytes >> SECTOR_SHIFT)
    }

    /// This door, as far as the right to write goes.
    #[must_use]
    pub fn writes(&self) -> Arc<dyn BlockDoor> {
        Arc::<WriteGate>::clone(&self.fence)
    }

    /// Finishes the requests under way and removes the device. Takes some minutes at the very
    /// most, when everything hangs.
    ///
    /// # Errors
    ///
    /// What did not go as it should. A device that ended by itself reported to `on_end` instead.
    pub fn stop(mut self) -> Result<(), UblkError> {
        self.end()
    }

    /// As [`stop`](Self::stop), in two steps: if nobody has the disk open it goes away and stays away,
    /// and `stop` does the rest. Otherwise nothing happens, and the answer is false.
    ///
    /// A driver before Linux 7.0 cannot be asked; then this looks who has it open and takes nothing
    /// away.
    ///
    /// # Errors
    ///
    /// What the driver answered.
    pub fn close_unless_open(&self) -> Result<bool, UblkError> {
        if !features_of(&Control::open()?)?.has(sys::UBLK_F_SAFE_STOP_DEV) {
            return Ok(self.user().is_none());
        }
        let (reply, answer) = channel();
        // Without an answer it has ended already.
        let asked = self.events.send(Event::StopUnlessOpen(reply));
        match asked.ok().and_then(|()| answer.recv().ok()) {
            None | Some(Ok(())) => Ok(true),
            Some(Err(error)) if error.is_gone() => Ok(true),
            Some(Err(UblkError::Command { source, .. }))
                if source.raw_os_error() == Some(libc::EBUSY) =>
            {
                Ok(false)
            }
            Some(Err(error)) => Err(error),
        }
    }

    /// Who uses the disk: a mount, say, or processes that have it open, as far as we can see.
    #[must_use]
    pub fn user(&self) -> Option<String> {
        let disk = self.disk_number()?;
        upgrade_proto::disk_user(disk.0, disk.1).or_else(|| users::openers(disk))
    }

    /// Whether the device goes on when its server is gone.
    #[must_use]
    pub fn can_be_left(&self) -> bool {
        self.facts.features.has(sys::UBLK_F_USER_RECOVERY)
    }

    /// Leaves the device to another server: the disk stays, its requests wait or fail, as
    /// [`Recovery`] says, until the other one takes it over ([`UblkConfig::take_over`]).
    ///
    /// # Errors
    ///
    /// What did not go as it should; the device stays all the same.
    pub fn leave(mut self) -> Result<(), UblkError> {
        self.end_by(Event::Leave)
    }

    fn end(&mut self) -> Result<(), UblkError> {
        self.end_by(Event::Stop)
    }

    fn end_by(&mut self, event: Event) -> Result<(), UblkError> {
        let Some(result) = self.result.take() else {
            return Ok(());
        };
        // Without a receiver it has ended already.
        let _ = self.events.send(event);
        result.recv().unwrap_or_else(|_| {
            Err(UblkError::Queue {
                id: self.id,
                queue: 0,
                reason: "the thread that removes the device panicked".to_owned(),
            })
        })
    }
}

impl Drop for UblkDoor {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!("{error}");
        }
    }
}

/// The sequence number of `/dev/ublkbN`: no other disk has it until the next boot.
#[must_use]
pub fn disk_sequence(id: u32) -> Option<u64> {
    fence::disk_sequence(id)
}

/// The character device with this number.
fn char_path(id: u32) -> PathBuf {
    format!("/dev/ublkc{id}").into()
}
