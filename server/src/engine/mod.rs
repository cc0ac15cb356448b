//! The loop that moves requests between a door and a storage, and what it needs: the traits that
//! both implement, polling, where threads run, counters, messages between threads.

pub mod counters;
pub mod cpus;
pub mod crash;
mod door;
mod end;
pub mod event_loop;
mod listen;
pub mod mailbox;
pub mod open_files;
pub mod polling;
pub mod queue_thread;
mod spawn;
mod storage;
pub mod threads;
pub mod wait;

pub use door::{DoorQueue, Next};
pub use end::End;
pub use listen::{Accept, listen};
pub use spawn::{Spawned, spawn_queue};
pub use storage::{RingBuffers, Storage, StorageControl, StorageQueue};
