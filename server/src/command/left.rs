//! Exports whose servers died: how they were served, what to do about them, and how they are removed.

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;

use crate::config::{ExportConfig, Origin, SavedExport, StorageSpec};
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{explain, remove_left_device};

/// How an export is served, or was: as recorded by who started it, which a guest cannot have written that took its server
/// over, with the options that were changed since then, which the server notes.
///
/// # Errors
///
/// When it is not known.
pub(super) fn recorded(dir: &RuntimeDir, name: &str) -> Result<SavedExport> {
    let text = match dir.served(name) {
        Err(error) if error.errno() == Errno::NOENT => bail!(
            "there is no note of an export called '{name}' under {}: 'ublkup doctor' shows what dead servers left, and \
             'ublkup serve' serves a new one",
            dir.path().display()
        ),
        other => other?,
    };
    let understand = |text: &str| -> Result<SavedExport> {
        serde_json::from_str(text)
            .with_context(|| format!("{name}: cannot read the note of how it was served"))
    };
    let noted = understand(&text)?;
    let text = dir.export_record(name)?.read()?;
    let recorded = understand(&text.with_context(|| {
        format!(
            "there is no record of how '{name}' was served under {}: 'ublkup serve' with its SPEC serves it again",
            dir.path().display()
        )
    })?)?;
    ensure!(
        recorded
            .options
            .name
            .as_deref()
            .is_none_or(|own| own == name),
        "the record of '{name}' is that of another export"
    );
    Ok(SavedExport {
        changed: noted.changed,
        ..recorded
    })
}

/// An export as it was last served.
///
/// # Errors
///
/// When that is not known, or it was lost with its server.
pub(super) fn saved(dir: &RuntimeDir, name: &str) -> Result<ExportConfig> {
    let config = recorded(dir, name)?.export()?;
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
    let mut exports = Vec::new();
    for name in names.iter().filter(|name| is_dead(name)) {
        let recorded = match recorded(dir, name) {
            Ok(recorded) if recorded.origin == Origin::Added(server.to_owned()) => recorded,
            _ => continue,
        };
        match recorded.export() {
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
                explain(&error.into())
            ),
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
