//! A server hands an export over to another one of the same name.
//!
//! The new server checks whether it could serve what the old one serves, as far as that is visible from
//! outside, and only then asks the old one to leave. Once the old one has answered "left", the name, the
//! storage and the block device are free, and requests in flight in the driver and of clients wait.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::admin::{self, ExportStatus};
use super::name_lock::{CONTROL, NameLock};
use super::open::may_open_ublk;
use super::recovery::{Kernel, is_recorded, is_same_storage};
use super::runtime_dir::RuntimeDir;
use crate::config::{DoorMode, ExportConfig, StorageSpec};
use crate::request::format_size;
use crate::storage::{Rbd, VhostUser, identity};

/// What a new server does about an earlier one of the same name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Predecessor {
    /// Goes on with the block device of a dead one. A living one keeps the name.
    #[default]
    Dead,
    /// Asks a living one to leave first.
    TakeOver,
    /// Removes the block device of a dead one, also if it waits for a server. A living one keeps the name.
    Replace,
}

/// How long the old server may take to answer `stat`.
const STAT_LIMIT: Duration = Duration::from_secs(5);

/// How long it may take to finish requests in flight.
const LEAVE_LIMIT: Duration = Duration::from_secs(120);

/// Takes the name of an export, from its living server if there is one.
///
/// # Errors
///
/// When the new server could not serve what the old one serves, or the old one does not leave.
pub(super) fn claim(dir: &RuntimeDir, config: &ExportConfig) -> Result<NameLock> {
    let name = &config.name;
    if !dir.is_alive(name)? {
        return dir.claim(name);
    }
    let control = dir.folder(name).join(CONTROL);
    // A server that hangs up has died or is about to: it has left as well.
    match admin::stat(&control, STAT_LIMIT) {
        Ok(status) => {
            may_succeed(&status, dir.storage(name).as_deref(), config)?;
            if let Some(door) = &status.ublk {
                is_recorded(&Kernel, &door.device, &dir.devices(name)?)?;
            }
        }
        Err(error) if hung_up(&error) => return dir.claim_soon(name),
        Err(error) => return Err(error.context("its server does not answer")),
    }
    match admin::leave(&control, LEAVE_LIMIT) {
        Err(error) if !hung_up(&error) => Err(error.context("its server stays")),
        _ => dir.claim_soon(name),
    }
}

fn hung_up(error: &anyhow::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    let kinds = [
        BrokenPipe,
        ConnectionRefused,
        ConnectionReset,
        NotFound,
        UnexpectedEof,
    ];
    (error.chain().last())
        .and_then(|cause| cause.downcast_ref::<io::Error>())
        .is_some_and(|cause| kinds.contains(&cause.kind()))
}

/// Whether a server with this configuration could take over from another one.
fn may_succeed(old: &ExportStatus, served: Option<&str>, config: &ExportConfig) -> Result<()> {
    if let Some(door) = &old.ublk {
        let device = door.device.display();
        if config.ublk == DoorMode::No || !may_open_ublk(config)? {
            bail!("the ublk door would be closed, and {device} is served");
        }
        if let Some(id) = config.ublk_id
            && !door.device.ends_with(format!("ublkb{id}"))
        {
            bail!("its block device is {device}, not /dev/ublkb{id}");
        }
    }
    if let Some(asked) = config.block_bytes.filter(|asked| *asked != old.block_bytes) {
        bail!(
            "it has blocks of {} bytes, and {asked} were asked for",
            old.block_bytes
        );
    }
    let running = |door: &admin::VhostStatus| door.sessions.iter().any(|one| one.vrings > 0);
    if config.vhost == DoorMode::No && old.vhost.as_ref().is_some_and(running) {
        bail!("the vhost door would be closed, and a client has the disk");
    }
    if old.read_only != config.read_only {
        bail!("read-only or not, it must be as it was");
    }
    let (size_bytes, found) = match &config.storage {
        StorageSpec::Memory { .. } => bail!("what is in memory goes with its server"),
        StorageSpec::Null { size_bytes } => (*size_bytes, None),
        StorageSpec::File { path, .. } => {
            let cannot_open = || format!("cannot open {}", path.display());
            let mut options = File::options();
            let opened = options.read(true).write(!config.read_only).open(path);
            let mut file = opened.with_context(cannot_open)?;
            let size_bytes = file.seek(SeekFrom::End(0)).with_context(cannot_open)?;
            (size_bytes, identity(&file))
        }
        // The daemon of the other server has the image.
        StorageSpec::Qemu(disk) => (old.size_bytes, Some(disk.to_string())),
        StorageSpec::Rbd(image) => Rbd::examine(image)?,
        // The server of the disk has one client at a time, and that is still the other server.
        StorageSpec::VhostUser { socket } => (old.size_bytes, Some(VhostUser::identity(socket))),
    };
    is_same_storage(served, found.as_deref())?;
    if size_bytes < old.size_bytes {
        bail!(
            "the disk would be smaller: {} instead of {}",
            format_size(size_bytes),
            format_size(old.size_bytes)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_hangs_up_at_any_moment_of_a_conversation_is_dying() {
        for errno in [
            libc::ENOENT,
            libc::ECONNREFUSED,
            libc::EPIPE,
            libc::ECONNRESET,
        ] {
            let error = anyhow::Error::from(io::Error::from_raw_os_error(errno));
            assert!(hung_up(&error.context("more of it")), "{errno}");
        }
        let error = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert!(hung_up(&error.into()));
        // An answer that refuses comes from a living server.
        for alive in [
            anyhow::anyhow!("it is being stopped"),
            io::Error::from_raw_os_error(libc::EACCES).into(),
        ] {
            assert!(!hung_up(&alive), "{alive}");
        }
    }
}
