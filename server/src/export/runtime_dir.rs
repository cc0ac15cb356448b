//! The runtime directory: which exports this machine serves, and where to reach them.
//!
//! ```text
//! /run/ublkup/exports/NAME/lock             held (flock) by the server as long as it lives
//!                          control          admin socket: stat, stop
//!                          vhost-user-blk   the vhost door, unless --vhost-socket says otherwise
//!                          ublk-id          number of the block device and of its disk, its mark, and which file
//!                                           is behind it, while there is one
//!                          served           what is served and how, with the options that were changed
//!                          upgraded         which vhost client has the disk, or had it when its server died
//!             servers/NAME/lock              held by the server as long as it lives
//!                          control           admin socket of the server (docs/admin.md)
//!                          spare/N           empty folders for exports that are added later (`spares.rs`)
//!             records/servers-NAME           where its exports come from, for `ublkup reload`
//!                     exports-NAME           what was served and how, for `ublkup recover` and the next server
//! ```
//!
//! Each of these directories, and each note in them, belongs to this user or root, is no link, and can be written to by
//! its owner only: commands of root act on the word of no other user.
//!
//! A server that a guest took over can write to the notes in its own folders. What is served again, and reloaded, follows
//! records, which a confined server can remove and not write.
//!
//! A folder whose lock is free is of a dead server: the next one that takes the lock may remove the
//! folder, or recover what is noted there. Each note is written beside the old one and then put in
//! its place, so that a server that dies at any moment leaves the old one or the new one.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, FlockOperation, OFlags, flock, fstat, statat};
use rustix::io::Errno;
use upgrade_proto::{Error, TrustedDir};

use super::name_lock::{
    CONTROL, DEVICES, DeviceNote, DeviceRecord, LOCK, NameLock, RECORDS, SERVED, UBLK_ID, UPGRADED,
    VHOST_SOCKET, lock_exclusively, remove_links, remove_spares,
};
use crate::door::ownership::ClientNote;
use crate::engine::durable::NoteFile;
use crate::engine::wait::repeat_while;

/// The folder of all exports in a runtime directory.
pub(super) const EXPORTS: &str = "exports";

/// The folder of all servers.
const SERVERS: &str = "servers";

/// The mode of directories.
pub(super) const DIR_MODE: u32 = 0o755;

/// How long a server that has answered `leave` may take to release the name.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// How long another server may hold the name of one that was killed.
const SWEEP_LIMIT: Duration = Duration::from_millis(500);

/// How often that is tried.
const LEAVE_INTERVAL: Duration = Duration::from_millis(10);

/// Where servers of this user keep their state.
#[derive(Clone, Debug)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// `asked_for`, or `/run/ublkup` for root, or `$XDG_RUNTIME_DIR/ublkup`.
    ///
    /// # Errors
    ///
    /// When neither is known.
    pub fn find(asked_for: Option<PathBuf>) -> Result<Self> {
        if let Some(path) = asked_for {
            return Ok(Self(std::path::absolute(path)?));
        }
        let own = upgrade_proto::own_runtime_dir().map(Self);
        own.context("no runtime directory: set XDG_RUNTIME_DIR or give --runtime-dir")
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The folder of an export, whether it exists or not, for messages and sockets.
    #[must_use]
    pub fn folder(&self, name: &str) -> PathBuf {
        self.0.join(EXPORTS).join(name)
    }

    /// The folder of all exports, for rules.
    #[must_use]
    pub fn exports_folder(&self) -> PathBuf {
        self.0.join(EXPORTS)
    }

    /// The folder of records, for rules.
    pub(super) fn records_folder(&self) -> PathBuf {
        self.0.join(RECORDS)
    }

    /// The record of a server: where its exports come from.
    ///
    /// # Errors
    ///
    /// When there can be no folder of records.
    pub fn server_record(&self, name: &str) -> Result<NoteFile, Error> {
        self.record(SERVERS, name)
    }

    /// The record of how an export is served.
    ///
    /// # Errors
    ///
    /// When there can be no folder of records.
    pub fn export_record(&self, name: &str) -> Result<NoteFile, Error> {
        self.record(EXPORTS, name)
    }

    /// The record of the block devices that were made for an export.
    ///
    /// # Errors
    ///
    /// When there can be no folder of them.
    pub(super) fn device_record(&self, name: &str) -> Result<NoteFile, Error> {
        let devices = TrustedDir::open(&self.0)?.make_dir(DEVICES, DIR_MODE)?;
        Ok(NoteFile::new(Arc::new(devices), name))
    }

    /// The block devices that were made for an export, of which one may be left: as recorded by programs that no guest can have
    /// taken over.
    ///
    /// # Errors
    ///
    /// When the record cannot be read, or is not trusted.
    pub fn devices(&self, name: &str) -> Result<Vec<DeviceRecord>, Error> {
        let read = || TrustedDir::open(&self.0)?.dir(DEVICES)?.read(name);
        match read() {
            Err(error) if error.errno() == Errno::NOENT => Ok(Vec::new()),
            other => other.map(|text| DeviceRecord::parse(&text)),
        }
    }

    /// The names that a block device was made for, which has not been forgotten.
    #[must_use]
    pub(super) fn names_with_devices(&self) -> Vec<String> {
        let names = || TrustedDir::open(&self.0)?.dir(DEVICES)?.names();
        names().unwrap_or_default()
    }

    fn record(&self, kind: &str, name: &str) -> Result<NoteFile, Error> {
        let records = TrustedDir::open(&self.0)?.make_dir(RECORDS, DIR_MODE)?;
        Ok(NoteFile::new(Arc::new(records), format!("{kind}-{name}")))
    }

    /// What is recorded of an export, if anything is.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or is not trusted.
    pub fn read_export_record(&self, name: &str) -> Result<Option<String>, Error> {
        let read = || {
            let records = TrustedDir::open(&self.0)?.dir(RECORDS)?;
            records.read(&format!("{EXPORTS}-{name}"))
        };
        match read() {
            Err(error) if error.errno() == Errno::NOENT => Ok(None),
            other => other.map(Some),
        }
    }

    pub(super) fn exports(&self) -> Result<TrustedDir, Error> {
        TrustedDir::open(&self.0)?.dir(EXPORTS)
    }

    /// Whether a folder is that of an export.
    pub(super) fn is_folder_of(&self, name: &str, folder: &TrustedDir) -> bool {
        (self.exports()).is_ok_and(|exports| is_there(&exports, name, folder))
    }

    /// The names of all folders, sorted: those of living servers and those that dead ones left.
    ///
    /// # Errors
    ///
    /// When the directory exists and is not trusted, or cannot be read.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let exports = match self.exports() {
            Err(error) if error.errno() == Errno::NOENT => return Ok(Vec::new()),
            other => other?,
        };
        let mut names = exports.names()?;
        names.retain(|name| !only_has_a_socket(&exports, name));
        Ok(names)
    }

    pub(super) fn servers(&self) -> Result<TrustedDir, Error> {
        TrustedDir::open(&self.0)?.dir(SERVERS)
    }

    /// The names of the servers that run, sorted.
    ///
    /// # Errors
    ///
    /// As for [`names`](Self::names).
    pub fn server_names(&self) -> Result<Vec<String>, Error> {
        let mut names = names(self.servers())?;
        // One that cannot be examined is left to the command that asks it.
        names.retain(|name| is_alive(self.servers(), name).unwrap_or(true));
        Ok(names)
    }

    /// The folder of a server.
    ///
    /// # Errors
    ///
    /// When there is none, or it is not trusted.
    pub(super) fn server_folder(&self, name: &str) -> Result<TrustedDir, Error> {
        self.servers()?.dir(name)
    }

    /// The admin socket of a server, whether it exists or not.
    #[must_use]
    pub fn server_socket(&self, name: &str) -> PathBuf {
        self.0.join(SERVERS).join(name).join(CONTROL)
    }

    /// Takes a name for this server, and removes what servers that were killed left.
    ///
    /// # Errors
    ///
    /// When a living server has the name, or the directory cannot be used.
    pub fn claim_server(&self, name: &str) -> Result<NameLock> {
        let taken = || format!("a server called '{name}' runs already: give another --server-name");
        for left in names(self.servers())? {
            if left != name
                && is_alive(self.servers(), &left).is_ok_and(|alive| !alive)
                && let Ok(claim) = self.claim_in(SERVERS, &left, &taken)
            {
                // Dropping it removes the folder.
                remove_spares(&claim.dir);
                remove_links(&claim.dir);
            }
        }
        // Another server may be about to remove what is left of an earlier one of this name.
        let claim = || self.claim_in(SERVERS, name, &taken);
        repeat_while(SWEEP_LIMIT, LEAVE_INTERVAL, claim, Result::is_err)
    }

    /// Whether a server holds this name. A folder whose name is free was left by a dead server.
    ///
    /// # Errors
    ///
    /// When this user cannot know, or the folder is not trusted.
    pub fn is_alive(&self, name: &str) -> Result<bool, Error> {
        is_alive(self.exports(), name)
    }

    /// What was last served under a name, as its server noted it.
    ///
    /// # Errors
    ///
    /// When nothing is noted, or the note is not trusted.
    pub fn served(&self, name: &str) -> Result<String, Error> {
        self.exports()?.dir(name)?.read(SERVED)
    }

    /// The block device noted under a name.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<DeviceNote> {
        DeviceNote::parse(&self.exports().ok()?.dir(name).ok()?.read(UBLK_ID).ok()?)
    }

    /// Which storage is noted under a name: that of its block device, or of the vhost-user client that has the disk.
    #[must_use]
    pub fn storage(&self, name: &str) -> Option<String> {
        let of_client = || {
            let folder = self.exports().ok()?.dir(name).ok()?;
            ClientNote::new(NoteFile::new(Arc::new(folder), UPGRADED), None).noted_storage()
        };
        let device = self.device(name);
        device.and_then(|note| note.storage).or_else(of_client)
    }

    /// As [`claim`](Self::claim), for a name that its server is about to release.
    ///
    /// # Errors
    ///
    /// As for `claim`, after some seconds.
    pub fn claim_soon(&self, name: &str) -> Result<NameLock> {
        let claim = || self.claim(name);
        repeat_while(LEAVE_LIMIT, LEAVE_INTERVAL, claim, Result::is_err)
    }

    /// Takes the name for this process, and removes the sockets that a dead server left under it.
    ///
    /// # Errors
    ///
    /// When a living server holds the name, or the directory cannot be used.
    pub fn claim(&self, name: &str) -> Result<NameLock> {
        let taken = || {
            format!(
                "an export called '{name}' is already served: stop it (ublkup stop {name}) or take it over \
                 (serve --take-over), or choose another name"
            )
        };
        self.claim_in(EXPORTS, name, &taken)
    }

    /// Takes a name in one of the folders.
    fn claim_in(&self, parent: &str, name: &str, taken: &dyn Fn() -> String) -> Result<NameLock> {
        DirBuilder::new()
            .recursive(true)
            .mode(DIR_MODE)
            .create(&self.0)
            .with_context(|| format!("cannot make {} (give --runtime-dir)", self.0.display()))?;
        let parent = TrustedDir::open(&self.0)?.make_dir(parent, DIR_MODE)?;
        // Another server may have removed the file between open and lock: try again until the locked
        // file is the one in the folder. In each round another process made progress.
        for _ in 0..16 {
            let dir = match parent.make_dir(name, DIR_MODE) {
                Err(error) if error.errno() == Errno::NOENT => continue,
                other => other?,
            };
            let lock = match dir.file(LOCK, OFlags::RDWR | OFlags::CREATE) {
                Err(error) if error.errno() == Errno::NOENT => continue,
                other => other.with_context(|| format!("cannot lock {}", dir.path().display()))?,
            };
            if !lock_exclusively(&lock) {
                bail!(taken());
            }
            if is_in(&dir, &lock) && is_there(&parent, name, &dir) {
                let claim = NameLock {
                    dir: Arc::new(dir),
                    name: name.to_owned(),
                    left: false,
                    home: None,
                    lock,
                };
                claim.clear_stale()?;
                return Ok(claim);
            }
        }
        bail!("'{name}' is being started and stopped by other servers all the time: try again")
    }
}

/// The names in a folder, if there is one.
fn names(folder: Result<TrustedDir, Error>) -> Result<Vec<String>, Error> {
    match folder {
        Err(error) if error.errno() == Errno::NOENT => Ok(Vec::new()),
        other => other?.names(),
    }
}

/// Whether the folder of a name is there for a socket of the service manager only: no server has been there.
fn only_has_a_socket(exports: &TrustedDir, name: &str) -> bool {
    let Ok(dir) = exports.dir(name) else {
        return false;
    };
    let has_lock = statat(&dir, LOCK, AtFlags::SYMLINK_NOFOLLOW).is_ok();
    !has_lock && dir.names().is_ok_and(|entries| entries == [VHOST_SOCKET])
}

/// Whether a server holds a name in a folder.
fn is_alive(folder: Result<TrustedDir, Error>, name: &str) -> Result<bool, Error> {
    match folder.and_then(|dir| dir.dir(name)?.file(LOCK, OFlags::RDWR)) {
        Ok(lock) => Ok(flock(&lock, FlockOperation::NonBlockingLockShared).is_err()),
        Err(error) if error.errno() == Errno::NOENT => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a folder is still that of a name: one that was a server's spare may have been moved back.
pub(super) fn is_there(parent: &TrustedDir, name: &str, dir: &TrustedDir) -> bool {
    let there = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
    let same = there.and_then(|there| Ok(there.st_ino == fstat(dir)?.st_ino));
    same.is_ok_and(|same| same)
}

/// Whether a lock is the one in the folder.
pub(super) fn is_in(dir: &TrustedDir, lock: &File) -> bool {
    let there = statat(dir, LOCK, AtFlags::SYMLINK_NOFOLLOW);
    let same = there.and_then(|there| Ok(there.st_ino == fstat(lock)?.st_ino));
    same.is_ok_and(|same| same)
}

#[cfg(test)]
#[path = "runtime_dir_tests.rs"]
mod tests;
