//! The loop that moves requests between a door and a storage, and what it needs: the traits that
//! both implement, polling, where threads run, counters, messages between threads.

/// Has a type serialized as the text that it is shown as and parsed from.
macro_rules! serialize_as_text {
    ($name:ty) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

pub mod accounts;
pub mod activation;
pub mod clock;
pub mod counters;
pub mod cpus;
pub mod crash;
mod door;
pub mod durable;
mod end;
pub mod event_loop;
pub mod events;
pub mod inbox;
pub mod io_flusher;
pub mod latency;
pub mod line;
mod listen;
pub mod log;
pub mod mailbox;
pub mod open_files;
pub mod polling;
pub mod process;
pub mod qmp;
pub mod queue_thread;
pub mod repeats;
pub mod sandbox;
mod sharing;
pub mod socket;
mod spawn;
mod storage;
pub mod threads;
pub mod throttle;
pub mod wait;

pub use door::{DoorQueue, Next};
pub use end::End;
pub use listen::{Accept, listen};
pub use sharing::{MappedFile, SharedMemory, Sharing};
pub use spawn::{Spawned, spawn_queue};
pub use storage::{
    Changed, Fenced, RingBuffers, SnapshotProgress, SnapshotStep, Storage, StorageControl,
    StorageQueue,
};
