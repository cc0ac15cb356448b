//! The exchange of a guest's disk: one device is unplugged, another one plugged in where it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::disk::{Disk, list};
use super::refusal::{NotUpgradable, refuse};
use crate::command::complain;
use crate::command::qemu::disk::RECONNECT_MS;
use crate::engine::qmp::{Qmp, Refusal, Unanswered, Unplugged};

/// How long a guest may take to release a disk.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);

/// How often a signal is looked for while the guest is waited for.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// Whether a signal asked to end. The second one ends the program at once.
#[derive(Debug, Default)]
pub struct Interrupted(pub(super) Arc<AtomicBool>);

impl Interrupted {
    /// Listens for signals from now on.
    pub fn listen() -> Result<Self> {
        let asked = Arc::<AtomicBool>::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // In this order the first signal finds the flag unset.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))
                .and_then(|_| flag::register(signal, Arc::clone(&asked)))
                .context("cannot handle signals")?;
        }
        Ok(Self(asked))
    }

    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a guest has its disk.
#[derive(Clone, Copy, Debug)]
pub enum Attached<'a> {
    /// As virtio-blk on the block device.
    Block(&'a Disk),
    /// As vhost-user-blk, at the service's address.
    Service(&'a Disk, &'a str),
}

impl<'a> Attached<'a> {
    pub fn disk(self) -> &'a Disk {
        match self {
            Self::Block(disk) | Self::Service(disk, _) => disk,
        }
    }

    /// The device to unplug.
    fn device(self) -> &'a str {
        match self {
            Self::Block(disk) => &disk.device,
            Self::Service(disk, _) => disk.id(),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Block(_) => "the block device",
            Self::Service(..) => "the vhost-user disk",
        }
    }

    /// Closes what was behind the device. For a block device QEMU writes out and flushes all that it accepted.
    pub fn close(self, qmp: &mut Qmp) -> Result<()> {
        match self {
            Self::Block(disk) if disk.node_is_devices_own => Ok(()),
            Self::Block(disk) => {
                (qmp.command("blockdev-del", json!({ "node-name": disk.node }))).map(drop)
            }
            Self::Service(disk, _) => {
                (qmp.command("chardev-remove", json!({ "id": chardev(disk) }))).map(drop)
            }
        }
    }

    /// Plugs the device in, on what is there of it or on a new one.
    pub fn plug(self, qmp: &mut Qmp) -> Result<()> {
        match self {
            Self::Block(disk) => plug_block(qmp, disk),
            Self::Service(disk, address) => plug_service(qmp, disk, address),
        }
    }
}

/// Unplugs `from` and plugs `to` in, or else `from` again. `settle` runs when the guest has neither.
///
/// # Errors
///
/// [`NotUpgradable`] when nothing has changed; otherwise the text says what the guest has. After [`Unanswered`] that is
/// not known, and nothing was undone: what QEMU did not answer it may have done, or do later.
pub fn exchange(
    qmp: &mut Qmp,
    interrupted: &Interrupted,
    from: Attached<'_>,
    to: Attached<'_>,
    settle: impl FnOnce() -> Result<()>,
) -> Result<()> {
    unplug(qmp, interrupted, from)?;
    let exchanged = match interrupted.is_asked() {
        true => Err(anyhow!("interrupted")),
        false => (from.close(qmp))
            .and_then(|()| settle())
            .and_then(|()| to.plug(qmp)),
    };
    let Err(error) = exchanged else {
        return Ok(());
    };
    if error.is::<Unanswered>() {
        return Err(error);
    }
    Err(match from.plug(qmp) {
        Ok(()) => error.context(format!("not moved; the guest has {} back", from.name())),
        Err(also) if also.is::<Unanswered>() => also.context(format!("not moved ({error:#})")),
        Err(also) => error.context(format!(
            "not moved, and {} cannot be given back ({also:#}): the guest is without the disk",
            from.name()
        )),
    })
}

/// Says what to do, if something was not answered after the exchange had begun.
pub fn or_unknown<T>(result: Result<T>) -> Result<T> {
    result.map_err(|error| match error.is::<Unanswered>() {
        true => error.context(
            "it is unknown how the guest has the disk now, and nothing was undone: QEMU keeps the claim on the block \
             device; once QEMU answers, the same command with --back gives the guest the block device",
        ),
        false => error,
    })
}

fn unplug(qmp: &mut Qmp, interrupted: &Interrupted, from: Attached<'_>) -> Result<()> {
    let device = from.device();
    if interrupted.is_asked() {
        return refuse("interrupted");
    }
    qmp.unplug(device)
        .map_err(|error| match error.downcast::<Refusal>() {
            Ok(refusal) => NotUpgradable(refusal.to_string()).into(),
            Err(error) => error,
        })?;
    let deadline = Instant::now() + UNPLUG_LIMIT;
    let mut is_told = false;
    while Instant::now() < deadline {
        match qmp.unplugged(SIGNAL_INTERVAL)? {
            Some(Unplugged::Gone) => return Ok(()),
            Some(Unplugged::Refused) => return refuse("the guest refuses to release the disk"),
            None if interrupted.is_asked() && !is_told => {
                is_told = true;
                complain(&format!(
                    "interrupted, and the guest was asked to release the disk already: waiting for its answer, to \
                     give it {} back; another signal ends this at once",
                    from.name()
                ));
            }
            None => {}
        }
    }
    bail!(
        "the guest did not release the disk within {} s; it may still do so, and is without it then: {}",
        UNPLUG_LIMIT.as_secs(),
        by_hand(from)
    )
}

/// How to plug a device in by hand.
fn by_hand(device: Attached<'_>) -> String {
    let id = device.disk().id();
    match device {
        Attached::Block(disk) => format!(
            "plug it in again with device_add (driver virtio-blk-pci, id {id}, drive {})",
            disk.new_node()
        ),
        Attached::Service(disk, _) => format!(
            "plug it in again with device_add (driver vhost-user-blk-pci, id {id}, chardev {})",
            chardev(disk)
        ),
    }
}

/// The chardev of a disk that was moved.
pub fn chardev(disk: &Disk) -> String {
    format!("{}-ublkup", disk.id())
}

fn plug_service(qmp: &mut Qmp, disk: &Disk, address: &str) -> Result<()> {
    let chardev = chardev(disk);
    if !has_chardev(qmp, disk)? {
        let backend = json!({ "type": "socket", "data": {
            "addr": { "type": "unix", "data": { "path": address } },
            "server": false,
            "reconnect-ms": RECONNECT_MS,
        }});
        qmp.command("chardev-add", json!({ "id": chardev, "backend": backend }))?;
    }
    let device = disk.in_place(json!({ "driver": "vhost-user-blk-pci", "chardev": chardev }));
    if let Err(error) = qmp.command("device_add", device) {
        if error.is::<Unanswered>() {
            return Err(error);
        }
        let removed = qmp.command("chardev-remove", json!({ "id": chardev }));
        return Err(match removed {
            Ok(_) => error,
            Err(also) => also.context(format!("{error:#}; and")),
        });
    }
    Ok(())
}

/// Whether a disk's chardev is there: it is from its move to its way back.
pub fn has_chardev(qmp: &mut Qmp, disk: &Disk) -> Result<bool> {
    let chardev = chardev(disk);
    let all = list(qmp, "query-chardev", json!({}))?;
    Ok(all.iter().any(|one| one["label"] == chardev.as_str()))
}

fn plug_block(qmp: &mut Qmp, disk: &Disk) -> Result<()> {
    let node = disk.new_node();
    let nodes = list(qmp, "query-named-block-nodes", json!({ "flat": true }))?;
    if !nodes.iter().any(|one| one["node-name"] == node.as_str()) {
        let node = json!({
            "driver": "host_device",
            "node-name": node,
            "filename": disk.filename,
            "read-only": disk.read_only,
            "cache": { "direct": disk.direct, "no-flush": disk.no_flush },
        });
        qmp.command("blockdev-add", node)?;
    }
    let mut device = disk.in_place(json!({ "driver": "virtio-blk-pci", "drive": node }));
    if let Some(serial) = &disk.serial {
        device["serial"] = json!(serial);
    }
    qmp.command("device_add", device)?;
    Ok(())
}
