//! The runtime directory: which exports this machine serves, and where to reach them.
//!
//! ```text
//! /run/ublkup/exports/NAME/lock             held (flock) by the server as long as it lives
//!                          control          admin socket: stat, stop
//!                          vhost-user-blk   the vhost door, unless --vhost-socket says otherwise
//!                          ublk-id          number of the block device and of its disk, while there is one
//!                          upgraded         there while a vhost client has the disk
//! ```
//!
//! The lock tells the living from the dead: whoever can take it may clear the folder away.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};

/// The admin socket in an export's folder.
pub const CONTROL: &str = "control";

/// The vhost door's socket in an export's folder.
pub const VHOST_SOCKET: &str = "vhost-user-blk";

const LOCK: &str = "lock";
const UBLK_ID: &str = "ublk-id";
const UPGRADED: &str = "upgraded";

/// Where servers of this user keep their state.
#[derive(Clone, Debug)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// The directory that was asked for, or `/run/ublkup` for root, or `$XDG_RUNTIME_DIR/ublkup`.
    ///
    /// # Errors
    ///
    /// When neither is known.
    pub fn find(asked_for: Option<PathBuf>) -> Result<Self> {
        if let Some(path) = asked_for {
            return Ok(Self(std::path::absolute(path)?));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(Self("/run/ublkup".into()));
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(dir) if !dir.is_empty() => Ok(Self(Path::new(&dir).join("ublkup"))),
            _ => bail!("no runtime directory: set XDG_RUNTIME_DIR or give --runtime-dir"),
        }
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

    /// The names of all folders, sorted: exports that live and what dead servers left.
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

    /// Whether a server holds this export. A folder without one is what a dead server left.
    #[must_use]
    pub fn is_alive(&self, name: &str) -> bool {
        let Ok(lock) = open_lock(&self.folder(name), OFlags::empty()) else {
            return false;
        };
        flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Takes the name for this process; clears away what a dead server left under it.
    ///
    /// # Errors
    ///
    /// When a living server holds the name, or the directory cannot be used.
    pub fn claim(&self, name: &str) -> Result<Claim> {
        let folder = self.folder(name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&folder)
            .with_context(|| format!("cannot make {} (give --runtime-dir)", folder.display()))?;
        // The holder of the lock may remove the file while we wait for nothing: look again until
        // the file we locked is the one in the folder. Each round someone else made progress.
        for _ in 0..16 {
            let lock = match open_lock(&folder, OFlags::CREATE) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    DirBuilder::new().recursive(true).create(&folder)?;
                    continue;
                }
                other => other.with_context(|| format!("cannot lock {}", folder.display()))?,
            };
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                bail!(
                    "an export called '{name}' is already served: stop it (ublkup stop {name}) \
                     or choose another name"
                );
            }
            let same = fs::metadata(folder.join(LOCK))
                .and_then(|there| Ok((there.ino(), lock.metadata()?.ino())))
                .is_ok_and(|(there, ours)| there == ours);
            if same {
                let claim = Claim {
                    folder,
                    name: name.to_owned(),
                    _lock: lock,
                };
                claim.clear_left_over()?;
                return Ok(claim);
            }
        }
        bail!("'{name}' is being started and stopped by others all the time: try again")
    }
}

fn open_lock(folder: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | more;
    Ok(open(folder.join(LOCK), flags, Mode::from(0o600))?.into())
}

/// The name of an export, held by this process. Dropping it clears the folder away.
#[derive(Debug)]
pub struct Claim {
    folder: PathBuf,
    name: String,
    /// Held, not read: the kernel lets go of it when the process ends, however it ends.
    _lock: File,
}

impl Claim {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The block device that a dead server of this name left behind, if it left one, and the
    /// sequence number of its disk.
    #[must_use]
    pub fn left_ublk_id(&self) -> Option<(u32, Option<u64>)> {
        let text = fs::read_to_string(self.folder.join(UBLK_ID)).ok()?;
        let mut words = text.split_whitespace();
        let id = words.next()?.parse().ok()?;
        Some((id, words.next().and_then(|word| word.parse().ok())))
    }

    /// Notes the numbers of the block device and its disk, so that it can be found after a crash.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn note_ublk_id(&self, id: u32, disk_sequence: Option<u64>) -> io::Result<()> {
        let new = self.folder.join(".ublk-id.new");
        let sequence = disk_sequence.map_or(String::new(), |number| format!(" {number}"));
        fs::write(&new, format!("{id}{sequence}\n"))?;
        fs::rename(new, self.folder.join(UBLK_ID))
    }

    /// Whether a vhost client had the disk when the last server of this name died.
    #[must_use]
    pub fn was_upgraded(&self) -> bool {
        self.folder.join(UPGRADED).exists()
    }

    /// Where it is noted that a vhost client has the disk.
    #[must_use]
    pub fn upgraded_note(&self) -> PathBuf {
        self.folder.join(UPGRADED)
    }

    /// Forgets the number: the device is gone.
    pub fn forget_ublk_id(&self) {
        remove(&self.folder.join(UBLK_ID));
    }

    /// Removes the sockets of a dead server; keeps its notes, which the doors read.
    fn clear_left_over(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let keep = [LOCK, UBLK_ID, UPGRADED];
            if !keep.iter().any(|name| entry.file_name() == *name) {
                fs::remove_file(entry.path())
                    .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        for file in [CONTROL, VHOST_SOCKET, UPGRADED, LOCK] {
            remove(&self.folder.join(file));
        }
        // Not empty when a device was left noted on purpose: then the folder stays.
        let _ = fs::remove_dir(&self.folder);
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, RuntimeDir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::find(Some(temp.path().join("run"))).unwrap();
        (temp, dir)
    }

    #[test]
    fn a_name_is_held_once_and_given_back() {
        let (_temp, dir) = dir();
        let claim = dir.claim("a").unwrap();
        let error = dir.claim("a").unwrap_err().to_string();
        assert!(error.contains("already served"), "{error}");
        assert!(dir.is_alive("a") && !dir.is_alive("b"));
        dir.claim("b").unwrap();
        drop(claim);
        assert!(!dir.is_alive("a"));
        assert!(!dir.folder("a").exists());
        dir.claim("a").unwrap();
    }

    #[test]
    fn what_a_dead_server_left_is_cleared_but_its_device_is_remembered() {
        let (_temp, dir) = dir();
        let folder = dir.folder("a");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(LOCK), "").unwrap();
        fs::write(folder.join(CONTROL), "").unwrap();
        fs::write(folder.join(UBLK_ID), "7\n").unwrap();
        assert_eq!(dir.names().unwrap(), ["a"]);
        assert!(!dir.is_alive("a"));
        let claim = dir.claim("a").unwrap();
        assert!(!folder.join(CONTROL).exists());
        assert_eq!(claim.left_ublk_id(), Some((7, None)));
        claim.note_ublk_id(7, Some(12)).unwrap();
        assert_eq!(claim.left_ublk_id(), Some((7, Some(12))));
        claim.forget_ublk_id();
        drop(claim);
        assert!(!folder.exists());
    }

    #[test]
    fn many_who_want_one_name_get_it_one_at_a_time() {
        let (_temp, dir) = dir();
        let held = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut got = 0;
                    for _ in 0..2000 {
                        let Ok(claim) = dir.claim("a") else { continue };
                        assert_eq!(held.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        got += 1;
                        held.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(claim);
                    }
                    got
                });
            }
        });
    }
}
