//! Where the data lives. A storage knows nothing of doors.
//!
//! A [`Storage`](crate::engine::Storage) is the disk as a whole, shared by all threads. Each queue
//! thread makes a [`StorageQueue`](crate::engine::StorageQueue) of its own from it and then needs
//! no lock: a queue puts its work on the thread's ring.

#[cfg(feature = "testing")]
mod escape;
mod failures;
#[cfg(feature = "testing")]
mod fault;
mod file;
mod memory;
mod null;
mod qemu;
mod range_lock;
mod rbd;
mod vhost_user;

#[cfg(feature = "testing")]
pub use escape::VARIABLE as ESCAPE_VARIABLE;
#[cfg(feature = "testing")]
pub use fault::{BadRule, Fault, Rule};
pub use file::{CacheMode, File, FileOptions, ImageFormat, OpenError, identity, open_file};
pub use memory::Memory;
pub use null::Null;
pub use qemu::{
    HELD_LIMIT, Locked as LockedOfImage, NEW_IMAGE, Qemu, QemuDisk, QemuError,
    image_of as qemu_image_of, keep as keep_qemu, lock_image as lock_qemu_image,
};
pub use rbd::{Examined, ImageName, Rbd, RbdError, RbdOptions};
pub use vhost_user::{VhostUser, VhostUserError, VhostUserOptions};
