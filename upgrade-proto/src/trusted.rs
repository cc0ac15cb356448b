//! Directories and files below them that no other user can exchange: the rules for everything under a runtime directory.
//!
//! Each component is opened relative to the one before, without following a link, and checked by descriptor: it belongs
//! to this user or root, and only its owner may write to it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, lstat, mkdirat, openat, statat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::Error;
use crate::error::OrCannot;

/// More than any note in a runtime directory has.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// A directory that passed the checks, held by descriptor (`O_PATH`).
#[derive(Debug)]
pub struct TrustedDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl TrustedDir {
    /// Opens the directory at `path`, which itself may not be a link. What lies above it is not checked: see
    /// [`Connection::lasting_path`](crate::Connection::lasting_path).
    ///
    /// # Errors
    ///
    /// [`Error::Untrusted`], with the rule that it breaks; [`Error::System`] when it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_at(CWD, path.as_os_str(), path.to_owned())
    }

    /// [`TrustedDir::open`] of a directory that is made if it is missing, with `mode`.
    ///
    /// # Errors
    ///
    /// As for `open`, and when it cannot be made.
    pub fn make(path: &Path, mode: u32) -> Result<Self, Error> {
        Self::make_at(CWD, path.as_os_str(), path.to_owned(), mode)
    }

    /// The directory `name` in this one.
    ///
    /// # Errors
    ///
    /// As for [`TrustedDir::open`].
    pub fn dir(&self, name: &str) -> Result<Self, Error> {
        Self::open_at(self.as_fd(), name.as_ref(), self.path.join(name))
    }

    /// [`TrustedDir::dir`] that is made if it is missing, with `mode`.
    ///
    /// # Errors
    ///
    /// As for [`TrustedDir::make`].
    pub fn make_dir(&self, name: &str, mode: u32) -> Result<Self, Error> {
        Self::make_at(self.as_fd(), name.as_ref(), self.path.join(name), mode)
    }

    /// Opens a regular file in this directory with `flags`; one that is made gets mode 0600. Does not wait for the
    /// writer of a FIFO that lies there.
    ///
    /// # Errors
    ///
    /// As for [`TrustedDir::open`].
    pub fn file(&self, name: &str, flags: OFlags) -> Result<File, Error> {
        let path = self.path.join(name);
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let file = opened.map_err(|errno| {
            why_not(
                self.as_fd(),
                name.as_ref(),
                FileType::RegularFile,
                &path,
                errno,
            )
        })?;
        let stat = fstat(&file).or_cannot("examine", path.display())?;
        check(&stat, FileType::RegularFile, &path)?;
        Ok(file.into())
    }

    /// The text of a file in this directory.
    ///
    /// # Errors
    ///
    /// As for [`TrustedDir::open`], and when it is no text, or longer than a note can be.
    pub fn read(&self, name: &str) -> Result<String, Error> {
        let mut text = String::new();
        let path = self.path.join(name);
        let read = self
            .file(name, OFlags::RDONLY)?
            .take(MAX_NOTE_BYTES)
            .read_to_string(&mut text);
        let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::ILSEQ);
        read.map_err(errno).or_cannot("read", path.display())?;
        Ok(text)
    }

    /// A socket in this directory, as an `O_PATH` descriptor.
    ///
    /// # Errors
    ///
    /// As for [`TrustedDir::open`].
    pub fn socket(&self, name: &str) -> Result<OwnedFd, Error> {
        let path = self.path.join(name);
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket =
            openat(&self.fd, name, flags, Mode::empty()).or_cannot("open", path.display())?;
        let stat = fstat(&socket).or_cannot("examine", path.display())?;
        check(&stat, FileType::Socket, &path)?;
        Ok(socket)
    }

    /// The names in this directory, sorted. Those that are not UTF-8 are left out: no program of ours makes them.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let read = || -> Result<Vec<String>, Errno> {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let mut names = Vec::new();
            for entry in Dir::new(openat(&self.fd, ".", flags, Mode::empty())?)? {
                if let Ok(name) = entry?.file_name().to_str()
                    && !matches!(name, "." | "..")
                {
                    names.push(name.to_owned());
                }
            }
            names.sort();
            Ok(names)
        };
        read().or_cannot("read", self.path.display())
    }

    /// The path under which it was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open_at(at: BorrowedFd<'_>, name: &OsStr, path: PathBuf) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(at, name, flags, Mode::empty())
            .map_err(|errno| why_not(at, name, FileType::Directory, &path, errno))?;
        let stat = fstat(&fd).or_cannot("examine", path.display())?;
        check(&stat, FileType::Directory, &path)?;
        Ok(Self { fd, path })
    }

    fn make_at(at: BorrowedFd<'_>, name: &OsStr, path: PathBuf, mode: u32) -> Result<Self, Error> {
        match mkdirat(at, name, mode.into()) {
            Ok(()) | Err(Errno::EXIST) => Self::open_at(at, name, path),
            Err(errno) => Err(Error::system("create", path.display(), errno)),
        }
    }
}

impl AsFd for TrustedDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Why something of another kind did not open.
fn why_not(at: BorrowedFd<'_>, name: &OsStr, kind: FileType, path: &Path, errno: Errno) -> Error {
    match (errno, statat(at, name, AtFlags::SYMLINK_NOFOLLOW)) {
        (Errno::LOOP | Errno::NOTDIR | Errno::ISDIR | Errno::NXIO, Ok(stat)) => {
            match check(&stat, kind, path) {
                Err(error) => error,
                Ok(()) => Error::system("open", path.display(), errno),
            }
        }
        _ => Error::system("open", path.display(), errno),
    }
}

/// Checks a file: of the right kind, owned by this user or root, and writable by its owner only.
fn check(stat: &Stat, kind: FileType, path: &Path) -> Result<(), Error> {
    let is = FileType::from_raw_mode(stat.st_mode);
    if is != kind {
        let why = match (is, kind) {
            (FileType::Symlink, _) => "it is a symbolic link",
            (_, FileType::Socket) => "it is not a socket",
            (_, FileType::Directory) => "it is not a directory",
            _ => "it is not a regular file",
        };
        return Err(untrusted(path, why));
    }
    check_owner(stat, path)?;
    match stat.st_mode & 0o022 {
        0 => Ok(()),
        _ => Err(untrusted(path, "its group or others may write to it")),
    }
}

fn check_owner(stat: &Stat, path: &Path) -> Result<(), Error> {
    match stat.st_uid {
        0 => Ok(()),
        uid if uid == geteuid().as_raw() => Ok(()),
        uid => Err(untrusted(
            path,
            format!("it belongs to user {uid}, which is neither root nor this user"),
        )),
    }
}

fn untrusted(path: &Path, why: impl Into<String>) -> Error {
    Error::Untrusted {
        path: path.display().to_string(),
        why: why.into(),
    }
}

/// The path of `dir` without links, for a program that resolves it later, and again: no other user can lead it elsewhere,
/// as every directory on the way belongs to root or this user, and where others may write (`/tmp`) they may not rename what
/// is not theirs.
///
/// # Errors
///
/// [`Error::Untrusted`], with the directory that breaks the rule.
pub(crate) fn lasting_path(dir: &Path) -> Result<PathBuf, Error> {
    let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let path = dir
        .canonicalize()
        .map_err(errno)
        .or_cannot("find", dir.display())?;
    // From the top: what was checked before keeps what is checked next in its place.
    let mut above: Vec<_> = path.ancestors().collect();
    above.reverse();
    for dir in above {
        let stat = lstat(dir).or_cannot("examine", dir.display())?;
        check_owner(&stat, dir)?;
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let is_sticky = stat.st_mode & Mode::SVTX.bits() != 0;
        if !is_dir || stat.st_mode & 0o022 != 0 && !is_sticky {
            return Err(untrusted(dir, "others may exchange what is in it"));
        }
    }
    Ok(path)
}

#[cfg(test)]
#[path = "trusted_tests.rs"]
mod tests;
