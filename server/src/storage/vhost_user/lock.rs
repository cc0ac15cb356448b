//! A lock on the disk of a server: some servers (SPDK) take several clients at once, and none of them tells a client that
//! there are others.
//!
//! All exports of a runtime directory share one file. Each locks a byte of it, whose place is made from where the socket
//! lies. The lock goes with the descriptor, however the process ends.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::storage::range_lock;

/// The name of the file in the runtime directory.
const NAME: &str = "vhost-user-disks.lock";

/// The lock, until it is dropped.
#[derive(Debug)]
pub(super) struct Lock(#[allow(dead_code, reason = "its descriptor holds the lock")] File);

/// Locks the disk of the server at `socket`, among those who use `folder`. Exports that cannot write share it.
///
/// # Errors
///
/// [`io::ErrorKind::WouldBlock`] when another export has it.
pub(super) fn lock(folder: &Path, socket: &Path, is_shared: bool) -> io::Result<Lock> {
    let place = place(socket)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(folder.join(NAME))?;
    let kind = match is_shared {
        true => range_lock::Lock::Read,
        false => range_lock::Lock::Write,
    };
    range_lock::set(&file, kind, (place, 1))?;
    Ok(Lock(file))
}

/// The byte of a socket: made from its folder and its name, not from the socket, which its server makes anew.
fn place(socket: &Path) -> io::Result<i64> {
    let socket = fs::canonicalize(socket)?;
    let folder = socket.parent().unwrap_or(Path::new("/"));
    let folder = fs::metadata(folder)?;
    // Without keys: all processes of a release get the same.
    let mut hasher = DefaultHasher::new();
    (folder.dev(), folder.ino(), socket.file_name()).hash(&mut hasher);
    Ok(i64::try_from(hasher.finish() >> 2).unwrap_or(0))
}
