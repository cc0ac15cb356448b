//! The loop that moves requests between a door and a storage, and what it needs: the traits that
//! both implement, polling, where threads run, counters, messages between threads.

pub mod counters;
pub mod cpus;
pub mod crash;
mod door;
pub mod mailbox;
pub mod polling;
pub mod queue_thread;
mod storage;
pub mod threads;

pub use door::{DoorQueue, Next};
pub use storage::{RingBuffers, Storage, StorageControl, StorageQueue};
