//! The upgrade: clients that come by the block device's descriptor instead of a socket's path.
//!
//! The vhost door's service is bound to the disk: at the kernel's fd address
//! (`/dev/self/fd/<fd>/vhost-user-blk`) where the kernel has those, and in the registry. A
//! client that comes that way is a client of the vhost door like any other.

use std::fs::metadata;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context, Result};
use rustix::fs::{major, minor};
use upgrade_proto::{Connection, Key, Listener, Name, Options, Route, remove_stale_entries};

use crate::door::ublk::UblkDoor;
use crate::engine::event_loop::Registration;
use crate::engine::repeats::Repeats;
use crate::engine::{Accept, listen};

/// The name of the service.
pub const SERVICE: &str = "vhost-user-blk";

/// The entry in the registry.
pub enum Registry<'a> {
    /// This process makes one in this runtime directory.
    Own(&'a Path),
    /// Another process has made it, and this is its socket.
    Given(OwnedFd),
    /// There can be none.
    None,
}

/// A service that is offered on a disk. Dropping it ends the offer; clients stay.
#[derive(Debug)]
pub struct UpgradeListener {
    routes: Vec<Route>,
    entry: Option<PathBuf>,
    _listening: Registration,
}

impl UpgradeListener {
    /// Offers the service on the disk of `door`; `adopt` gets the connections.
    ///
    /// # Errors
    ///
    /// When neither way can be had, or another server offers the service on this disk.
    pub fn start(
        export: &str,
        door: &UblkDoor,
        registry: Registry<'_>,
        adopt: impl Fn(UnixStream) -> io::Result<()> + Send + 'static,
    ) -> Result<Self> {
        let (char_device, (major, minor)) = door
            .char_device()
            .zip(door.disk_number())
            .context("the block device has gone")?;
        let name = Name::new(SERVICE)?;
        let only_kernel = Options {
            runtime_dir: None,
            ..Options::default()
        };
        let listener = match registry {
            Registry::Given(entry) => {
                Listener::with_entry(&char_device, &name, &only_kernel, entry)?
            }
            Registry::None => Listener::bind(&char_device, &name, &only_kernel)?,
            Registry::Own(runtime_dir) => {
                SWEPT.call_once(|| sweep(runtime_dir));
                let options = Options {
                    runtime_dir: Some(runtime_dir.to_owned()),
                    key: Some(Key::of_disk(major, minor)?),
                    ..Options::default()
                };
                Listener::bind(&char_device, &name, &options)?
            }
        };
        // The device cannot be removed while this is open.
        drop(char_device);
        if let Some(error) = listener.registry_error() {
            tracing::warn!(export, "no entry in the registry: {error}");
        }
        let routes = listener.routes();
        let entry = listener.entry().map(Path::to_owned);
        let what = format!("{export}: upgrade listener");
        let export = export.to_owned();
        let clients = Repeats::new(10);
        let listening = listen(what, listener, move |client: Connection| {
            let (route, pid) = (client.route().name(), client.peer().pid);
            if let Some(omitted) = clients.due(route) {
                tracing::info!(
                    export,
                    pid,
                    "a client connected by the {route} route{omitted}"
                );
            }
            // A refusal is logged by the door.
            let _ = adopt(client.into_stream());
        })?;
        Ok(Self {
            routes,
            entry,
            _listening: listening,
        })
    }

    /// The socket of the entry in the registry, if there is one.
    pub(super) fn entry(&self) -> Option<&Path> {
        self.entry.as_deref()
    }

    /// How clients can come, the kernel's route first.
    #[must_use]
    pub fn ways(&self) -> Vec<&'static str> {
        self.routes.iter().map(|route| route.name()).collect()
    }
}

/// The key of the disk of the ublk device with this number.
///
/// # Errors
///
/// When there is no such disk.
pub(super) fn key_of(number: u32) -> Result<Key> {
    let disk = metadata(format!("/dev/ublkb{number}"))?.rdev();
    Ok(Key::of_disk(major(disk), minor(disk))?)
}

/// Makes the entry in the registry for a disk, for the server that will listen.
///
/// # Errors
///
/// When there can be no entry.
pub(super) fn publish(runtime_dir: &Path, key: &Key) -> Result<OwnedFd> {
    let backlog = Options::default().backlog;
    let name = Name::new(SERVICE)?;
    Ok(upgrade_proto::publish(runtime_dir, key, &name, backlog)?)
}

/// The registry is swept once by each process.
static SWEPT: Once = Once::new();

/// Removes the entries of servers that were killed. Clients and servers do without it.
fn sweep(runtime_dir: &Path) {
    match remove_stale_entries(runtime_dir) {
        Ok(entries) => {
            for entry in entries {
                tracing::info!("{}: removed, its server was killed", entry.display());
            }
        }
        Err(error) => tracing::debug!("the registry is not swept: {error}"),
    }
}

impl Accept for Listener {
    type Client = Connection;

    fn accept_client(&self) -> io::Result<Option<Connection>> {
        self.accept()
            .map_err(|error| io::Error::from(error.errno()))
    }
}
