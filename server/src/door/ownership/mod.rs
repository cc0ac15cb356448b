//! Who may write to an export: the ublk door, or one client of the vhost door.
//!
//! ```text
//! block ── a client starts its first vring ──▶ draining ──▶ upgraded ── it left ──▶ draining ──▶ block
//!                                                              └─ it crashed ──▶ waiting ── grace over ──▶ block
//!                                                                                   └── a client comes ──▶ upgraded
//! ```
//!
//! Where clients may move (`--migration`), one that has stopped for a live migration keeps the disk, and
//! the next one that starts a vring takes it over.
//!
//! A client that has only connected has no part in this: it may ask for features and configuration
//! (what `probe` does) and must not disturb users of the block device. A client has *left* if it
//! stopped all its vrings before it disconnected; anything else is a crash, and then the disk is kept
//! for it for a while.
//!
//! Every write that one side accepted is complete before the other side may write. A read-only disk
//! is shared by all.

mod lease;
mod state;
#[cfg(test)]
mod tests;
mod types;

pub use lease::Lease;
pub use state::Ownership;
pub use types::{BlockDoor, Client, OwnershipState, Refused};
