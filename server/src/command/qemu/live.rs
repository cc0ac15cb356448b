//! `ublkup qemu --live`: a running guest's disk moves from the block device to the service behind it.
//!
//! The guest's `virtio-blk` on `/dev/ublkbN` is unplugged, and when it is gone, a `vhost-user-blk`
//! is plugged in under the same id in the same place. The guest sees its disk disappear and come back. In
//! this order no write can be lost: the old device is gone and its block node closed, which flushes,
//! before the new one exists; and what the guest has not written yet it writes to the new one. If a
//! step after the unplugging fails, the old device is plugged in again.

use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use upgrade_proto::DiskClaim;

use super::disk::{RECONNECT_MS, service_address};
use super::qmp::Qmp;
use crate::command::cli::NOT_UPGRADABLE;
use crate::command::complain;
use crate::command::probe::{Found, lookup, service};

/// How long a guest may take to release a disk.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);

/// How long a disk must be quiet to pass for unused.
const QUIET: Duration = Duration::from_secs(1);

/// Why a guest's disk cannot be upgraded, found out before anything was changed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotUpgradable(String);

/// Refuses the upgrade.
fn refuse<T>(why: impl Into<String>) -> Result<T> {
    bail!(NotUpgradable(why.into()))
}

/// The guest's disk as QEMU tells it.
#[derive(Debug, PartialEq, Eq)]
struct OldDisk {
    /// What `device_del` takes: the id, or the path in QEMU's tree if it has none.
    device: String,
    /// The block node of the device.
    node: String,
    /// Whether QEMU removes the node with the device (`-drive`).
    node_is_devices_own: bool,
    /// What the node opened, as QEMU's process sees it.
    filename: String,
    direct: bool,
    no_flush: bool,
    read_only: bool,
    /// Where the device is plugged in, and what the new one inherits.
    place: Vec<(&'static str, Value)>,
}

/// Moves the disk `wanted` (the device's id, its block node, or the block device's path).
///
/// # Errors
///
/// When QEMU or the device cannot be used, or a step failed; the message says in which state the
/// guest is.
pub fn move_disk(socket: &Path, wanted: &str, runtime_dir: Option<&Path>) -> Result<ExitCode> {
    let mut qmp = Qmp::connect(socket)?;
    match upgrade(&mut qmp, wanted, runtime_dir) {
        Ok(said) => {
            complain(&said.to_string());
            Ok(ExitCode::SUCCESS)
        }
        Err(error) if error.is::<NotUpgradable>() => {
            complain(&format!(
                "{wanted}: not upgraded: {error}; nothing was changed"
            ));
            Ok(NOT_UPGRADABLE.into())
        }
        Err(error) => Err(error.context(wanted.to_owned())),
    }
}

fn upgrade(qmp: &mut Qmp, wanted: &str, runtime_dir: Option<&Path>) -> Result<String> {
    let old = find(qmp, wanted)?;
    check_memory(qmp)?;
    let path = host_path(qmp, &old.filename)?;
    let claim = DiskClaim::open(&path).map_err(|error| NotUpgradable(error.to_string()))?;
    let connection = match service(&claim, &lookup(runtime_dir))? {
        Found::Service(connection) => connection,
        Found::Nothing(why) => return refuse(why),
        Found::Taken => return refuse("another client has the disk"),
    };
    check_quiet(qmp, &old)?;
    // QEMU keeps the claim as long as it lives, and finds the service again through it.
    let given = hand_over(qmp, &claim)?;
    let route = connection.route().name();
    let exchanged = service_address(&connection, given.fd).and_then(|address| {
        // The server takes one client at a time.
        drop(connection);
        exchange(qmp, &old, &address, || Ok(claim.settle()?))
    });
    if let Err(error) = exchanged {
        let taken = qmp.command("remove-fd", json!({ "fdset-id": given.set }));
        return Err(match taken {
            Ok(_) => error,
            Err(also) => error.context(format!("QEMU keeps the claim on the disk ({also:#})")),
        });
    }
    Ok(format!(
        "{}: upgraded by the {route} route: the guest has its disk back, as vhost-user-blk-pci '{}'",
        path.display(),
        new_id(&old)
    ))
}

/// Unplugs the old device and plugs the new one in, or else the old one again. `settle` empties the
/// page cache when the guest has closed the block device.
fn exchange(
    qmp: &mut Qmp,
    old: &OldDisk,
    address: &str,
    settle: impl FnOnce() -> Result<()>,
) -> Result<()> {
    unplug(qmp, old)?;
    close_node(qmp, old)
        .and_then(|()| settle())
        .and_then(|()| plug_new(qmp, old, address))
        .map_err(|error| roll_back(qmp, old, error))
}

/// Runs a command that returns a list.
fn list(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<Vec<Value>> {
    match qmp.command(command, arguments)? {
        Value::Array(list) => Ok(list),
        other => bail!("{command}: no list, but {other}"),
    }
}

/// Finds the disk among QEMU's block devices.
fn find(qmp: &mut Qmp, wanted: &str) -> Result<OldDisk> {
    let blocks = list(qmp, "query-block", json!({}))?;
    let number = block_number(Path::new(wanted));
    let mut known = Vec::new();
    for block in &blocks {
        let inserted = &block["inserted"];
        let Some(device) = device_of(block) else {
            continue;
        };
        let node = inserted["node-name"].as_str().unwrap_or_default();
        let filename = filename_of(inserted["image"]["filename"].as_str().unwrap_or_default());
        let same_disk = number.is_some()
            && host_path(qmp, &filename).is_ok_and(|path| block_number(&path) == number);
        if device != wanted && node != wanted && block["device"] != wanted && !same_disk {
            known.push(device);
            continue;
        }
        let driver = inserted["drv"].as_str().unwrap_or_default();
        if !matches!(driver, "host_device" | "raw") {
            return refuse(format!(
                "its block node is of the kind '{driver}', and only a block device itself has a service"
            ));
        }
        let model = qom(qmp, &device, "type")?;
        let model = model.as_str().unwrap_or_default();
        if !model.starts_with("virtio-blk-pci") {
            return refuse(format!(
                "it is a {model}, and only virtio-blk-pci can be exchanged for vhost-user-blk-pci"
            ));
        }
        return Ok(OldDisk {
            node: node.to_owned(),
            node_is_devices_own: block["device"]
                .as_str()
                .is_some_and(|name| !name.is_empty()),
            filename,
            direct: inserted["cache"]["direct"] == true,
            no_flush: inserted["cache"]["no-flush"] == true,
            read_only: inserted["ro"] == true,
            place: place(qmp, &device)?,
            device,
        });
    }
    let known = known.join(", ");
    refuse(format!("the guest has no such disk; it has: {known}"))
}

/// What `device_del` takes for a block device of `query-block`.
fn device_of(block: &Value) -> Option<String> {
    let path = block["qdev"].as_str()?;
    let path = path.strip_suffix("/virtio-backend").unwrap_or(path);
    let named = path.strip_prefix("/machine/peripheral/");
    Some(named.unwrap_or(path).to_owned())
}

/// The file behind QEMU's name for an image, which may be its options in JSON.
fn filename_of(image: &str) -> String {
    let Some(options) = image.strip_prefix("json:") else {
        return image.to_owned();
    };
    let options: Value = serde_json::from_str(options).unwrap_or_default();
    [&options["file"]["filename"], &options["filename"]]
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or(image)
        .to_owned()
}

/// The path under which this process finds what QEMU's process calls `filename`.
fn host_path(qmp: &Qmp, filename: &str) -> Result<PathBuf> {
    let path = match filename.strip_prefix("/proc/self/") {
        Some(rest) => {
            let peer = rustix::net::sockopt::socket_peercred(qmp.stream())?;
            PathBuf::from(format!("/proc/{}/{rest}", peer.pid.as_raw_nonzero()))
        }
        None => PathBuf::from(filename),
    };
    if !path.is_absolute() || block_number(&path).is_none() {
        return refuse(format!("'{filename}' is not a block device here"));
    }
    Ok(path)
}

fn block_number(path: &Path) -> Option<u64> {
    let metadata = std::fs::metadata(path).ok()?;
    metadata
        .file_type()
        .is_block_device()
        .then(|| metadata.rdev())
}

fn qom(qmp: &mut Qmp, device: &str, property: &str) -> Result<Value> {
    let path = match device.starts_with('/') {
        true => device.to_owned(),
        false => format!("/machine/peripheral/{device}"),
    };
    qmp.command("qom-get", json!({ "path": path, "property": property }))
}

/// Where the device is plugged in.
fn place(qmp: &mut Qmp, device: &str) -> Result<Vec<(&'static str, Value)>> {
    let bus = qom(qmp, device, "parent_bus")?;
    let bus = bus.as_str().and_then(|path| path.rsplit('/').next());
    let bus = bus.context("the device is on no bus")?;
    let mut place = vec![("bus", json!(bus))];
    if let Some(addr) = qom(qmp, device, "addr")?.as_str() {
        place.push(("addr", json!(addr)));
    }
    if let Some(index @ 0..) = qom(qmp, device, "bootindex")?.as_i64() {
        place.push(("bootindex", json!(index)));
    }
    Ok(place)
}

/// All of the guest's memory must be shared, or the server cannot map it.
fn check_memory(qmp: &mut Qmp) -> Result<()> {
    let backends = list(qmp, "query-memdev", json!({}))?;
    if backends.is_empty() || backends.iter().any(|backend| backend["share"] != true) {
        return refuse(
            "the guest's memory is not shared: that is decided when QEMU starts \
             (-object memory-backend-memfd,…,share=on -machine memory-backend=…)",
        );
    }
    Ok(())
}

/// A disk in use is a disk that is mounted in the guest. The reverse does not hold; QEMU cannot see it.
fn check_quiet(qmp: &mut Qmp, old: &OldDisk) -> Result<()> {
    let before = requests(qmp, old)?;
    std::thread::sleep(QUIET);
    if requests(qmp, old)? != before {
        return refuse("the guest is using the disk: unmount it in the guest first");
    }
    Ok(())
}

/// How many requests the device has made.
fn requests(qmp: &mut Qmp, old: &OldDisk) -> Result<[u64; 4]> {
    let all = list(qmp, "query-blockstats", json!({}))?;
    let ours = all
        .iter()
        .find(|one| device_of(one).as_deref() == Some(&old.device))
        .context("query-blockstats: the disk is missing")?;
    let counted = ["rd", "wr", "flush", "unmap"].map(|what| format!("{what}_operations"));
    let count = |what: String| ours["stats"][what].as_u64().unwrap_or(0);
    Ok(counted.map(count))
}

/// A descriptor in QEMU's hands.
struct Given {
    fd: RawFd,
    set: i64,
}

/// Gives QEMU the claimed descriptor.
fn hand_over(qmp: &mut Qmp, claim: &DiskClaim) -> Result<Given> {
    let opaque = json!({ "opaque": "ublkup" });
    let added = qmp.command_with("add-fd", opaque, &[claim.as_fd()])?;
    let fd = added["fd"].as_i64().context("add-fd: no descriptor")?;
    let set = added["fdset-id"].as_i64().context("add-fd: no set")?;
    Ok(Given {
        fd: RawFd::try_from(fd)?,
        set,
    })
}

fn unplug(qmp: &mut Qmp, old: &OldDisk) -> Result<()> {
    qmp.command("device_del", json!({ "id": old.device }))
        .map_err(|error| NotUpgradable(format!("{error:#}")))?;
    let ours = |event: &Value| {
        let data = &event["data"];
        data["device"] == old.device.as_str() || data["path"] == old.device.as_str()
    };
    let answer = qmp.event(UNPLUG_LIMIT, |event| {
        let name = event["event"].as_str().unwrap_or_default();
        matches!(name, "DEVICE_DELETED" | "DEVICE_UNPLUG_GUEST_ERROR") && ours(event)
    })?;
    match answer {
        Some(event) if event["event"] == "DEVICE_DELETED" => Ok(()),
        Some(_) => refuse("the guest refuses to release the disk"),
        None => bail!(
            "the guest did not release the disk within {} s; it may still do so: then plug it \
             in again with device_add (id {}, drive {})",
            UNPLUG_LIMIT.as_secs(),
            old.device,
            old.node
        ),
    }
}

/// Closes the old block node, which writes out and flushes all that it accepted.
fn close_node(qmp: &mut Qmp, old: &OldDisk) -> Result<()> {
    if old.node_is_devices_own {
        return Ok(());
    }
    qmp.command("blockdev-del", json!({ "node-name": old.node }))?;
    Ok(())
}

/// The new device's id: the old one's, if it had one.
fn new_id(old: &OldDisk) -> &str {
    match old.device.starts_with('/') {
        true => "ublkup-live",
        false => &old.device,
    }
}

fn chardev(old: &OldDisk) -> String {
    format!("{}-ublkup", new_id(old))
}

fn plug_new(qmp: &mut Qmp, old: &OldDisk, address: &str) -> Result<()> {
    let chardev = chardev(old);
    let backend = json!({ "type": "socket", "data": {
        "addr": { "type": "unix", "data": { "path": address } },
        "server": false,
        "reconnect-ms": RECONNECT_MS,
    }});
    qmp.command("chardev-add", json!({ "id": chardev, "backend": backend }))?;
    let device = with_place(
        json!({ "driver": "vhost-user-blk-pci", "id": new_id(old), "chardev": chardev }),
        old,
    );
    if let Err(error) = qmp.command("device_add", device) {
        let removed = qmp.command("chardev-remove", json!({ "id": chardev }));
        return Err(match removed {
            Ok(_) => error,
            Err(also) => error.context(format!("and {also:#}")),
        });
    }
    Ok(())
}

fn with_place(mut device: Value, old: &OldDisk) -> Value {
    for (key, value) in &old.place {
        device[*key] = value.clone();
    }
    device
}

/// Plugs the old device in again after `error`.
fn roll_back(qmp: &mut Qmp, old: &OldDisk, error: anyhow::Error) -> anyhow::Error {
    let mut again = || -> Result<()> {
        if !has_node(qmp, &old.node)? {
            let node = json!({
                "driver": "host_device",
                "node-name": old.node,
                "filename": old.filename,
                "read-only": old.read_only,
                "cache": { "direct": old.direct, "no-flush": old.no_flush },
            });
            qmp.command("blockdev-add", node)?;
        }
        let device = json!({ "driver": "virtio-blk-pci", "id": new_id(old), "drive": old.node });
        qmp.command("device_add", with_place(device, old))?;
        Ok(())
    };
    match again() {
        Ok(()) => error.context("not upgraded; the guest has the block device back"),
        Err(also) => error.context(anyhow!(
            "not upgraded, and the block device cannot be given back ({also:#}): the guest is \
             without the disk"
        )),
    }
}

fn has_node(qmp: &mut Qmp, node: &str) -> Result<bool> {
    let nodes = list(qmp, "query-named-block-nodes", json!({ "flat": true }))?;
    Ok(nodes.iter().any(|one| one["node-name"] == node))
}

#[cfg(test)]
#[path = "live_tests.rs"]
mod tests;
