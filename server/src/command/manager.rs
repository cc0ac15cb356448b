//! The service manager that started this program, if one did (sd_notify(3)).

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use sd_notify::NotifyState;

/// Its socket, connected from the start: a server in its sandbox connects to nothing.
#[derive(Debug)]
pub(super) struct Manager(Option<UnixDatagram>);

impl Manager {
    /// Connects to the manager.
    pub(super) fn connect() -> Self {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
            return Self(None);
        };
        let connected = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(&path),
        }
        .and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address).map(|()| socket)
        });
        Self(told(connected))
    }

    /// Tells it something.
    pub(super) fn tell(&self, state: &[NotifyState]) {
        let Some(socket) = &self.0 else { return };
        let lines: String = state.iter().map(|state| format!("{state}\n")).collect();
        told(socket.send(lines.as_bytes()));
    }
}

fn told<T>(result: io::Result<T>) -> Option<T> {
    result
        .inspect_err(|error| tracing::warn!(%error, "cannot tell the service manager"))
        .ok()
}
