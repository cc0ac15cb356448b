//! Exports whose servers died: how they were served, what to do about them, and how they are removed.

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;

use crate::config::{ExportConfig, Origin, SavedExport, StorageSpec};
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{explain, remove_left_device};

/// An export as it was last served.
///
/// # Errors
///
/// When there is no note of it, or it was lost with its server.
pub(super) fn saved(dir: &RuntimeDir, name: &str) -> Result<ExportConfig> {
    let unreadable = || format!("{name}: cannot read the note of how it was served");
    let text = match dir.served(name) {
        Err(error) if error.errno() == Errno::NOENT => bail!(
            "there is no note of an export called '{name}' under {}: 'ublkup doctor' shows what dead servers left, and \
             'ublkup serve' serves a new one",
            dir.path().display()
        ),
        other => other.with_context(unreadable)?,
    };
    let saved: SavedExport = serde_json::from_str(&text).with_context(unreadable)?;
    let config = saved.export()?;
    if let StorageSpec::Memory { .. } = config.storage {
        bail!(
            "{name}: what was in memory is gone with its server: 'ublkup serve' with the same SPEC serves an \
             empty disk"
        );
    }
    Ok(config)
}

/// The exports that were added to an earlier server of this name, and have no server now. What was in memory is removed.
///
/// A guest that took that server over could write to its notes: what is served must be in the record, too, but for options
/// that can be changed while an export is served.
pub(super) fn added_to(dir: &RuntimeDir, server: &str) -> Vec<ExportConfig> {
    let names = dir.names().unwrap_or_default();
    let is_dead = |name: &String| matches!(dir.is_alive(name), Ok(false));
    let mut exports = Vec::new();
    for name in names.iter().filter(|name| is_dead(name)) {
        let noted = dir.served(name).ok();
        let noted = noted.and_then(|text| serde_json::from_str::<SavedExport>(&text).ok());
        let was_added = |noted: &SavedExport| noted.origin == Origin::Added(server.to_owned());
        let Some(noted) = noted.filter(was_added) else {
            continue;
        };
        match again(dir, name, noted) {
            Ok(export) if matches!(export.storage, StorageSpec::Memory { .. }) => {
                tracing::error!(
                    "{name} was added to this server, and what was in memory has ended with it"
                );
                if let Ok(lock) = dir.claim(name) {
                    // Dropping it removes the folder, unless there is a block device.
                    drop(lock);
                }
            }
            Ok(export) => exports.push(export),
            Err(error) => tracing::error!(
                "{name} was added to this server, and is not served again: {}",
                explain(&error)
            ),
        }
    }
    exports
}

/// An export as it is noted and recorded.
fn again(dir: &RuntimeDir, name: &str, noted: SavedExport) -> Result<ExportConfig> {
    let text = dir.export_record(name)?.read()?;
    let text = text.context("there is no record of it")?;
    let recorded: SavedExport = serde_json::from_str(&text).context("its record makes no sense")?;
    let changed = noted.changed.clone();
    let as_added = SavedExport {
        changed: recorded.changed.clone(),
        ..noted
    };
    ensure!(
        as_added == recorded,
        "its note is not what was recorded when it was added: it may have been written by a guest"
    );
    let export = recorded.export()?;
    ensure!(
        export.name == name,
        "its record is that of '{}'",
        export.name
    );
    Ok(export.change(changed)?)
}

/// What can be done about an export whose server died.
pub(super) fn advice(dir: &RuntimeDir, name: &str) -> String {
    let remove = format!("'ublkup stop --force {name}' removes what is left of it");
    match saved(dir, name) {
        Ok(_) => format!("'ublkup recover {name}' serves it again, {remove}"),
        Err(_) => remove,
    }
}

/// Removes what the dead server of an export left: its block device, which may have been waiting for the next
/// server, and its folder. Says what was removed.
///
/// # Errors
///
/// When a server lives, or something cannot be removed.
pub(super) fn remove(dir: &RuntimeDir, name: &str) -> Result<String> {
    // Locking the name removes the sockets; dropping the lock removes the folder.
    let lock = dir.claim(name)?;
    let device = remove_left_device(&lock)?;
    drop(lock);
    let folder = dir.folder(name);
    ensure!(
        !folder.exists(),
        "{} has entries that no server made: remove them, and the folder",
        folder.display()
    );
    Ok(match device {
        Some(id) => format!("/dev/ublkb{id} and its notes are removed"),
        None => "its notes are removed".to_owned(),
    })
}
