//! The registry: how a client finds a service on a kernel without fd addresses.
//!
//! ```text
//! <runtime directory>/fd-upgrade/<object>/<name>     a listening socket, mode 0600
//! ```
//!
//! Every component is opened relative to the one before, without following symlinks, and checked by descriptor. A socket
//! is bound and connected through `/proc/self/fd`, so that the file that was checked is the one that is used.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, Stat, flock, fstat, mkdirat, openat,
    statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::{self, SocketAddrUnix, SocketType};
use rustix::process::geteuid;

use crate::address::Name;
use crate::error::OrCannot;
use crate::object::Key;
use crate::{Error, socket};

/// The system's runtime directory, where root's servers publish.
pub const SYSTEM_RUNTIME_DIR: &str = "/run/ublkup";

/// The registry's folder inside a runtime directory.
const FOLDER: &str = "fd-upgrade";

/// How long a server waits for the lock of the registry.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// The caller's own runtime directory: the system's for root, else below `XDG_RUNTIME_DIR`.
pub fn own_runtime_dir() -> Option<PathBuf> {
    if geteuid().is_root() {
        return Some(PathBuf::from(SYSTEM_RUNTIME_DIR));
    }
    let dir = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?);
    dir.is_absolute().then(|| dir.join("ublkup"))
}

/// Where a client looks: the system's directory, then its own.
pub fn client_runtime_dirs() -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::from(SYSTEM_RUNTIME_DIR)];
    dirs.extend(own_runtime_dir().filter(|own| own != Path::new(SYSTEM_RUNTIME_DIR)));
    dirs
}

/// Where the service's socket is, or would be.
pub(crate) fn entry_path(runtime_dir: &Path, key: &Key, name: &Name) -> PathBuf {
    let folder = runtime_dir.join(FOLDER).join(key.folder());
    folder.join(name.as_str())
}

/// Checks a file of the registry: of the right kind, owned by this user or root, and writable by its owner only.
fn check(stat: &Stat, kind: FileType, path: &Path) -> Result<(), Error> {
    let refuse = |why: String| {
        Err(Error::Untrusted {
            path: path.display().to_string(),
            why,
        })
    };
    let is = FileType::from_raw_mode(stat.st_mode);
    if is != kind {
        return refuse(match is {
            FileType::Symlink => "it is a symbolic link".to_owned(),
            _ => format!(
                "it is not a {}",
                if kind == FileType::Socket {
                    "socket"
                } else {
                    "directory"
                }
            ),
        });
    }
    if stat.st_uid != 0 && stat.st_uid != geteuid().as_raw() {
        return refuse(format!(
            "it belongs to user {}, which is neither root nor this user",
            stat.st_uid
        ));
    }
    if stat.st_mode & 0o022 != 0 {
        return refuse("its group or others may write to it".to_owned());
    }
    Ok(())
}

/// Opens `name` below `at` as a trusted directory; `path` is for messages.
fn open_dir(at: impl AsFd, name: &OsStr, path: &Path, access: OFlags) -> Result<OwnedFd, Error> {
    let at = at.as_fd();
    let flags = access | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = openat(at, name, flags, Mode::empty());
    let dir =
        opened.map_err(
            |errno| match (errno, statat(at, name, AtFlags::SYMLINK_NOFOLLOW)) {
                // Not a directory: the error says what it is.
                (Errno::LOOP | Errno::NOTDIR, Ok(stat)) => {
                    match check(&stat, FileType::Directory, path) {
                        Err(error) => error,
                        Ok(()) => Error::system("open", path.display(), errno),
                    }
                }
                _ => Error::system("open", path.display(), errno),
            },
        )?;
    let stat = fstat(&dir).or_cannot("examine", path.display())?;
    check(&stat, FileType::Directory, path)?;
    Ok(dir)
}

/// [`open_dir`] for a server: the directory is made if it is missing.
fn make_dir(at: impl AsFd, name: &OsStr, path: &Path, mode: u32) -> Result<OwnedFd, Error> {
    match mkdirat(&at, name, mode.into()) {
        Ok(()) | Err(Errno::EXIST) => open_dir(at, name, path, OFlags::RDONLY),
        Err(errno) => Err(Error::system("create", path.display(), errno)),
    }
}

/// A socket in the registry that passed the checks of a client.
#[derive(Debug)]
pub(crate) struct Entry {
    /// O_PATH descriptor of the socket's inode.
    socket: OwnedFd,
}

impl Entry {
    /// Looks for the service; `None` if there is no entry, an error if there is one that breaks a rule.
    pub(crate) fn find(runtime_dir: &Path, key: &Key, name: &Name) -> Result<Option<Self>, Error> {
        match Self::open(runtime_dir, key, name) {
            Ok(entry) => Ok(Some(entry)),
            Err(Error::System {
                errno: Errno::NOENT | Errno::NOTDIR | Errno::ACCESS,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open(runtime_dir: &Path, key: &Key, name: &Name) -> Result<Self, Error> {
        let mut dir = open_dir(CWD, runtime_dir.as_os_str(), runtime_dir, OFlags::PATH)?;
        let mut path = runtime_dir.to_owned();
        for part in [FOLDER, &key.folder()] {
            path.push(part);
            dir = open_dir(dir, part.as_ref(), &path, OFlags::PATH)?;
        }
        path.push(name.as_str());
        let socket = openat(
            &dir,
            name.as_str(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .or_cannot("open", path.display())?;
        let stat = fstat(&socket).or_cannot("examine", path.display())?;
        check(&stat, FileType::Socket, &path)?;
        Ok(Self { socket })
    }

    /// Connects to exactly the socket that was checked.
    pub(crate) fn connect(&self, timeout: Duration) -> Result<OwnedFd, Errno> {
        socket::connect(&socket::proc_path(self.socket.as_fd()), timeout)
    }
}

/// A published service; dropping it takes the entry out again.
#[derive(Debug)]
pub(crate) struct Published {
    socket: OwnedFd,
    root: OwnedFd,
    folder: String,
    name: Name,
    identity: (u64, u64),
    owner_pid: u32,
}

impl Published {
    /// Publishes the service and listens. An entry without a server is replaced; one with a server is
    /// [`Error::InUse`].
    pub(crate) fn publish(
        runtime_dir: &Path,
        key: &Key,
        name: &Name,
        backlog: i32,
    ) -> Result<Self, Error> {
        let path = runtime_dir.join(FOLDER);
        let runtime = make_dir(CWD, runtime_dir.as_os_str(), runtime_dir, 0o755)?;
        // Others may pass, but not open: the lock below is on this directory and theirs would block us.
        let root = make_dir(runtime, FOLDER.as_ref(), &path, 0o711)?;
        let _lock = lock(&root, &path)?;
        for rival in key.rivals() {
            clear_stale(&root, &path, &rival, key, name)?;
        }
        let folder = key.folder();
        let path = path.join(&folder);
        let dir = make_dir(&root, folder.as_ref(), &path, 0o711)?;
        let path = path.join(name.as_str());
        let address = format!("{}/{name}", socket::proc_path(dir.as_fd()));
        let listening = socket::listen(&address, backlog).map_err(|errno| match errno {
            Errno::ADDRINUSE => Error::InUse {
                name: name.to_string(),
                object: key.to_string(),
            },
            errno => Error::system("listen on", path.display(), errno),
        })?;
        let stat = statat(&dir, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .or_cannot("examine", path.display())?;
        let identity = (stat.st_dev, stat.st_ino);
        Ok(Self {
            socket: listening,
            root,
            folder,
            name: name.clone(),
            identity,
            owner_pid: std::process::id(),
        })
    }

    /// The listening socket, non-blocking.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Removes the entry, unless another server has replaced it.
    fn remove(&self) -> Result<(), Error> {
        let path = Path::new(FOLDER).join(&self.folder);
        let _lock = lock(&self.root, &path)?;
        let dir = open_dir(&self.root, self.folder.as_ref(), &path, OFlags::PATH)?;
        let stat = statat(&dir, self.name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .or_cannot("examine", path.display())?;
        if (stat.st_dev, stat.st_ino) == self.identity {
            unlinkat(&dir, self.name.as_str(), AtFlags::empty())
                .or_cannot("remove", path.display())?;
            remove_if_empty(&self.root, &self.folder, &path)?;
        }
        Ok(())
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        // A forked child that drops its copy must not remove its parent's entry. An error leaves a stale entry, which
        // clients ignore and the next server removes.
        if std::process::id() == self.owner_pid {
            let _removed = self.remove();
        }
    }
}

/// The registry's lock; closing it unlocks.
fn lock(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Error> {
    // A new open file description: locks of the same one do not exclude each other.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file = openat(root, ".", flags, Mode::empty()).or_cannot("open", path.display())?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(errno) => return Err(Error::system("lock", path.display(), errno)),
        }
    }
}

/// Under the lock: removes `name` from the folder of `rival` if it has no server.
fn clear_stale(
    root: &OwnedFd,
    path: &Path,
    rival: &Key,
    key: &Key,
    name: &Name,
) -> Result<(), Error> {
    let folder = rival.folder();
    let path = path.join(&folder);
    let dir = match open_dir(root, folder.as_ref(), &path, OFlags::PATH) {
        Err(Error::System {
            errno: Errno::NOENT,
            ..
        }) => return Ok(()),
        other => other?,
    };
    let entry = path.join(name.as_str());
    let stat = match statat(&dir, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.or_cannot("examine", entry.display())?,
    };
    check(&stat, FileType::Socket, &entry)?;
    if is_served(&format!("{}/{name}", socket::proc_path(dir.as_fd())))
        .or_cannot("examine", entry.display())?
    {
        return Err(Error::InUse {
            name: name.to_string(),
            object: key.to_string(),
        });
    }
    unlinkat(&dir, name.as_str(), AtFlags::empty()).or_cannot("remove", entry.display())?;
    remove_if_empty(root, &folder, &path)
}

/// Whether a socket file has a server. Asked by a datagram socket: with a server the answer is EPROTOTYPE, and the server
/// does not see a short connection.
fn is_served(address: &str) -> Result<bool, Errno> {
    let probe = socket::new(SocketType::DGRAM)?;
    match net::connect(&probe, &SocketAddrUnix::new(address)?) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Ok(()) | Err(Errno::PROTOTYPE) => Ok(true),
        Err(errno) => Err(errno),
    }
}

fn remove_if_empty(root: &OwnedFd, folder: &str, path: &Path) -> Result<(), Error> {
    match unlinkat(root, folder, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT | Errno::EXIST) => Ok(()),
        Err(errno) => Err(Error::system("remove", path.display(), errno)),
    }
}
