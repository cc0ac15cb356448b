//! From a file descriptor to the service socket of the object behind it.
//!
//! A program has a pipe or a block device open. The program at the other end, or the server of the disk, may offer
//! something better than read(2) and write(2): a ring in shared memory, vhost-user. This crate connects the two. Nothing
//! is configured; the descriptor is the address:
//!
//! ```no_run
//! use upgrade_proto::{Answer, Lookup, Name, connect};
//!
//! let disk = std::fs::File::options().read(true).write(true).open("/dev/ublkb0")?;
//! match connect(&disk, &Name::new("vhost-user-blk")?, &Lookup::default())? {
//!     Answer::Found(connection) => println!("by the {:?}", connection.route()),
//!     Answer::NoService(why) => println!("staying with the block device: {why}"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! There are two routes. The *kernel's* is an `AF_UNIX` address, `/dev/self/fd/<fd>/<name>`, on kernels that
//! have fd addresses. The *registry's* is a directory of sockets, for all others. [`connect`] and
//! [`Listener`] try both and say which one it was.
//!
//! # Guarantees
//!
//! - A missing service is a value ([`Answer::NoService`]), not an error, and says why.
//! - A connection belongs to the object that the descriptor stood for throughout the call: a key that
//!   changed meanwhile is [`NoService::ObjectChanged`].
//! - A client follows no symlink in the registry, uses nothing there that another user (except root) owns
//!   or may write to, and connects to the very inode that it checked.
//! - The server behind a registry entry, and of a disk by either route, is root or the owner of the object.
//! - On a pipe only complementary ends meet.
//! - One service of one object has one server; of two that bind at once, one gets [`Error::InUse`].
//! - Neither side keeps the object's descriptor: a listener keeps no pipe open and no disk busy.
//! - A kernel's refusal is not worked around through the registry.
//! - [`BlockUpgrade`]: while it lives, a writable disk is claimed exclusively. What was written to the
//!   disk before has reached the server when the connection is made, and pages that were cached
//!   meanwhile are dropped at the end.
//!
//! # Limits
//!
//! - A registry entry is for root and the server's own user; others need the kernel's route.
//! - Inode numbers of pipes are 32 bits wide and wrap: a registry entry that outlives its pipe by four billion inodes
//!   could be found for another pipe. A listener should end with its pipe.
//! - Without CAP_SYS_ADMIN the page cache is dropped by posix_fadvise(2), which leaves pages that another
//!   process has mapped.

pub mod address;
mod block;
mod claim;
mod connect;
mod error;
pub mod ffi;
mod listener;
mod object;
mod registry;
mod socket;
mod text;
mod trusted;

pub use address::{FdAddress, Name};
pub use block::{BlockUpgrade, DiskClaim};
pub use claim::disk_user;
pub use connect::{Answer, Connection, Lookup, Route, connect};
pub use error::{Error, NoService};
pub use listener::{Listener, Options};
pub use object::{Key, Side};
pub use registry::{
    SYSTEM_RUNTIME_DIR, client_runtime_dirs, own_runtime_dir, publish, remove_stale_entries,
    stale_entries,
};
pub use socket::{Peer, connect_within};
pub use text::printable;
pub use trusted::TrustedDir;
