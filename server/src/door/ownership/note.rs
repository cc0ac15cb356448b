//! What is noted in the export's folder about the client that has the disk, for a server that comes after a
//! crash; and what else ownership needs of the machine.

use std::fmt;
use std::fs;
use std::io;
use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::identity::Identity;
use crate::engine::durable::NoteFile;
use crate::engine::event_loop::EventLoop;
use crate::engine::process::Process;

/// Clients that gave the disk away and are remembered; the sources of migrations end soon after.
const MAX_SUCCEEDED: usize = 16;

/// Who has the disk, and which clients must not have it again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The client that has the disk, or for which it is kept.
    pub(super) holder: Option<Holder>,
    /// Clients that another one succeeded in a migration, in that order. Their guests run elsewhere, but QEMU
    /// starts its vrings whenever it reconnects, even then.
    pub(super) succeeded: Vec<Identity>,
}

impl Note {
    pub(super) fn add_succeeded(&mut self, identity: Identity) {
        if identity.is_unknown() {
            return;
        }
        if self.succeeded.len() == MAX_SUCCEEDED {
            self.succeeded.remove(0);
        }
        self.succeeded.push(identity);
    }

    pub(super) fn is_succeeded(&self, identity: &Identity) -> bool {
        self.succeeded.iter().any(|old| old.shares(identity))
    }
}

/// A client that has the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Holder {
    /// Its name, for messages.
    pub(super) name: String,
    pub(super) identity: Identity,
    /// It has stopped for a migration, and another client may take over from it.
    pub(super) moving: bool,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.identity.by())
    }
}

/// What ownership needs of the machine. Tests have one of their own.
pub(super) trait Machine: Send + Sync {
    /// What an earlier server noted.
    fn read_note(&self) -> Note;

    /// Replaces the note. When this returns it is durable; if it fails the old one may be there, or the new one.
    fn write_note(&self, note: &Note) -> io::Result<()>;

    /// Calls `callback` after `delay`, unless what is returned is dropped before.
    fn call_after(
        &self,
        delay: Duration,
        callback: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Send>>;

    /// Whether a process is there that could come back.
    fn is_running(&self, process: Process) -> bool;
}

/// The note of which client has the disk.
#[derive(Debug)]
pub struct ClientNote {
    file: NoteFile,
    /// Which storage it is, as far as one can be told from another.
    storage: Option<String>,
}

impl ClientNote {
    /// The note in this file.
    #[must_use]
    pub fn new(file: NoteFile, storage: Option<String>) -> Self {
        Self { file, storage }
    }

    /// The storage of which a client of an earlier server has the disk, if that is known.
    #[must_use]
    pub fn noted_storage(&self) -> Option<String> {
        let text = self.file.read().ok().flatten()?;
        let noted = Noted::of_this_boot(&text).ok().flatten()?;
        noted.note.holder.and(noted.storage)
    }
}

/// This machine, and the note; without one nothing is noted.
pub(super) struct Folder(pub(super) Option<ClientNote>);

/// The file: inodes and processes are known only until the machine restarts.
#[derive(Serialize, Deserialize)]
struct Noted {
    boot: String,
    storage: Option<String>,
    #[serde(flatten)]
    note: Note,
}

impl Noted {
    /// What a file says, if it is of this boot.
    fn of_this_boot(text: &str) -> serde_json::Result<Option<Self>> {
        let noted: Self = serde_json::from_str(text)?;
        Ok(Some(noted).filter(|noted| boot().is_ok_and(|boot| boot == noted.boot)))
    }
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

impl Machine for Folder {
    fn read_note(&self) -> Note {
        let Some(ClientNote { file, .. }) = &self.0 else {
            return Note::default();
        };
        match file.read() {
            Ok(None) => Note::default(),
            Err(error) => {
                tracing::warn!("which client has the disk cannot be known: {error}");
                unknown()
            }
            Ok(Some(text)) => match Noted::of_this_boot(&text) {
                Ok(noted) => noted.map_or_else(Note::default, |noted| noted.note),
                // Of a server of another version.
                Err(_) => unknown(),
            },
        }
    }

    fn write_note(&self, note: &Note) -> io::Result<()> {
        let Some(ClientNote { file, storage }) = &self.0 else {
            return Ok(());
        };
        if *note == Note::default() {
            return file.remove();
        }
        let noted = Noted {
            boot: boot()?,
            storage: storage.clone(),
            note: note.clone(),
        };
        file.replace(&serde_json::to_string(&noted)?, || {})
    }

    fn call_after(
        &self,
        delay: Duration,
        callback: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Send>> {
        let alarm = EventLoop::get()?.call_after(delay, move || {
            // On a thread of its own: the storage may be flushed, and no other export is to wait for that.
            let (sender, receiver) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
            let thread = std::thread::Builder::new().name("grace".into());
            let spawned = thread.spawn(move || receiver.recv().map(|callback| callback()));
            match spawned {
                // A thread that was started receives it.
                Ok(_) => drop(sender.send(callback)),
                Err(_) => callback(),
            }
        });
        Ok(Box::new(alarm))
    }

    fn is_running(&self, process: Process) -> bool {
        process.is_running()
    }
}

/// A client has the disk, and nothing is known of it.
fn unknown() -> Note {
    Note {
        holder: Some(Holder {
            name: "a client".into(),
            identity: Identity::default(),
            moving: false,
        }),
        succeeded: Vec::new(),
    }
}
