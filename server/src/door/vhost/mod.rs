//! The vhost door: a vhost-user-blk socket (QEMU's docs/interop/vhost-user.rst, virtio 1.3).
//!
//! A [`VhostDoor`] owns a listening socket, which the event loop watches. Each client gets a session:
//! a protocol thread, and queue threads that are started with the first vring they serve. All of them
//! end with the session, and nothing of it stays.

mod access;
mod config;
mod config_space;
mod connection;
mod dirty;
mod door;
mod fast_path;
mod inflight;
mod memory;
mod message;
mod queue;
mod refusals;
mod request;
mod ring_layout;
mod session;
mod sessions;
mod shared;
mod sigbus;
mod spawn;
#[cfg(feature = "testing")]
pub mod testing;
mod virtqueue;
mod vring;

pub use config::{MAX_VRINGS, StartError, VhostConfig};
pub use door::VhostDoor;
pub use refusals::Refusal;
pub use sessions::{SessionInfo, SessionState};
