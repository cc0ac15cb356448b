//! The runtime directory: which exports this machine serves, and where to reach them.
//!
//! ```text
//! /run/ublkup/exports/NAME/lock             held (flock) by the server as long as it lives
//!                          control          admin socket: stat, stop
//!                          vhost-user-blk   the vhost door, unless --vhost-socket says otherwise
//!                          ublk-id          number of the block device and of its disk, and its mark, while there is one
//!                          served           what is served and how, for `ublkup recover`
//!                          upgraded         there while a vhost client has the disk
//! ```
//!
//! The lock tells the living from the dead: whoever can take it may clear the folder away, or go on
//! with what is noted there. Each note is written beside the old one and then put in its place, so
//! that a server that dies at any moment leaves the old one or the new one.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};

use crate::engine::crash;

/// The admin socket in an export's folder.
pub const CONTROL: &str = "control";

/// The vhost door's socket in an export's folder.
pub const VHOST_SOCKET: &str = "vhost-user-blk";

const LOCK: &str = "lock";
const UBLK_ID: &str = "ublk-id";
const UPGRADED: &str = "upgraded";
const SERVED: &str = "served";

/// How long a server that said that it left may take to let go of the name.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// How long those may take who only look whether a name has a server.
const LOOK_LIMIT: Duration = Duration::from_secs(1);

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

    /// What was last served under a name, as its server noted it.
    ///
    /// # Errors
    ///
    /// When nothing is noted.
    pub fn served(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.folder(name).join(SERVED))
    }

    /// As [`claim`](Self::claim), for a name that its server is about to let go of.
    ///
    /// # Errors
    ///
    /// As for `claim`, after some seconds.
    pub fn claim_soon(&self, name: &str) -> Result<NameLock> {
        let deadline = Instant::now() + LEAVE_LIMIT;
        loop {
            match self.claim(name) {
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => return other,
            }
        }
    }

    /// Takes the name for this process; clears away what a dead server left under it.
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
            if !lock_alone(&lock) {
                bail!(
                    "an export called '{name}' is already served: stop it (ublkup stop {name}) \
                     or go on with it (serve --take-over), or choose another name"
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
        bail!("'{name}' is being started and stopped by others all the time: try again")
    }
}

fn open_lock(folder: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | more;
    Ok(open(folder.join(LOCK), flags, Mode::from(0o600))?.into())
}

/// Takes the lock of a name for this process alone; false if a server has it.
fn lock_alone(lock: &File) -> bool {
    let deadline = Instant::now() + LOOK_LIMIT;
    loop {
        if flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        // Those who look share it for a moment, and a server shares it with nobody.
        let is_shared = flock(lock, FlockOperation::NonBlockingLockShared).is_ok();
        if !is_shared || Instant::now() > deadline {
            return false;
        }
        // It is ours, so that cannot fail.
        let _ = flock(lock, FlockOperation::Unlock);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The name of an export, held by this process. Dropping it clears the folder away, unless a block
/// device is noted there: that one waits for a server, which wants all the notes.
#[derive(Debug)]
pub struct NameLock {
    folder: PathBuf,
    name: String,
    /// The notes are for another server.
    left: bool,
    /// Held, not read: the kernel lets go of it when the process ends, however it ends.
    _lock: File,
}

impl NameLock {
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

    /// The block device that an earlier server of this name left behind, if it left one.
    #[must_use]
    pub fn left_device(&self) -> Option<DeviceNote> {
        DeviceNote::parse(&fs::read_to_string(self.folder.join(UBLK_ID)).ok()?)
    }

    /// Notes the block device, so that it can be found after a crash.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn note_device(&self, note: &DeviceNote) -> io::Result<()> {
        self.note(UBLK_ID, &note.text())
    }

    /// Notes what is served, for a server that is to go on with it.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn note_served(&self, text: &str) -> io::Result<()> {
        self.note(SERVED, text)
    }

    /// Puts a note in the place of the old one, if there is one.
    fn note(&self, name: &str, text: &str) -> io::Result<()> {
        let new = self.folder.join(format!(".{name}.new"));
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        crash::point(match name {
            SERVED => "export-written",
            _ => "id-written",
        });
        fs::rename(new, self.folder.join(name))?;
        File::open(&self.folder)?.sync_all()
    }

    /// Lets go of the name and leaves the notes to the next server.
    pub fn leave(mut self) {
        self.left = true;
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
    fn clear_stale(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let keep = [LOCK, UBLK_ID, SERVED, UPGRADED];
            if !keep.iter().any(|name| entry.file_name() == *name) {
                fs::remove_file(entry.path())
                    .with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        Ok(())
    }
}

impl Drop for NameLock {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let notes: &[&str] = match self.left_device() {
            Some(_) => &[],
            None => &[SERVED, UPGRADED],
        };
        // The lock last: from then on the folder is anybody's.
        for file in [&[CONTROL, VHOST_SOCKET][..], notes, &[LOCK]].concat() {
            remove(&self.folder.join(file));
        }
        // Not empty when there are notes left: then the folder stays.
        let _ = fs::remove_dir(&self.folder);
    }
}

/// What is noted of a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceNote {
    /// Its number; not known before it was made.
    pub id: Option<u32>,
    /// The sequence number of its disk; not known before the disk was there.
    pub disk_sequence: Option<u64>,
    /// What its maker marked it with. Whoever has the mark is the device, whatever else has changed.
    pub mark: Option<u64>,
}

impl DeviceNote {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace().map(|word| word.parse::<u64>().ok());
        let mut next = || words.next().flatten();
        let note = Self {
            id: next().and_then(|id| u32::try_from(id).ok()),
            disk_sequence: next(),
            // Devices of others have zero there.
            mark: next().filter(|mark| *mark != 0),
        };
        (note.id.is_some() || note.mark.is_some()).then_some(note)
    }

    fn text(&self) -> String {
        let word = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        let id = self.id.map(u64::from);
        [id, self.disk_sequence, self.mark].map(word).join(" ") + "\n"
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
        let noted = DeviceNote {
            id: Some(7),
            ..DeviceNote::default()
        };
        assert_eq!(claim.left_device(), Some(noted));
        claim.forget_ublk_id();
        drop(claim);
        assert!(!folder.exists());
    }

    #[test]
    fn who_leaves_lets_go_of_the_name_and_keeps_the_notes() {
        let (_temp, dir) = dir();
        let claim = dir.claim("a").unwrap();
        for note in [
            DeviceNote {
                mark: Some(u64::MAX),
                ..DeviceNote::default()
            },
            DeviceNote {
                id: Some(3),
                disk_sequence: Some(12),
                mark: Some(5),
            },
        ] {
            claim.note_device(&note).unwrap();
            assert_eq!(claim.left_device(), Some(note));
        }
        claim.note_served("this").unwrap();
        claim.leave();
        assert!(!dir.is_alive("a"));
        assert_eq!(dir.served("a").unwrap(), "this");
        let claim = dir.claim_soon("a").unwrap();
        assert_eq!(claim.left_device().unwrap().id, Some(3));
        claim.forget_ublk_id();
        drop(claim);
        assert!(!dir.folder("a").exists());
    }

    #[test]
    fn who_fails_with_a_device_that_waits_takes_no_note_along() {
        let (_temp, dir) = dir();
        let waiting = DeviceNote {
            mark: Some(9),
            ..DeviceNote::default()
        };
        let first = dir.claim("a").unwrap();
        first.note_device(&waiting).unwrap();
        first.note_served("this").unwrap();
        File::create(first.upgraded_note()).unwrap();
        first.leave();
        // One that could not serve it, and one that did not get that far.
        drop(dir.claim("a").unwrap());
        let junk = dir.folder("a").join("junk");
        fs::create_dir(&junk).unwrap();
        let error = format!("{:#}", dir.claim("a").unwrap_err());
        assert!(error.contains("junk"), "{error}");
        fs::remove_dir(junk).unwrap();
        assert!(!dir.is_alive("a"));
        assert_eq!(dir.served("a").unwrap(), "this");
        let next = dir.claim("a").unwrap();
        assert_eq!(next.left_device(), Some(waiting));
        assert!(next.was_upgraded());
        // Without the device they mean nothing.
        next.forget_ublk_id();
        drop(next);
        assert!(!dir.folder("a").exists());
    }

    #[test]
    fn a_device_without_a_mark_is_known_by_its_disk_alone() {
        for text in ["3 12 0\n", "3 12\n", "3 12 -\n"] {
            let noted = DeviceNote {
                id: Some(3),
                disk_sequence: Some(12),
                mark: None,
            };
            assert_eq!(DeviceNote::parse(text), Some(noted), "{text}");
        }
        assert_eq!(DeviceNote::parse("- - 0\n"), None);
    }

    #[test]
    fn who_only_looks_stands_in_nobodys_way() {
        let (_temp, dir) = dir();
        dir.claim("a").unwrap().leave();
        // Looks, and is interrupted for a moment.
        let looker = open_lock(&dir.folder("a"), OFlags::empty()).unwrap();
        flock(&looker, FlockOperation::NonBlockingLockShared).unwrap();
        let goes_on = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(looker);
        });
        let claim = dir.claim("a").unwrap();
        goes_on.join().unwrap();
        assert!(dir.is_alive("a"));
        drop(claim);
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
