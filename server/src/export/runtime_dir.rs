//! The runtime directory: which exports this machine serves, and where to reach them.
//!
//! ```text
//! /run/ublkup/exports/NAME/lock             held (flock) by the server as long as it lives
//!                          control          admin socket: stat, stop
//!                          vhost-user-blk   the vhost door, unless --vhost-socket says otherwise
//!                          ublk-id          number of the block device and of its disk, its mark, and which file
//!                                           is behind it, while there is one
//!                          served           what is served and how, for `ublkup recover`
//!                          upgraded         there while a vhost client has the disk
//! ```
//!
//! A folder whose lock is free is of a dead server: the next one that takes the lock may remove the
//! folder, or recover what is noted there. Each note is written beside the old one and then put in
//! its place, so that a server that dies at any moment leaves the old one or the new one.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, OFlags, flock};

use super::name_lock::{DeviceNote, LOCK, NameLock, SERVED, lock_exclusively, open_lock};
use crate::engine::wait::repeat_while;

/// How long a server that has answered `leave` may take to release the name.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

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

    fn exports(&self) -> PathBuf {
        self.0.join("exports")
    }

    /// The folder of an export, whether it exists or not.
    #[must_use]
    pub fn folder(&self, name: &str) -> PathBuf {
        self.exports().join(name)
    }

    /// The names of all folders, sorted: those of living servers and those that dead ones left.
    ///
    /// # Errors
    ///
    /// When the directory exists and cannot be read.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.exports()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether a server holds this name. A folder whose name is free was left by a dead server.
    ///
    /// # Errors
    ///
    /// When this user cannot know.
    pub fn is_alive(&self, name: &str) -> io::Result<bool> {
        match open_lock(&self.folder(name), OFlags::empty()) {
            Ok(lock) => Ok(flock(&lock, FlockOperation::NonBlockingLockShared).is_err()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What was last served under a name, as its server noted it.
    ///
    /// # Errors
    ///
    /// When nothing is noted.
    pub fn served(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.folder(name).join(SERVED))
    }

    /// The block device noted under a name.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<DeviceNote> {
        DeviceNote::read(&self.folder(name))
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
        let folder = self.folder(name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&folder)
            .with_context(|| format!("cannot make {} (give --runtime-dir)", folder.display()))?;
        // Another server may have removed the file between open and lock: try again until the locked
        // file is the one in the folder. In each round another process made progress.
        for _ in 0..16 {
            let lock = match open_lock(&folder, OFlags::CREATE) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    DirBuilder::new().recursive(true).create(&folder)?;
                    continue;
                }
                other => other.with_context(|| format!("cannot lock {}", folder.display()))?,
            };
            if !lock_exclusively(&lock) {
                bail!(
                    "an export called '{name}' is already served: stop it (ublkup stop {name}) \
                     or take it over (serve --take-over), or choose another name"
                );
            }
            let same = fs::metadata(folder.join(LOCK))
                .and_then(|there| Ok((there.ino(), lock.metadata()?.ino())))
                .is_ok_and(|(there, ours)| there == ours);
            if same {
                let claim = NameLock {
                    folder,
                    name: name.to_owned(),
                    left: false,
                    _lock: lock,
                };
                claim.clear_stale()?;
                return Ok(claim);
            }
        }
        bail!("'{name}' is being started and stopped by other servers all the time: try again")
    }
}

#[cfg(test)]
#[path = "runtime_dir_tests.rs"]
mod tests;
