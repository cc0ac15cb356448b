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
pub(super) fn added_to(dir: &RuntimeDir, server: &str) -> Vec<ExportConfig> {
    let names = dir.names().unwrap_or_default();
    let is_dead = |name: &String| matches!(dir.is_alive(name), Ok(false));
    let was_added = |name: &String| {
        let saved = dir
            .served(name)
            .ok()
            .map(|text| serde_json::from_str(&text));
        let saved: Option<SavedExport> = saved.and_then(Result::ok);
        saved.is_some_and(|saved| saved.origin == Origin::Added(server.to_owned()))
    };
    let mut exports = Vec::new();
    for name in names.iter().filter(|name| is_dead(name) && was_added(name)) {
        match saved(dir, name) {
            Ok(export) => exports.push(export),
            Err(error) => {
                tracing::error!(
                    "{name} was added to this server, and has ended with it: {}",
                    explain(&error)
                );
                if let Ok(lock) = dir.claim(name) {
                    // Dropping it removes the folder, unless there is a block device.
                    drop(lock);
                }
            }
        }
    }
    exports
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
