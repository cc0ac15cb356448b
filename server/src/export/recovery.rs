//! What becomes of the block device that an earlier server of the name left.
//!
//! All commands that meet such a device decide here. A device that waits for a server has users, who
//! wait with it: a server recovers it or leaves it as it is. It is removed only if a person has said
//! so. `docs/recovery.md` has the table of all cases, which the tests walk.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use super::name_lock::{DeviceRecord, NameLock};
use super::runtime_dir::RuntimeDir;
use crate::config::check_name;
use crate::door::ublk::{self, DeviceState, UblkError};
use crate::request::{Limits, format_size};

/// What has to be known of, and done to, devices without a server.
pub(super) trait Driver {
    /// The device with this mark.
    fn marked(&self, mark: u64) -> Result<Option<u32>, UblkError>;

    /// The state of a device; an error while it has a server.
    fn state(&self, id: u32) -> Result<DeviceState, UblkError>;

    /// Removes a device without a server, also one that waits.
    fn remove(&self, id: u32) -> Result<(), UblkError>;
}

/// The ublk driver of this machine.
pub(super) struct Kernel;

impl Driver for Kernel {
    fn marked(&self, mark: u64) -> Result<Option<u32>, UblkError> {
        ublk::marked(mark)
    }

    fn state(&self, id: u32) -> Result<DeviceState, UblkError> {
        ublk::device_state(id)
    }

    fn remove(&self, id: u32) -> Result<(), UblkError> {
        ublk::remove(id, true)
    }
}

/// What a server that starts would do with the name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// What the storage is and takes.
    pub(super) limits: &'a Limits,
    /// Which storage it is.
    pub(super) storage: Option<&'a str>,
    /// Whether there will be a block device.
    pub(super) opens_ublk: bool,
    /// The number of the block device, if one was asked for.
    pub(super) ublk_id: Option<u32>,
    /// The block size, if one was asked for.
    pub(super) block_bytes: Option<u32>,
    /// Whether a person has said that a device that waits is to be removed.
    pub(super) replace: bool,
}

/// How a server begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Beginning {
    /// Without a device of before.
    New,
    /// With the device that waits, which has this mark, and whose users see these limits.
    Recover { id: u32, mark: u64, limits: Limits },
}

/// Decides how a server begins, and removes what is in its way and of use to no program: a dead device. `recorded` are the
/// devices that were made for the export.
///
/// # Errors
///
/// When a device waits for a server that this one cannot be. The device is left as it is.
pub(super) fn begin(
    driver: &impl Driver,
    name: &NameLock,
    recorded: &[DeviceRecord],
    wanted: &Wanted<'_>,
) -> Result<Beginning> {
    let (id, record) = match left(driver, name, recorded)? {
        Left::Nothing => {
            name.forget_device_note();
            return Ok(Beginning::New);
        }
        Left::Device(id, record) => (id, record),
        Left::Unrecorded(id) if wanted.replace => {
            tracing::warn!("{}: {}, and stays", name.name(), unrecorded(id));
            name.forget_device_note();
            return Ok(Beginning::New);
        }
        Left::Unrecorded(id) => bail!(
            "{}. It is left as it is. --replace makes a new one beside it",
            unrecorded(id)
        ),
    };
    match driver.state(id)? {
        DeviceState::Gone => {}
        DeviceState::Dead => driver.remove(id)?,
        DeviceState::Waiting(device) => match recover(id, &record, &device, wanted) {
            Ok(limits) if !wanted.replace => {
                let mark = record.mark;
                return Ok(Beginning::Recover { id, mark, limits });
            }
            Err(why) if !wanted.replace => bail!(
                "/dev/ublkb{id} waits for a server, and this one cannot recover it: {why}. It is left as it is, \
                 with all that is mounted on it. If it is no longer needed: --replace, or \
                 'ublkup doctor --clean', removes it, and requests that wait fail"
            ),
            _ => {
                tracing::warn!(
                    "{}: /dev/ublkb{id} waited for a server, and is removed",
                    name.name()
                );
                driver.remove(id)?;
            }
        },
    }
    // Not the record: a command that hands a mark over has written it already.
    name.forget_device_note();
    Ok(Beginning::New)
}

/// Removes the block device that a dead server of this name left, waiting or dead, because a person said so.
/// Returns its number.
///
/// # Errors
///
/// When it cannot be removed, or has a living server.
pub(super) fn clean(
    driver: &impl Driver,
    name: &NameLock,
    recorded: &[DeviceRecord],
) -> Result<Option<u32>> {
    let removed = match left(driver, name, recorded)? {
        Left::Nothing => None,
        Left::Device(id, _) => {
            driver.remove(id)?;
            Some(id)
        }
        Left::Unrecorded(id) => bail!("{}", unrecorded(id)),
    };
    name.forget_device();
    Ok(removed)
}

/// Checks that another server could recover the block device that the living server of the name has.
///
/// # Errors
///
/// When there is no record of it.
pub(super) fn is_recorded(
    driver: &impl Driver,
    device: &Path,
    recorded: &[DeviceRecord],
) -> Result<()> {
    let is_it = |id| device == Path::new(&format!("/dev/ublkb{id}"));
    let has_it = |record: &DeviceRecord| {
        driver
            .marked(record.mark)
            .is_ok_and(|id| id.is_some_and(is_it))
    };
    ensure!(
        recorded.iter().any(has_it),
        "there is no record that {} was made for this export, so that no other server could recover it",
        device.display()
    );
    Ok(())
}

/// Forgets the devices of exports that are gone, which a confined server cannot do, if the devices are gone.
pub(super) fn sweep(driver: &impl Driver, dir: &RuntimeDir) {
    let names = dir.names().unwrap_or_default();
    let are_gone = |name: &str| dir.devices(name).is_ok_and(|all| !any_exists(driver, &all));
    for name in dir.names_with_devices() {
        // What is not a name is a record that is being written.
        if names.contains(&name) || check_name(&name).is_err() || !are_gone(&name) {
            continue;
        }
        // With the lock no other server writes a record. It is held no longer than it takes to look again: others
        // that want the name are refused meanwhile. Dropping it removes the folder again.
        if let Ok(lock) = dir.claim(&name)
            && are_gone(&name)
        {
            lock.forget_device();
        }
    }
}

/// Whether there is one of these devices, or that cannot be known.
pub(super) fn any_exists(driver: &impl Driver, recorded: &[DeviceRecord]) -> bool {
    let is_gone = |one: &DeviceRecord| matches!(driver.marked(one.mark), Ok(None));
    !recorded.iter().all(is_gone)
}

/// Removes the device with a mark if it is dead; whether it was.
pub(super) fn remove_dead(driver: &impl Driver, mark: u64) -> bool {
    let id = driver.marked(mark).ok().flatten();
    id.is_some_and(|id| {
        matches!(driver.state(id), Ok(DeviceState::Dead)) && driver.remove(id).is_ok()
    })
}

/// What there is of the device that an earlier server made.
enum Left {
    Nothing,
    Device(u32, DeviceRecord),
    /// One that waits and is noted only where a guest can write that has taken the server over. It may be that of another
    /// export.
    Unrecorded(u32),
}

/// The record says which device it is. The note decides between several that were recorded: a command that adds an export
/// records the new one before it is made, beside one that was left.
fn left(driver: &impl Driver, name: &NameLock, recorded: &[DeviceRecord]) -> Result<Left> {
    let note = name.left_device()?.unwrap_or_default();
    let mut found = Vec::new();
    for record in recorded {
        let id = driver.marked(record.mark);
        if let Some(id) =
            id.context("it cannot be known whether its block device waits for a server")?
        {
            found.push((id, record));
        }
    }
    let noted = found
        .iter()
        .find(|(_, record)| note.mark == Some(record.mark));
    let one = match &found[..] {
        [] => {
            // A server that may not ask the driver recovers nothing, either.
            let noted = note.mark.and_then(|mark| driver.marked(mark).ok()?);
            let waits = |id: &u32| matches!(driver.state(*id), Ok(DeviceState::Waiting(_)));
            return Ok(match noted.filter(waits) {
                Some(id) => Left::Unrecorded(id),
                None => Left::Nothing,
            });
        }
        [one] => one,
        [(first, _), (second, _), ..] => noted.with_context(|| {
            format!(
                "/dev/ublkb{first} and /dev/ublkb{second} were made for this export, and it is not noted which one it had \
                 last: remove the other one by 'ublkup doctor --remove'"
            )
        })?,
    };
    let mut record = one.1.clone();
    if note.mark == Some(record.mark) && record.storage.is_none() {
        record.storage = note.storage;
    }
    Ok(Left::Device(one.0, record))
}

fn unrecorded(id: u32) -> String {
    format!(
        "/dev/ublkb{id}, which waits for a server, is noted as its block device, and there is no record that it was made for \
         this export; if it is no longer needed, 'ublkup doctor --remove /dev/ublkb{id}' removes it"
    )
}

/// Checks that what is found at the path is what was served.
///
/// # Errors
///
/// When it is known not to be.
pub(super) fn is_same_storage(served: Option<&str>, found: Option<&str>) -> Result<()> {
    if let (Some(served), Some(found)) = (served, found) {
        ensure!(
            served == found,
            "the file, device or image that is there now is not the one that was served ({found} instead of {served}): \
             put the old one back"
        );
    }
    Ok(())
}

/// The limits of an export that recovers a device; why it cannot, otherwise.
fn recover(id: u32, record: &DeviceRecord, device: &Limits, wanted: &Wanted<'_>) -> Result<Limits> {
    ensure!(
        wanted.opens_ublk,
        "its ublk door would stay closed (option ublk)"
    );
    if let Some(asked) = wanted.ublk_id.filter(|asked| *asked != id) {
        bail!("number {asked} was asked for (option ublk-id)");
    }
    is_same_storage(record.storage.as_deref(), wanted.storage)?;
    if let Some(asked) = wanted
        .block_bytes
        .filter(|asked| *asked != device.block_bytes)
    {
        bail!(
            "blocks of {asked} bytes were asked for (option block-size), the device has {}",
            device.block_bytes
        );
    }
    fit(wanted.limits, device)
}

/// The limits of a storage behind a device that exists already. What users of the device rely on stays: the
/// storage may have other limits today, after an update of the kernel, say, or when its image was
/// copied by reference.
fn fit(storage: &Limits, device: &Limits) -> Result<Limits> {
    let word = |read_only| if read_only { "read-only" } else { "writable" };
    ensure!(
        storage.read_only == device.read_only,
        "it would be {}, the device is {} (option read-only)",
        word(storage.read_only),
        word(device.read_only)
    );
    ensure!(
        storage.block_bytes <= device.block_bytes,
        "the storage takes blocks of {} bytes at least, the device has {} (cache=buffered takes any)",
        storage.block_bytes,
        device.block_bytes
    );
    ensure!(
        device.write_cache || !storage.write_cache,
        "the device promises that completed writes are durable, the storage does not"
    );
    ensure!(
        storage.max_io_bytes >= device.max_io_bytes,
        "the device makes requests of {} bytes, the storage takes {}",
        device.max_io_bytes,
        storage.max_io_bytes
    );
    let (has, had) = (storage.capacity.bytes(), device.capacity.bytes());
    ensure!(
        has >= had,
        "the storage has {}, the device {}",
        format_size(has),
        format_size(had)
    );
    let capacity = storage.capacity.clone();
    capacity.set(has - has % u64::from(device.block_bytes));
    // What the storage does not take is refused as unsupported, which the block layer takes for a no.
    let offered = |storage: u64, device: u64| if storage == 0 { 0 } else { device };
    Ok(Limits {
        capacity,
        max_discard_bytes: offered(storage.max_discard_bytes, device.max_discard_bytes),
        max_write_zeroes_bytes: offered(
            storage.max_write_zeroes_bytes,
            device.max_write_zeroes_bytes,
        ),
        serial: storage.serial,
        ..device.clone()
    })
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
