//! Small files that are the old one or the new one, whenever the process dies.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;
use upgrade_proto::TrustedDir;

/// The name under which a new file is written, beside the old one.
#[must_use]
pub fn unfinished(name: &str) -> String {
    format!(".{name}.new")
}

/// A note in a directory to which no other user can write.
#[derive(Debug)]
pub struct NoteFile {
    dir: Arc<TrustedDir>,
    name: String,
}

impl NoteFile {
    /// The note `name` in `dir`, whether it exists or not.
    #[must_use]
    pub fn new(dir: Arc<TrustedDir>, name: impl Into<String>) -> Self {
        let name = name.into();
        Self { dir, name }
    }

    /// Its text, if it exists.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or is another user's.
    pub fn read(&self) -> Result<Option<String>, upgrade_proto::Error> {
        match self.dir.read(&self.name) {
            Err(error) if error.errno() == Errno::NOENT => Ok(None),
            other => other.map(Some),
        }
    }

    /// Writes a note beside the old one, calls `written`, and puts it in the place of the old one. When this
    /// returns it is durable.
    ///
    /// # Errors
    ///
    /// When the directory cannot be written: the old note is there as before. If only the replacement cannot be
    /// made durable, the new one is there.
    pub fn replace(&self, text: &str, written: impl FnOnce()) -> io::Result<()> {
        // While nothing has changed: there may be no descriptor left.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = File::from(openat(&self.dir, ".", flags, Mode::empty())?);
        let new = unfinished(&self.name);
        let replaced = self.write(&new, text).and_then(|()| {
            written();
            Ok(renameat(&self.dir, &new, &self.dir, &self.name)?)
        });
        if replaced.is_err() {
            // It would keep the directory from being removed. The first error says more than one of this.
            let _ = unlink(&self.dir, &new);
        }
        replaced?;
        dir.sync_all()
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        // Never through a link, and never into a file of others.
        unlink(&self.dir, name)?;
        let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let mut file = (self.dir.file(name, create)).map_err(io::Error::other)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    }

    /// Removes it, if it exists.
    ///
    /// # Errors
    ///
    /// When that cannot be done.
    pub fn remove(&self) -> io::Result<()> {
        unlink(&self.dir, &self.name)
    }
}

/// Removes a file, if it exists.
///
/// # Errors
///
/// When that cannot be done.
pub fn unlink(dir: &TrustedDir, name: &str) -> io::Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
