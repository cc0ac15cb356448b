//! The upgrade: clients that come by the block device's descriptor instead of a socket's path.
//!
//! The vhost door's service is bound to the disk: at the kernel's fd address
//! (`/dev/self/fd/<fd>/vhost-user-blk`) where the kernel has those, and in the registry. Whoever
//! comes that way is a client of the vhost door like any other.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use upgrade_proto::{Key, Listener, Name, Options, Route};

use crate::door::ublk::UblkDoor;

/// The name of the service.
pub const SERVICE: &str = "vhost-user-blk";

/// How long a thread that cannot accept waits before it tries again.
const PAUSE: Duration = Duration::from_secs(1);

/// A service that is offered on a disk. Dropping it ends the offer; clients stay.
#[derive(Debug)]
pub struct UpgradeListener {
    routes: Vec<Route>,
    bell: OwnedFd,
    thread: Option<JoinHandle<()>>,
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
        runtime_dir: &Path,
        adopt: impl Fn(UnixStream) -> io::Result<()> + Send + 'static,
    ) -> Result<Self> {
        let (char_device, (major, minor)) = door
            .char_device()
            .zip(door.disk_number())
            .context("the block device has gone")?;
        let options = Options {
            runtime_dir: Some(runtime_dir.to_owned()),
            key: Some(Key::of_disk(major, minor)?),
            ..Options::default()
        };
        let listener = Listener::bind(&char_device, &Name::new(SERVICE)?, &options)?;
        // The device cannot be removed while this is open.
        drop(char_device);
        if let Some(error) = listener.registry_error() {
            tracing::warn!(export, "no entry in the registry: {error}");
        }
        let routes = listener.routes();
        let bell = eventfd(0, EventfdFlags::CLOEXEC)?;
        let heard = rustix::io::dup(&bell)?;
        let export = export.to_owned();
        let thread = Builder::new()
            .name("upgrade".into())
            .spawn(move || receive(&export, &listener, &heard, adopt))?;
        Ok(Self {
            routes,
            bell,
            thread: Some(thread),
        })
    }

    /// How clients can come, the kernel's way first.
    #[must_use]
    pub fn ways(&self) -> Vec<&'static str> {
        self.routes.iter().map(|route| route.name()).collect()
    }
}

impl Drop for UpgradeListener {
    fn drop(&mut self) {
        // The write fails only if the counter is at its end, and then the bell is ringing anyway.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that receives upgrades panicked");
        }
    }
}

/// Accepts clients until the bell rings.
fn receive(
    export: &str,
    listener: &Listener,
    bell: &OwnedFd,
    adopt: impl Fn(UnixStream) -> io::Result<()>,
) {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(bell, PollFlags::IN),
        ];
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(export, %error, "cannot wait for upgrades");
            return;
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok(Some(client)) => {
                let (route, pid) = (client.route().name(), client.peer().pid);
                tracing::info!(export, pid, "a client comes by the {route}'s way");
                if let Err(error) = adopt(client.into_stream()) {
                    tracing::warn!(export, "a client was refused: {error}");
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(export, %error, "cannot accept a client");
                // Out of descriptors, say: the client stays in the queue and must not make this
                // thread spin. The bell ends the pause.
                let pause = PAUSE.try_into().ok();
                let _ = poll(&mut [PollFd::new(bell, PollFlags::IN)], pause.as_ref());
            }
        }
    }
}
