//! The ublk door: a disk as `/dev/ublkbN`, for every program.
//!
//! [`UblkDoor::start`] adds a device, runs one thread per queue and makes the disk appear. If the
//! device dies by itself (a queue thread failed, or another process stopped or deleted the device),
//! the first queue thread that has ended removes it. Every command to the driver has a time limit.
//!
//! | file               | tells                                            |
//! |--------------------|--------------------------------------------------|
//! | `config.rs`        | what a device shall be, and what it turned out to be |
//! | `door.rs`          | the door as the rest of the server sees it       |
//! | `device.rs`        | the life of a device                             |
//! | `queue_threads.rs` | its queue threads, and how they end              |
//! | `choice.rs`        | what a new device gets of what the driver offers |
//! | `queue.rs`         | commands to requests, outcomes to commits        |
//! | `refusals.rs`    | the log's lines about requests that are refused  |
//! | `gate.rs`, `writes.rs` | writes, off while a vhost client has the disk |
//! | `memory.rs`        | descriptors and data buffers                     |
//! | `params.rs`        | what the disk looks like to the block layer      |
//! | `control/`         | commands to `/dev/ublk-control`                  |
//! | `features.rs`      | what the driver can do                           |
//! | `stale_device.rs`  | devices of servers that were killed              |
//! | `paths.rs`         | where devices are, and their numbers             |
//! | `users.rs`         | who has a disk open                              |
//! | `owner.rs`, `privileges.rs` | devices of ordinary users               |
//!
//! The server never opens its own `/dev/ublkbN`: the last close of it can wait for the server.

mod choice;
mod config;
mod control;
mod device;
mod door;
mod error;
mod features;
mod gate;
mod memory;
mod owner;
mod params;
mod paths;
mod privileges;
mod queue;
mod queue_threads;
mod refusals;
mod stale_device;
mod users;
mod writes;

pub use config::{DataPath, DoorEnd, Facts, NodeElsewhere, Recovery, UblkConfig};
pub use control::available;
pub use door::UblkDoor;
pub use error::{DeviceName, UblkError, Unavailable};
pub use features::Features;
pub use owner::{is_marked, mark, owner};
pub use stale_device::{DeviceState, device_state, marked, remove, stale_devices, waiting_devices};
pub use users::openers_of;
