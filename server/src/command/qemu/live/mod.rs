//! `ublkup qemu --live`: a running guest's disk moves from the block device to the service behind it, or back.
//!
//! The guest's `virtio-blk` on `/dev/ublkbN` is unplugged, and when it is gone, a `vhost-user-blk` is plugged in under
//! the same id in the same place. The guest sees its disk disappear and come back. In this order no write that QEMU
//! accepted can be lost: the old device is gone and its block node closed, which flushes, before the new one exists.
//! If a step after the unplugging fails, the old device is plugged in again.
//!
//! | file          | tells                                                              |
//! |---------------|--------------------------------------------------------------------|
//! | `disk.rs`     | finding the disk, and what has to be true of the guest              |
//! | `peer.rs`     | the process behind the monitor, and which disks it may use already |
//! | `watch.rs`    | whether the guest is using the disk                                |
//! | `claims.rs`   | the claimed descriptors that QEMU was given, and the notes on them  |
//! | `exchange.rs` | unplugging one device and plugging another one in                  |
//! | `refusal.rs`  | reasons not to begin                                               |

mod claims;
mod disk;
mod exchange;
mod peer;
mod refusal;
mod watch;

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::fs::{Mode, OFlags, open};
use upgrade_proto::{DiskClaim, Key};

use self::claims::{Given, Note, give, given, take_back};
use self::disk::{Disk, Plugged, Wanted, check_memory, expect_running, find, plugged};
use self::exchange::{Attached, Interrupted, exchange, has_chardev, or_unknown};
use self::peer::{Access, Named, Peer, block_number};
use self::refusal::{NotUpgradable, refuse};
use self::watch::expect_quiet;
use super::disk::registry_entry;
use crate::command::cli::NOT_UPGRADABLE;
use crate::command::complain;
use crate::command::probe::{Found, lookup, service};
use crate::engine::qmp::{Qmp, Refusal, Unanswered};
use crate::export::explain;

/// What `ublkup qemu --live` is asked for.
#[derive(Debug)]
pub struct Move<'a> {
    /// The guest's monitor.
    pub monitor: &'a Path,
    /// The device's id, its block node, or the block device's path.
    pub disk: &'a str,
    /// From the service to the block device.
    pub back: bool,
    /// How long the disk must have been without a request.
    pub quiet: Duration,
    /// Where to look for services first.
    pub runtime_dir: Option<&'a Path>,
}

/// Moves a disk.
///
/// # Errors
///
/// When QEMU or the device cannot be used, or a step failed; the message says in which state the
/// guest is.
pub fn move_disk(asked: &Move<'_>) -> Result<ExitCode> {
    let mut qmp = Qmp::connect(asked.monitor)?;
    let moved = match asked.back {
        true => move_back(&mut qmp, asked),
        false => upgrade(&mut qmp, asked),
    };
    let disk = asked.disk;
    match moved {
        Ok(said) => {
            complain(&said);
            Ok(ExitCode::SUCCESS)
        }
        Err(error) if error.is::<NotUpgradable>() => {
            complain(&format!("{disk}: not moved: {error}; nothing was changed"));
            Ok(NOT_UPGRADABLE.into())
        }
        Err(error) => Err(error.context(disk.to_owned())),
    }
}

fn upgrade(qmp: &mut Qmp, asked: &Move<'_>) -> Result<String> {
    let peer = Peer::of(qmp.stream())?;
    expect_running(qmp)?;
    let device = device_named(asked.disk)?;
    let wanted = wanted(asked, device.as_ref());
    tidy_up(qmp, &peer, wanted)?;
    let old = find(qmp, &peer, wanted)?;
    check_memory(qmp)?;
    let Named { path, number, copy } = match device {
        Some(device) => device,
        None => peer.block_device(&old.filename)?,
    };
    // Before it is opened: what a stranger names is not opened at all.
    peer.expect_open(&path, Access::Read, |fd| block_number(fd) == Some(number))?;
    let place = copy
        .as_ref()
        .map(|copy| format!("/proc/self/fd/{}", copy.as_raw_fd()));
    let claim = DiskClaim::open(place.as_ref().map_or(&path, Path::new))
        .map_err(|error| NotUpgradable(error.to_string()))?;
    // QEMU's locks on the device end with the last copy of its descriptor.
    drop(copy);
    let access = match claim.is_read_only() {
        true => Access::Read,
        false => Access::ReadWrite,
    };
    // What was opened counts. A number can be another disk's meanwhile; its sequence number cannot.
    let key = Key::of(&claim)?;
    peer.expect_open(&path, access, |fd| Key::of(fd).is_ok_and(|it| it == key))?;
    let connection = match service(&claim, &lookup(asked.runtime_dir))? {
        Found::Service(connection) => connection,
        Found::Nothing(why) => return refuse(why),
        Found::Taken => return refuse("another client has the disk"),
    };
    expect_quiet(qmp, &old, asked.quiet)?;
    let entry = registry_entry(&connection).map_err(|error| NotUpgradable(explain(&error)))?;
    let interrupted = Interrupted::listen()?;
    let route = connection.route().name();
    // QEMU keeps the claim until the disk moves back, and finds the service again through it.
    let note = Note { disk: old, entry };
    let given = give(qmp, &claim, note).map_err(|error| match error.is::<Refusal>() {
        true => error,
        false => error.context(format!("QEMU may have a descriptor of {}", path.display())),
    })?;
    // The server takes one client at a time.
    drop(connection);
    let (old, address) = (&given.note.disk, given.address());
    let (from, to) = (Attached::Block(old), Attached::Service(old, &address));
    let settle = || Ok(claim.settle()?);
    if let Err(error) = or_unknown(exchange(qmp, &interrupted, from, to, settle)) {
        return Err(give_up(qmp, &given, &path, error));
    }
    Ok(format!(
        "{}: upgraded by the {route} route: the guest has its disk back, as vhost-user-blk-pci '{}'",
        path.display(),
        old.id()
    ))
}

/// Ends the claim after a move that failed, if it is known that the guest does not have the service.
fn give_up(qmp: &mut Qmp, given: &Given, path: &Path, error: anyhow::Error) -> anyhow::Error {
    if error.is::<Unanswered>() {
        return error;
    }
    match take_back(qmp, given) {
        Ok(()) => error,
        // Whatever it was: something has changed.
        Err(also) => anyhow!(
            "{error:#}; and QEMU may have kept the claimed descriptor of {} ({also:#})",
            path.display()
        ),
    }
}

fn move_back(qmp: &mut Qmp, asked: &Move<'_>) -> Result<String> {
    let peer = Peer::of(qmp.stream())?;
    expect_running(qmp)?;
    let device = device_named(asked.disk)?;
    let wanted = wanted(asked, device.as_ref());
    let all = given(qmp)?;
    let Some(given) = all.iter().find(|given| is_of(given, wanted, &peer)) else {
        return refuse("no disk of this name was moved by --live");
    };
    let disk = &given.note.disk;
    let address = given.address();
    let (from, to) = (Attached::Service(disk, &address), Attached::Block(disk));
    let claim = peer.copy(given.fd).map(DiskClaim::from_fd).transpose()?;
    // Other programs may have read the disk meanwhile: those pages are old.
    let settle = || match &claim {
        Some(claim) => Ok(claim.settle()?),
        None => Ok(()),
    };
    let interrupted = Interrupted::listen()?;
    match plugged_now(qmp, disk)? {
        Plugged::Service => or_unknown(exchange(qmp, &interrupted, from, to, settle))?,
        // The move was cut off.
        Plugged::No => or_unknown(plug_back(qmp, from, to, settle))?,
        Plugged::Block => {}
    }
    take_back(qmp, given).context(
        "the guest has the block device, but QEMU may have kept the claim on it: the same command again ends it",
    )?;
    if claim.is_none() {
        complain("the page cache of the block device may hold old data: run blockdev --flushbufs");
    }
    Ok(format!(
        "{}: the guest has its disk on the block device again, as virtio-blk-pci '{}'",
        asked.disk,
        disk.id()
    ))
}

/// How the guest has a disk during a move: under the id of what was plugged in, or as it was before.
fn plugged_now(qmp: &mut Qmp, disk: &Disk) -> Result<Plugged> {
    match plugged(qmp, disk.id())? {
        Plugged::No if disk.id() != disk.device => plugged(qmp, &disk.device),
        known => Ok(known),
    }
}

/// Gives a guest that has neither device the one to go back to.
fn plug_back(
    qmp: &mut Qmp,
    from: Attached<'_>,
    to: Attached<'_>,
    settle: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let plugged = (|| {
        if has_chardev(qmp, from.disk())? {
            from.close(qmp)?;
        }
        settle()?;
        to.plug(qmp)
    })();
    plugged.context("the guest is without the disk")
}

/// The block device, if the user named one by its path. The path is the user's own: it is looked up as it is.
fn device_named(disk: &str) -> Result<Option<Named>> {
    // A path in QEMU's tree of objects.
    if !disk.contains('/') || disk.starts_with("/machine/") {
        return Ok(None);
    }
    let path = PathBuf::from(disk);
    let seen = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| NotUpgradable(format!("cannot look it up: {errno}")))?;
    match block_number(&seen) {
        Some(number) => Ok(Some(Named {
            path,
            number,
            copy: None,
        })),
        None => refuse("it is not a block device"),
    }
}

fn wanted<'a>(asked: &Move<'a>, device: Option<&Named>) -> Wanted<'a> {
    device.map_or(Wanted::Name(asked.disk), |device| {
        Wanted::Device(device.number)
    })
}

/// Whether a descriptor that QEMU was given is of this disk.
fn is_of(given: &Given, wanted: Wanted<'_>, peer: &Peer) -> bool {
    let disk = &given.note.disk;
    match wanted {
        Wanted::Device(number) => {
            peer.copy(given.fd).as_ref().and_then(block_number) == Some(number)
        }
        Wanted::Name(name) => name == disk.device || name == disk.id() || name == disk.node,
    }
}

/// Takes back what moves that were cut off have left in QEMU: a claim that keeps everybody from the disk.
fn tidy_up(qmp: &mut Qmp, peer: &Peer, wanted: Wanted<'_>) -> Result<()> {
    for left in given(qmp)? {
        let disk = &left.note.disk;
        if has_chardev(qmp, disk)? {
            continue;
        }
        let id = disk.id();
        match plugged(qmp, &disk.device)? {
            Plugged::Block => {
                take_back(qmp, &left)?;
                complain(&format!(
                    "{id}: an earlier --live was cut off: took back the claim that it left in QEMU"
                ));
            }
            _ if is_of(&left, wanted, peer) => {
                return refuse(
                    "an earlier --live was cut off when the guest had released the disk: --back gives it the block \
                     device",
                );
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
