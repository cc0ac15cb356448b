//! The name of an export, held by one server, and the notes below it.

use std::ffi::OsStr;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{
    AtFlags, CWD, FlockOperation, RenameFlags, flock, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use upgrade_proto::TrustedDir;

use crate::engine::crash;
use crate::engine::durable::{NoteFile, unfinished, unlink};
use crate::engine::wait::repeat_while;

/// The admin socket in an export's folder.
pub const CONTROL: &str = "control";

/// The vhost door's socket in an export's folder.
pub const VHOST_SOCKET: &str = "vhost-user-blk";

/// The folder of all spare ones in that of a server (`spares.rs`).
pub(super) const SPARE: &str = "spare";

pub(super) const LOCK: &str = "lock";
pub(super) const UBLK_ID: &str = "ublk-id";
const UPGRADED: &str = "upgraded";
const LOCKED_BY: &str = "locked-by";
pub(super) const SERVED: &str = "served";
/// The folder of records in a runtime directory.
pub(super) const RECORDS: &str = "records";
/// The folder of exports, and the kind of the records of how they are served.
pub(super) const EXPORTS: &str = "exports";
/// The kind of the records of the marks of block devices.
pub(super) const DEVICES: &str = "devices";
pub(super) const NOTES: [&str; 4] = [UBLK_ID, SERVED, UPGRADED, LOCKED_BY];

/// How long other processes may hold the shared lock with which they check whether a name has a server.
const CHECK_LIMIT: Duration = Duration::from_secs(1);

/// How often the lock is tried meanwhile.
const CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// Locks a name exclusively. Returns false if a server has it.
pub(super) fn lock_exclusively(lock: &File) -> bool {
    // A check takes a shared lock for a moment; a server holds an exclusive one.
    let attempt = || {
        let exclusive = flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok();
        let shared = !exclusive && flock(lock, FlockOperation::NonBlockingLockShared).is_ok();
        if shared {
            // Unlocking a lock that is held does not fail.
            let _ = flock(lock, FlockOperation::Unlock);
        }
        (exclusive, shared)
    };
    repeat_while(CHECK_LIMIT, CHECK_INTERVAL, attempt, |(_, shared)| *shared).0
}

/// The name of an export, held by this process. Dropping it removes the folder, unless a block device is
/// noted there: the device waits for a server, which needs all the notes.
#[derive(Debug)]
pub struct NameLock {
    pub(super) dir: Arc<TrustedDir>,
    pub(super) name: String,
    /// The notes are kept for another server.
    pub(super) left: bool,
    /// Where the folder came from, and goes in the end, if it was not made for this name.
    pub(super) home: Option<PathBuf>,
    /// Held, not read: the kernel releases it when the process ends, however it ends.
    pub(super) lock: File,
}

impl NameLock {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lock, which every process with this descriptor holds.
    #[must_use]
    pub fn lock(&self) -> &File {
        &self.lock
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// The block device that an earlier server of this name left, if it is noted.
    #[must_use]
    pub fn left_device(&self) -> Option<DeviceNote> {
        DeviceNote::parse(&self.dir.read(UBLK_ID).ok()?)
    }

    /// Notes the block device, so that it can be found after a crash.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn note_device(&self, note: &DeviceNote) -> Result<()> {
        self.note(UBLK_ID, &note.text())
    }

    /// Notes what is served, for `ublkup recover`.
    ///
    /// # Errors
    ///
    /// When the folder cannot be written.
    pub fn note_served(&self, text: &str) -> Result<()> {
        self.note(SERVED, text)
    }

    /// Writes a note beside the old one and puts it in its place.
    fn note(&self, name: &'static str, text: &str) -> Result<()> {
        self.file(name).replace(text, || {
            crash::point(match name {
                SERVED => "export-written",
                _ => "id-written",
            });
        })?;
        Ok(())
    }

    /// A note of this export.
    fn file(&self, name: &'static str) -> NoteFile {
        NoteFile::new(Arc::clone(&self.dir), name)
    }

    /// Releases the name and keeps the notes for the next server.
    pub fn leave(mut self) {
        self.left = true;
    }

    /// Keeps what an earlier server has noted until this one [serves](Self::serves), whatever fails before.
    pub(super) fn keep_notes(mut self) -> Self {
        self.left = self.was_served() || self.was_upgraded();
        self
    }

    /// From now on the notes are this server's own.
    pub(super) fn serves(&mut self) {
        self.left = false;
    }

    /// Whether it is noted that a vhost client has the disk, or had it.
    #[must_use]
    pub fn was_upgraded(&self) -> bool {
        statat(&self.dir, UPGRADED, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Whether an earlier server of this name noted what it served.
    #[must_use]
    pub fn was_served(&self) -> bool {
        statat(&self.dir, SERVED, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The note of which vhost client has the disk.
    #[must_use]
    pub fn upgraded_note(&self) -> NoteFile {
        self.file(UPGRADED)
    }

    /// The note of the name under which the storage is locked, where it has such names.
    #[must_use]
    pub fn locked_by_note(&self) -> NoteFile {
        self.file(LOCKED_BY)
    }

    /// The note of what is served.
    pub(super) fn served_note(&self) -> NoteFile {
        self.file(SERVED)
    }

    /// Removes the note of which vhost client had the disk, whose contents are lost.
    pub(super) fn forget_client(&self) {
        self.remove(UPGRADED);
    }

    /// Removes the note of the block device, which is gone, and the record of its mark.
    pub fn forget_device(&self) {
        self.remove(UBLK_ID);
        self.forget_record(DEVICES);
    }

    /// Removes the sockets of a dead server, and notes that it had not finished. What else there is stays: the
    /// notes, and what no server has put there.
    pub(super) fn clear_stale(&self) -> Result<()> {
        let unfinished = NOTES.map(unfinished);
        // The service manager may listen there.
        let is_stale = |name: &&str| *name != VHOST_SOCKET || !is_listened_on(&self.dir, name);
        for name in [CONTROL, VHOST_SOCKET]
            .into_iter()
            .chain(unfinished.iter().map(String::as_str))
            .filter(is_stale)
        {
            unlink(&self.dir, name).with_context(|| {
                format!(
                    "cannot remove {}, which is in the way of '{}'",
                    self.folder().join(name).display(),
                    self.name
                )
            })?;
        }
        Ok(())
    }

    /// Moves a folder that has nothing but the lock to where it came from.
    fn go_home(&self) -> bool {
        let Some(home) = &self.home else { return false };
        let only_locked = self.dir.names().is_ok_and(|entries| entries == [LOCK]);
        let here = format!("../{}", self.name);
        let mut moved = Ok(());
        if only_locked {
            moved = renameat_with(&self.dir, here, CWD, home, RenameFlags::NOREPLACE);
        }
        if let Err(error) = moved {
            // Before Linux 5.19 a confined server moves no folders.
            tracing::debug!(home = %home.display(), %error, "a folder is not used again");
        }
        only_locked && moved.is_ok()
    }

    /// Removes a record of the server or the export.
    fn forget_record(&self, kind: &str) {
        // Relative to the folder, without a descriptor of that one for each export. It need not exist.
        let record = format!("../../{RECORDS}/{kind}-{}", self.name);
        let _ = unlinkat(&self.dir, record, AtFlags::empty());
    }

    /// Removes a file of the folder, if it is there.
    fn remove(&self, name: &str) {
        if let Err(error) = unlink(&self.dir, name) {
            let path = self.folder().join(name);
            tracing::warn!(path = %path.display(), %error, "cannot remove");
        }
    }
}

/// Whether a program listens on a socket. A datagram socket asks, which that program does not notice.
fn is_listened_on(dir: &TrustedDir, name: &str) -> bool {
    let path = format!("/proc/self/fd/{}/{name}", dir.as_fd().as_raw_fd());
    let asked = SocketAddrUnix::new(path).and_then(|address| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        connect(&socket, &address)
    });
    asked == Err(Errno::PROTOTYPE)
}

impl Drop for NameLock {
    fn drop(&mut self) {
        if self.left {
            return;
        }
        let notes: &[&str] = match self.left_device() {
            Some(_) => &[],
            None => &[SERVED, UPGRADED, LOCKED_BY],
        };
        let unfinished = NOTES.map(unfinished);
        let unfinished = unfinished.each_ref().map(String::as_str);
        // The vhost door has removed its socket, or it is the service manager's.
        for file in [&[CONTROL][..], &unfinished, notes].concat() {
            self.remove(file);
        }
        let kind = self.folder().parent().and_then(Path::file_name);
        let kind = kind.map(OsStr::to_string_lossy).unwrap_or_default();
        if self.left_device().is_none() {
            self.forget_record(&kind);
            if kind == EXPORTS {
                self.forget_record(DEVICES);
            }
        }
        let is_home = self.go_home();
        // The lock last: after it another server may use the folder.
        self.remove(LOCK);
        if is_home {
            return;
        }
        // Not empty when there are notes left: then the folder stays.
        // By its parent, without a descriptor of that one for each export.
        let _ = unlinkat(&self.dir, format!("../{}", self.name), AtFlags::REMOVEDIR);
    }
}

/// Removes the names of character devices that commands have left with a server, when they were killed.
pub(super) fn remove_links(server: &TrustedDir) {
    let names = server.names().unwrap_or_default();
    for name in names.iter().filter(|name| name.starts_with("ublkc")) {
        // What stays is in the way of its folder's removal, and is tried again then.
        let _ = unlink(server, name);
    }
}

/// Removes the spare folders of a server, which has ended, or is about to.
pub(super) fn remove_spares(server: &TrustedDir) {
    let Ok(all) = server.dir(SPARE) else { return };
    for name in all.names().unwrap_or_default() {
        // What cannot be removed stays in the way of the next step, and of the last one.
        if let Ok(spare) = all.dir(&name) {
            for file in spare.names().unwrap_or_default() {
                let _ = unlink(&spare, &file);
            }
        }
        let _ = unlinkat(&all, &name, AtFlags::REMOVEDIR);
    }
    if let Err(error) = unlinkat(server, SPARE, AtFlags::REMOVEDIR) {
        tracing::debug!(folder = %all.path().display(), %error, "cannot remove");
    }
}

/// A mark that no other device has. Not zero, which devices of other servers have.
pub(super) fn new_mark() -> u64 {
    RandomState::new().build_hasher().finish().max(1)
}

/// What is noted about a block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceNote {
    /// Its number; unknown before it was added.
    pub id: Option<u32>,
    /// The mark in the device's parameters, which identifies it if it is recorded, too
    /// ([`RuntimeDir::device_marks`](super::runtime_dir::RuntimeDir::device_marks)).
    pub mark: Option<u64>,
    /// The storage behind it ([`StorageControl::identity`](crate::engine::StorageControl::identity)), if it has
    /// an identity.
    pub storage: Option<String>,
}

impl DeviceNote {
    pub(super) fn parse(text: &str) -> Option<Self> {
        // The identity is all that is left of the line.
        let mut words = text.trim_end().splitn(3, ' ');
        let mut next = || words.next()?.parse::<u64>().ok();
        let note = Self {
            id: next().and_then(|id| u32::try_from(id).ok()),
            // Devices of other servers have zero there.
            mark: next().filter(|mark| *mark != 0),
            storage: words.next().map(str::to_owned),
        };
        (note.id.is_some() || note.mark.is_some()).then_some(note)
    }

    fn text(&self) -> String {
        let word = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        let id = self.id.map(u64::from);
        let mut words = [id, self.mark].map(word).to_vec();
        words.extend(self.storage.clone());
        words.join(" ") + "\n"
    }
}
