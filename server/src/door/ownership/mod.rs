//! Who may write to an export: the ublk door, or one client of the vhost door.
//!
//! ```text
//! block ── a client starts its first vring ──▶ draining ──▶ upgraded ── it left ──▶ draining ──▶ block
//!                                                              └─ it crashed ──▶ waiting ── grace over ──▶ block
//!                                                                                   └── it comes back ──▶ upgraded
//! ```
//!
//! Where clients may move (`--migration`), one that has stopped for a live migration keeps the disk, and
//! the next one that starts a vring takes it over.
//!
//! A client that has only connected has no part in this: it may ask for features and configuration
//! (what `probe` does) and must not disturb users of the block device. A client has *left* if it
//! stopped all its vrings before it disconnected; anything else is a crash, and then the disk is kept
//! for it for a while. Which client has the disk is noted before it may write, so that the next server
//! keeps the disk for it if this one dies.
//!
//! A client is recognised by the in-flight memory that it presents, and without that by its process.
//! A client that another one succeeded in a migration does not get the disk again: its guest runs
//! elsewhere.
//!
//! Every write that one side accepted is complete before the other side may write. A read-only disk
//! is shared by all.

mod identity;
mod lease;
#[cfg(test)]
mod model;
mod note;
mod state;
mod taking;
#[cfg(test)]
mod tests;
mod types;

pub use identity::{Identity, MemoryId};
pub use lease::Lease;
pub use note::ClientNote;
pub use state::Ownership;
pub use types::{BlockDoor, Client, KeptFor, OwnershipState, Refused};
