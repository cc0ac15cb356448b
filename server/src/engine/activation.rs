//! Sockets that listen already: what the service manager hands over (`sd_listen_fds(3)`).
//!
//! Such a socket belongs to the manager: it was there before this server and stays after it, and clients that connect
//! meanwhile wait instead of failing.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// The sockets that were handed to this process, by `FileDescriptorName=`. To be called once, before anything else opens
/// descriptors.
///
/// # Errors
///
/// When what was handed over is not what the environment says, or two have one name.
pub fn sockets() -> io::Result<BTreeMap<String, OwnedFd>> {
    let mut sockets = BTreeMap::new();
    for (fd, name) in sd_notify::listen_fds_with_names()? {
        // SAFETY: the manager opened it for this process alone (LISTEN_PID), it is open, as it was just marked to be
        // closed on exec, and nothing else here takes it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        if sockets.insert(name.clone(), socket).is_some() {
            return Err(io::Error::other(format!(
                "two sockets are called '{name}': give each its FileDescriptorName="
            )));
        }
    }
    Ok(sockets)
}
