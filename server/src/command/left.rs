//! Exports whose servers died: how they were served, what to do about them, and how they are removed.

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use upgrade_proto::printable;

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
    let unreadable = || format!("{name}: cannot read the note of how it was served");
    let note = match dir.served(name) {
        Err(error) if error.errno() == Errno::NOENT => None,
        other => Some(other.with_context(unreadable)?),
    };
    let Some(record) = dir.read_export_record(name)? else {
        ensure!(
            note.is_none(),
            "there is no record of how '{name}' was served under {}, and its note may be that of a guest: {}",
            dir.path().display(),
            serve_again(note.as_deref().unwrap_or_default())
        );
        bail!(
            "there is no note of an export called '{name}' under {}: 'ublkup doctor' shows what dead servers left, and \
             'ublkup serve' serves a new one",
            dir.path().display()
        );
    };
    let recorded: SavedExport = serde_json::from_str(&record).with_context(unreadable)?;
    ensure!(
        (recorded.options.name.as_deref()).is_none_or(|own| own == name),
        "the record of '{name}' is that of another export"
    );
    let noted = note.and_then(|note| serde_json::from_str::<SavedExport>(&note).ok());
    let as_changed = noted.map(|noted| SavedExport {
        changed: noted.changed,
        ..recorded.clone()
    });
    match as_changed {
        Some(as_changed) if as_changed.clone().export().is_ok() => Ok(as_changed),
        Some(_) if recorded.clone().export().is_err() => Ok(recorded),
        _ => {
            tracing::warn!(
                "{name}: what was changed while it was served is not known: its note is missing or makes no sense"
            );
            Ok(recorded)
        }
    }
}

/// What a person can do who knows what the disk was.
fn serve_again(note: &str) -> String {
    let noted = serde_json::from_str::<SavedExport>(note);
    let spec = noted.map_or_else(|_| "SPEC".to_owned(), |noted| printable(&noted.spec));
    format!("if it was '{spec}', 'ublkup serve' with that and its options serves it again")
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
            Ok(_) => continue,
            Err(error) => {
                tracing::warn!("{name} has no server: {}", explain(&error));
                continue;
            }
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
    let unknown = matches!(dir.read_export_record(name), Ok(None));
    match (saved(dir, name), dir.served(name)) {
        (Ok(_), _) => format!("'ublkup recover {name}' serves it again, {remove}"),
        (Err(_), Ok(note)) if unknown => format!("{}, {remove}", serve_again(&note)),
        _ => remove,
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
    let device = remove_left_device(dir, &lock)?;
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
