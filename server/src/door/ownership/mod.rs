//! Who may write to an export: the block door, or one client of the vhost door.
//!
//! ```text
//! block ── a client starts its first vring ──▶ draining ──▶ upgraded ── it left ──▶ draining ──▶ block
//!                                                              └─ it died ──▶ waiting ── grace over ──▶ block
//!                                                                                └── a client comes ──▶ upgraded
//! ```
//!
//! Where clients may move (`--migration`), one that has stopped for a live migration keeps the disk, and
//! the next one that starts a vring takes it over.
//!
//! A client that has only connected has no part in this: it may look (what `probe` does) and must
//! not disturb those who use the block device. A client *left* when it had stopped all its vrings
//! before it hung up; anything else is dying, and then the disk is kept for it for a while.
//!
//! Every write that one side accepted is complete before the other side may write. A disk that
//! nobody may write to is shared by all.

mod lease;
mod state;
#[cfg(test)]
mod tests;
mod types;

pub use lease::Lease;
pub use state::Ownership;
pub use types::{BlockDoor, Client, OwnershipState, Refused};
