//! From a file descriptor to the service socket of the object behind it.

pub mod address;
mod connect;
mod error;
mod listener;
mod object;
mod registry;
mod socket;

pub use address::{FdAddress, Name};
pub use connect::{Answer, Connection, Lookup, Way, connect};
pub use error::{Error, NoService};
pub use listener::{Listener, Options};
pub use object::{Key, Side};
pub use registry::{SYSTEM_RUNTIME_DIR, client_runtime_dirs, own_runtime_dir};
pub use socket::Peer;
