//! Folders that a server has ready for exports that are added while it runs.
//!
//! A confined server reaches the folders that were there when it confined itself (`engine/sandbox`), and those wherever
//! they are moved. So it makes some before. The command that adds an export moves one to where the export's folder
//! belongs; when the export ends, the server moves it back.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, OFlags, RenameFlags, renameat_with, statat};
use rustix::io::Errno;
use upgrade_proto::TrustedDir;

use super::name_lock::{
    LOCK, NOTES, NameLock, SPARE, VHOST_SOCKET, lock_exclusively, remove_spares,
};
use super::runtime_dir::{DIR_MODE, EXPORTS, RuntimeDir, is_in, is_there};
use crate::engine::durable::{NoteFile, unlink};
use crate::engine::sandbox::{Access, Reach};

/// The spare folders of a server. Dropping it removes those that are not in use.
#[derive(Debug)]
pub(super) struct Spares {
    /// The server's folder.
    server: Arc<TrustedDir>,
    count: u32,
}

impl Spares {
    /// Makes `count` of them. What a dead server of the name left is removed.
    pub(super) fn make(server: &NameLock, count: u32) -> Result<Self> {
        remove_spares(&server.dir);
        let spares = Self {
            server: Arc::clone(&server.dir),
            count,
        };
        if count > 0 {
            let folder = server.dir.make_dir(SPARE, DIR_MODE)?;
            for number in 0..count {
                folder.make_dir(&number.to_string(), DIR_MODE)?;
            }
        }
        Ok(spares)
    }

    /// Adds what may be done with them in the sandbox.
    pub(super) fn add_reach(&self, exports: &Path, reach: &mut Reach) {
        if self.count == 0 {
            return;
        }
        let all = self.server.path().join(SPARE);
        for number in 0..self.count {
            let spare = all.join(number.to_string());
            reach.paths.push((spare, Access::Spare));
        }
        reach.paths.push((all, Access::Spares));
        reach.paths.push((exports.to_owned(), Access::MoveFolders));
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Where one of them belongs.
    pub(super) fn home(&self, number: u32) -> Option<PathBuf> {
        let all = self.server.path().join(SPARE);
        (number < self.count).then(|| all.join(number.to_string()))
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        remove_spares(&self.server);
    }
}

impl RuntimeDir {
    /// Takes the name of an export that is to be added to a server, with a folder that the server reaches. Returns the
    /// number of that too, if it is a spare one.
    ///
    /// # Errors
    ///
    /// When a living server has the name, or the server can take no more exports.
    pub fn claim_in_server(
        &self,
        server: &str,
        is_confined: bool,
        name: &str,
    ) -> Result<(NameLock, Option<u32>)> {
        let all = match self.servers()?.dir(server)?.dir(SPARE) {
            Err(error) if error.errno() == Errno::NOENT => None,
            other => Some(other?),
        };
        if let Some(all) = &all {
            for spare in all.names()? {
                let Ok(number) = spare.parse() else { continue };
                if let Some(lock) = take(all, &spare)? {
                    let claim = self.publish(all, &spare, lock, name)?;
                    return Ok((claim, Some(number)));
                }
            }
        }
        match all {
            _ if !is_confined => Ok((self.claim(name)?.keep_notes(), None)),
            Some(_) => bail!(
                "server '{server}' has no room for another export: stop one of those that were added, or start the \
                 server with a larger --room"
            ),
            None => bail!(
                "server '{server}' takes no exports while it runs: it was started with --room 0, or is of an older \
                 version"
            ),
        }
    }

    /// Moves a spare folder to where that of an export belongs, with the notes of a dead server of the export.
    fn publish(&self, all: &TrustedDir, spare: &str, lock: File, name: &str) -> Result<NameLock> {
        let exports = TrustedDir::open(self.path())?.make_dir(EXPORTS, DIR_MODE)?;
        let moved = match renameat_with(all, spare, &exports, name, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => self.replace(all, spare, &exports, name),
            other => other
                .with_context(|| format!("cannot move a folder to {}", exports.path().display())),
        };
        let dir = moved.and_then(|()| Ok(exports.dir(name)?));
        let dir = dir.inspect_err(|_| {
            // Without the lock it is spare again.
            let _ = all.dir(spare).map(|spare| unlink(&spare, LOCK));
        })?;
        let claim = NameLock {
            dir: Arc::new(dir),
            name: name.to_owned(),
            left: false,
            home: Some(all.path().join(spare)),
            lock,
        };
        Ok(claim.keep_notes())
    }

    /// Puts a spare folder in the place of that of a dead server, and removes that.
    fn replace(
        &self,
        all: &TrustedDir,
        spare: &str,
        exports: &TrustedDir,
        name: &str,
    ) -> Result<()> {
        let mut old = self.claim(name)?;
        // Until they are in the other folder its notes stay, whatever fails.
        old.left = true;
        if statat(&old.dir, VHOST_SOCKET, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            bail!(
                "the service manager listens at the socket of '{name}', and hands it only to a server that it starts: \
                 restart that, or stop the socket unit"
            );
        }
        let new = Arc::new(all.dir(spare)?);
        for note in NOTES {
            match old.dir.read(note) {
                Err(error) if error.errno() == Errno::NOENT => {}
                text => NoteFile::new(Arc::clone(&new), note).replace(&text?, || {})?,
            }
        }
        renameat_with(all, spare, exports, name, RenameFlags::EXCHANGE)
            .with_context(|| format!("cannot move {}", old.folder().display()))?;
        for note in NOTES {
            unlink(&old.dir, note)?;
        }
        // There it is now, and is removed from.
        spare.clone_into(&mut old.name);
        old.left = false;
        Ok(())
    }

    /// Takes over the name of an export, with its lock, from the command that adds the export.
    ///
    /// # Errors
    ///
    /// When that is not the lock of the name.
    pub(super) fn adopt(&self, name: &str, lock: File, home: Option<PathBuf>) -> Result<NameLock> {
        let dir = self.exports()?.dir(name)?;
        ensure!(
            is_in(&dir, &lock) && lock_exclusively(&lock),
            "{} is not locked by the command that adds the export",
            dir.path().display()
        );
        let claim = NameLock {
            dir: Arc::new(dir),
            name: name.to_owned(),
            left: false,
            home,
            lock,
        };
        Ok(claim.keep_notes())
    }
}

/// Locks a spare folder. `None` if another command has it.
fn take(all: &TrustedDir, spare: &str) -> Result<Option<File>> {
    let gone = |error: &upgrade_proto::Error| error.errno() == Errno::NOENT;
    let dir = match all.dir(spare) {
        Err(error) if gone(&error) => return Ok(None),
        other => other?,
    };
    let lock = match dir.file(LOCK, OFlags::RDWR | OFlags::CREATE) {
        Err(error) if gone(&error) => return Ok(None),
        other => other?,
    };
    let is_taken = lock_exclusively(&lock) && is_in(&dir, &lock) && is_there(all, spare, &dir);
    if !is_taken {
        return Ok(None);
    }
    // A command that was killed may have left notes of another export.
    for file in dir.names()?.iter().filter(|name| *name != LOCK) {
        if unlink(&dir, file).is_err() {
            return Ok(None);
        }
    }
    Ok(Some(lock))
}

#[cfg(test)]
#[path = "spares_tests.rs"]
mod tests;
