//! The claimed descriptors in QEMU's hands. Each is an fd set of its own, and the text beside it (`opaque`) describes
//! the disk as it was, so that the next command can finish or undo a move that was cut off.

use std::os::fd::{AsFd, RawFd};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::disk::{Disk, list};
use crate::command::qemu::disk::service_address;
use crate::engine::qmp::Qmp;

/// Begins the text beside our descriptors.
const OURS: &str = "ublkup ";

/// What is noted beside a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The disk as it was on the block device.
    pub disk: Disk,
    /// Where the service is, if the registry says so and not the kernel.
    pub entry: Option<String>,
}

/// A descriptor that QEMU was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// Its number in QEMU.
    pub fd: RawFd,
    set: i64,
    pub note: Note,
}

impl Given {
    /// What QEMU's chardev connects to.
    pub fn address(&self) -> String {
        service_address(self.note.entry.as_deref(), self.fd)
    }
}

/// Gives QEMU the claimed descriptor of a disk.
pub fn give(qmp: &mut Qmp, claim: impl AsFd, note: Note) -> Result<Given> {
    let opaque = format!("{OURS}{}", serde_json::to_string(&note)?);
    let added = qmp.command_with("add-fd", json!({ "opaque": opaque }), &[claim.as_fd()])?;
    let fd = added["fd"].as_i64().context("add-fd: no descriptor")?;
    let set = added["fdset-id"].as_i64().context("add-fd: no set")?;
    Ok(Given {
        fd: RawFd::try_from(fd)?,
        set,
        note,
    })
}

/// Takes a descriptor back: QEMU closes it, which ends the claim.
pub fn take_back(qmp: &mut Qmp, given: &Given) -> Result<()> {
    qmp.command("remove-fd", json!({ "fdset-id": given.set }))?;
    Ok(())
}

/// The descriptors that QEMU was given and still has.
pub fn given(qmp: &mut Qmp) -> Result<Vec<Given>> {
    let sets = list(qmp, "query-fdsets", json!({}))?;
    let read = |set: &Value| {
        let fd = &set["fds"][0];
        let note = fd["opaque"].as_str()?.strip_prefix(OURS)?;
        Some(Given {
            fd: RawFd::try_from(fd["fd"].as_i64()?).ok()?,
            set: set["fdset-id"].as_i64()?,
            note: serde_json::from_str(note).ok()?,
        })
    };
    Ok(sets.iter().filter_map(read).collect())
}
