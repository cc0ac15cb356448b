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
pub(super) const UPGRADED: &str = "upgraded";
const LOCKED_BY: &str = "locked-by";
pub(super) const SERVED: &str = "served";
/// The folder of records in a runtime directory.
pub(super) const RECORDS: &str = "records";
/// The folder of the records of block devices there. No confined server reaches it.
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

    /// The note of the block device that an earlier server of this name left, if there is one. A server that a guest has
    /// taken over may have written anything there.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be read.
    pub fn left_device(&self) -> Result<Option<DeviceNote>, upgrade_proto::Error> {
        let text = self.file(UBLK_ID).read()?;
        Ok(text.map(|text| DeviceNote::parse(&text).unwrap_or_default()))
    }

    /// Whether a block device is noted.
    #[must_use]
    pub fn has_device(&self) -> bool {
        self.has(UBLK_ID)
    }

    fn has(&self, note: &str) -> bool {
        statat(&self.dir, note, AtFlags::SYMLINK_NOFOLLOW).is_ok()
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
        self.has(UPGRADED)
    }

    /// Whether an earlier server of this name noted what it served.
    #[must_use]
    pub fn was_served(&self) -> bool {
        self.has(SERVED)
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

    /// Removes the note of the block device, which is gone, and its record if this process may.
    pub fn forget_device(&self) {
        self.forget_device_note();
        let _ = unlinkat(
            &self.dir,
            format!("../../{DEVICES}/{}", self.name),
            AtFlags::empty(),
        );
    }

    /// Removes the note of a block device. The record may be of another one.
    pub(super) fn forget_device_note(&self) {
        self.remove(UBLK_ID);
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

    /// Removes the record of the server or the export.
    fn forget_record(&self) {
        let kind = self.folder().parent().and_then(Path::file_name);
        let Some(kind) = kind.map(OsStr::to_string_lossy) else {
            return;
        };
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
        let has_device = self.has_device();
        let notes: &[&str] = match has_device {
            true => &[],
            false => &[SERVED, UPGRADED, LOCKED_BY],
        };
        let unfinished = NOTES.map(unfinished);
        let unfinished = unfinished.each_ref().map(String::as_str);
        // The vhost door has removed its socket, or it is the service manager's.
        for file in [&[CONTROL][..], &unfinished, notes].concat() {
            self.remove(file);
        }
        if !has_device {
            self.forget_record();
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
    /// The mark in the device's parameters.
    pub mark: Option<u64>,
    /// The storage behind it ([`StorageControl::identity`](crate::engine::StorageControl::identity)), if it has
    /// an identity.
    pub storage: Option<String>,
}

impl DeviceNote {
    pub(super) fn parse(text: &str) -> Option<Self> {
        // The identity is all that is left of the line. The second word was the sequence number of the disk.
        let mut words = text.trim_end().splitn(4, ' ');
        let mut next = || words.next()?.parse::<u64>().ok();
        let (id, _, mark) = (next(), next(), next());
        let note = Self {
            id: id.and_then(|id| u32::try_from(id).ok()),
            // Devices of other servers have zero there.
            mark: mark.filter(|mark| *mark != 0),
            storage: words.next().map(str::to_owned),
        };
        (note.id.is_some() || note.mark.is_some()).then_some(note)
    }

    fn text(&self) -> String {
        let word = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        let mut words = [self.id.map(u64::from), None, self.mark].map(word).to_vec();
        words.extend(self.storage.clone());
        words.join(" ") + "\n"
    }
}

/// What is recorded of a block device that was made for an export, or is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRecord {
    /// Its mark.
    pub mark: u64,
    /// The storage behind it, if it has an identity that was known when it was recorded.
    pub storage: Option<String>,
}

impl DeviceRecord {
    /// All that a record has, a line for each.
    pub(super) fn parse(text: &str) -> Vec<Self> {
        let line = |line: &str| {
            let (mark, storage) = line.split_once(' ').unwrap_or((line, ""));
            let storage = (!storage.is_empty()).then(|| storage.to_owned());
            Some(Self {
                mark: mark.parse().ok().filter(|mark| *mark != 0)?,
                storage,
            })
        };
        text.lines().filter_map(line).collect()
    }

    pub(super) fn text(all: &[Self]) -> String {
        let line = |one: &Self| format!("{} {}\n", one.mark, one.storage.as_deref().unwrap_or(""));
        all.iter().map(line).collect()
    }
}
