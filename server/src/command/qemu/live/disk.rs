//! The guest's disk as QEMU tells it.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::peer::Peer;
use super::refusal::refuse;
use crate::engine::qmp::{Qmp, Refusal};

/// A disk of the guest on a block device, and all that is needed to plug it in again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// What `device_del` takes: the id, or the path in QEMU's tree if it has none.
    pub device: String,
    /// The block node of the device.
    pub node: String,
    /// Whether QEMU removes the node with the device (`-drive`).
    pub node_is_devices_own: bool,
    /// What the node opened, as QEMU's process sees it.
    pub filename: String,
    pub direct: bool,
    pub no_flush: bool,
    pub read_only: bool,
    /// The serial number that the guest sees.
    pub serial: Option<String>,
    /// Where the device is plugged in, and what the new one inherits.
    pub place: Map<String, Value>,
}

impl Disk {
    /// The id under which devices are plugged in: the old one's, if it had one.
    pub fn id(&self) -> &str {
        match self.device.starts_with('/') {
            true => "ublkup-live",
            false => &self.device,
        }
    }

    /// The name under which the block node is added again: the old one's, unless QEMU made that up.
    pub fn new_node(&self) -> String {
        match self.node.starts_with('#') {
            true => format!("{}-node", self.id()),
            false => self.node.clone(),
        }
    }

    /// `device` with the id and the place of this disk.
    pub fn in_place(&self, mut device: Value) -> Value {
        device["id"] = json!(self.id());
        for (key, value) in &self.place {
            device[key] = value.clone();
        }
        device
    }
}

/// What the user calls a disk.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// A block device, by number.
    Device(u64),
    /// The guest's device or block node.
    Name(&'a str),
}

/// Runs a command that returns a list.
pub fn list(qmp: &mut Qmp, command: &'static str, arguments: Value) -> Result<Vec<Value>> {
    match qmp.command(command, arguments)? {
        Value::Array(list) => Ok(list),
        other => bail!("{command}: no list, but {other}"),
    }
}

/// Refuses if the guest does not run: it could not answer.
pub fn expect_running(qmp: &mut Qmp) -> Result<()> {
    let status = qmp.command("query-status", json!({}))?;
    if status["running"] == true {
        return Ok(());
    }
    let status = status["status"].as_str().unwrap_or("unknown");
    refuse(format!(
        "the guest does not run (status '{}'), and only one that runs can release a disk: resume it first",
        status
    ))
}

/// Finds the disk among QEMU's block devices.
pub fn find(qmp: &mut Qmp, peer: &Peer, wanted: Wanted<'_>) -> Result<Disk> {
    let blocks = list(qmp, "query-block", json!({}))?;
    let mut known = Vec::new();
    for block in &blocks {
        let inserted = &block["inserted"];
        let Some(device) = device_of(block) else {
            continue;
        };
        let node = inserted["node-name"].as_str().unwrap_or_default();
        let filename = filename_of(inserted["image"]["filename"].as_str().unwrap_or_default());
        let is_wanted = match wanted {
            Wanted::Device(number) => {
                (peer.block_device(&filename)).is_ok_and(|named| named.number == number)
            }
            Wanted::Name(name) => device == name || node == name || block["device"] == name,
        };
        if !is_wanted {
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
        let serial = qom(qmp, &device, "serial")?;
        return Ok(Disk {
            node: node.to_owned(),
            node_is_devices_own: block["device"]
                .as_str()
                .is_some_and(|name| !name.is_empty()),
            filename,
            direct: inserted["cache"]["direct"] == true,
            no_flush: inserted["cache"]["no-flush"] == true,
            read_only: inserted["ro"] == true,
            serial: serial
                .as_str()
                .filter(|text| !text.is_empty())
                .map(str::to_owned),
            place: place(qmp, &device)?,
            device,
        });
    }
    if let Wanted::Name(name) = wanted
        && plugged(qmp, name)? == Plugged::Service
    {
        return refuse("it is upgraded already: it is a vhost-user-blk");
    }
    match known.is_empty() {
        true => refuse("the guest has no disk on a block device"),
        false => refuse(format!(
            "the guest has no such disk; it has: {}",
            known.join(", ")
        )),
    }
}

/// What `device_del` takes for a block device of `query-block`.
pub fn device_of(block: &Value) -> Option<String> {
    let path = block["qdev"].as_str()?;
    let path = path.strip_suffix("/virtio-backend").unwrap_or(path);
    let named = path.strip_prefix("/machine/peripheral/");
    Some(named.unwrap_or(path).to_owned())
}

/// The file behind QEMU's name for an image, which may be its options in JSON.
pub fn filename_of(image: &str) -> String {
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

/// How the guest has a disk, by its device's model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// Not at all.
    No,
    Block,
    Service,
}

/// How the guest has the disk of this id or path.
///
/// # Errors
///
/// When QEMU does not answer, or it is another device.
pub fn plugged(qmp: &mut Qmp, device: &str) -> Result<Plugged> {
    match qom(qmp, device, "type") {
        Ok(Value::String(model)) if model.starts_with("vhost-user-blk") => Ok(Plugged::Service),
        Ok(Value::String(model)) if model.starts_with("virtio-blk") => Ok(Plugged::Block),
        Ok(other) => bail!("'{}' is no disk, but {other}", device),
        Err(error) if error.is::<Refusal>() => Ok(Plugged::No),
        Err(error) => Err(error),
    }
}

fn qom(qmp: &mut Qmp, device: &str, property: &str) -> Result<Value> {
    let path = match device.starts_with('/') {
        true => device.to_owned(),
        false => format!("/machine/peripheral/{device}"),
    };
    qmp.command("qom-get", json!({ "path": path, "property": property }))
}

/// Where the device is plugged in.
fn place(qmp: &mut Qmp, device: &str) -> Result<Map<String, Value>> {
    let bus = qom(qmp, device, "parent_bus")?;
    let bus = bus.as_str().and_then(|path| path.rsplit('/').next());
    let bus = bus.context("the device is on no bus")?;
    let mut place = Map::new();
    place.insert("bus".into(), json!(bus));
    if let Some(addr) = qom(qmp, device, "addr")?.as_str() {
        place.insert("addr".into(), json!(addr));
    }
    if let Some(index @ 0..) = qom(qmp, device, "bootindex")?.as_i64() {
        place.insert("bootindex".into(), json!(index));
    }
    Ok(place)
}

/// All of the guest's memory must be shared, or the server cannot map it.
pub fn check_memory(qmp: &mut Qmp) -> Result<()> {
    let backends = list(qmp, "query-memdev", json!({}))?;
    if backends.is_empty() || backends.iter().any(|backend| backend["share"] != true) {
        return refuse(
            "the guest's memory is not shared: that is decided when QEMU starts \
             (-object memory-backend-memfd,…,share=on -machine memory-backend=…)",
        );
    }
    Ok(())
}
