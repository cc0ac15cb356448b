//! The registry: how a client finds a service on a kernel without fd addresses.
//!
//! ```text
//! <runtime directory>/fd-upgrade/<object>/<name>     a listening socket, mode 0600
//! ```
//!
//! Every component is a [`TrustedDir`]. A socket is bound and connected through `/proc/self/fd`, so that the file that was
//! checked is the one that is used.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, OFlags, flock, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{self, SocketAddrUnix, SocketType};
use rustix::process::geteuid;

use crate::address::Name;
use crate::error::OrCannot;
use crate::object::Key;
use crate::trusted::TrustedDir;
use crate::{Error, socket};

/// The system's runtime directory, where root's servers publish.
pub const SYSTEM_RUNTIME_DIR: &str = "/run/ublkup";

/// The registry's folder inside a runtime directory.
const FOLDER: &str = "fd-upgrade";

/// The registry's lock, beside the folders of the objects.
const LOCK: &str = "lock";

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

/// Where the service's socket is, or would be, in a runtime directory.
pub(crate) fn entry_path(key: &Key, name: &Name) -> PathBuf {
    [FOLDER, &key.folder(), name.as_str()].iter().collect()
}

/// A socket in the registry that passed the checks of a client.
#[derive(Debug)]
pub(crate) struct Entry {
    /// O_PATH descriptor of the socket's inode.
    socket: OwnedFd,
}

impl Entry {
    /// Looks for the service; `None` if there is no entry, an error if there is one that breaks a rule, or if the path
    /// cannot be followed.
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
        let registry = TrustedDir::open(runtime_dir)?.dir(FOLDER)?;
        let socket = registry.dir(&key.folder())?.socket(name.as_str())?;
        Ok(Self { socket })
    }

    /// Connects to exactly the socket that was checked.
    pub(crate) fn connect(&self, timeout: Duration) -> Result<OwnedFd, Errno> {
        socket::connect(socket::proc_path(self.socket.as_fd()), timeout)
    }
}

/// Publishes a service for another process, which is to listen on the socket: see [`Listener::with_entry`]. The entry stays
/// when this process ends, and is [stale](stale_entries) when the other one has.
///
/// # Errors
///
/// [`Error::InUse`] if another server has an entry; when the registry is not trusted, or cannot be written.
///
/// [`Listener::with_entry`]: crate::Listener::with_entry
pub fn publish(runtime_dir: &Path, key: &Key, name: &Name, backlog: i32) -> Result<OwnedFd, Error> {
    let mut published = Published::publish(runtime_dir, key, name, backlog)?;
    let socket = (published.socket.try_clone()).map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        Error::system("copy", "a descriptor", errno)
    })?;
    published.is_ours = false;
    Ok(socket)
}

/// A published service; dropping it takes the entry out again.
#[derive(Debug)]
pub(crate) struct Published {
    socket: OwnedFd,
    root: TrustedDir,
    /// Open, so that a server that can open nothing any more can still remove its entry.
    lock: Lock,
    folder: String,
    name: Name,
    identity: (u64, u64),
    owner_pid: u32,
    is_ours: bool,
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
        // Others may pass, but not list.
        let root = TrustedDir::make(runtime_dir, 0o755)?.make_dir(FOLDER, 0o711)?;
        let lock = Lock::open(&root)?;
        let held = lock.hold(&root)?;
        for rival in key.rivals() {
            clear_stale(&root, &rival, key, name)?;
        }
        let folder = key.folder();
        let dir = root.make_dir(&folder, 0o711)?;
        let path = dir.path().join(name.as_str());
        let address = format!("{}/{name}", socket::proc_path(dir.as_fd()));
        let listening = socket::listen(&address, backlog).map_err(|errno| match errno {
            Errno::ADDRINUSE => Error::InUse {
                name: name.to_string(),
                object: key.to_string(),
            },
            Errno::NOENT if !socket::has_proc() => Error::NoProc,
            errno => Error::system("listen on", path.display(), errno),
        })?;
        let stat = statat(&dir, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .or_cannot("examine", path.display())?;
        let identity = (stat.st_dev, stat.st_ino);
        drop(held);
        Ok(Self {
            socket: listening,
            root,
            lock,
            folder,
            name: name.clone(),
            identity,
            owner_pid: std::process::id(),
            is_ours: true,
        })
    }

    /// The listening socket, non-blocking.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Removes the entry, unless another server has replaced it.
    fn remove(&self) -> Result<(), Error> {
        let _held = self.lock.hold(&self.root)?;
        let dir = self.root.dir(&self.folder)?;
        let stat = statat(&dir, self.name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .or_cannot("examine", dir.path().display())?;
        if (stat.st_dev, stat.st_ino) == self.identity {
            unlink(&dir, self.name.as_str())?;
            remove_if_empty(&self.root, &self.folder)?;
        }
        Ok(())
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        // A forked child that drops its copy must not remove its parent's entry. An error leaves a stale entry, which
        // clients ignore and the next server removes.
        if self.is_ours && std::process::id() == self.owner_pid {
            let _removed = self.remove();
        }
    }
}

/// The registry's lock, open. It is a file that other users cannot open: the directory, which a program may have made
/// with another mode, could be locked by every user who may read it.
#[derive(Debug)]
struct Lock(File);

impl Lock {
    fn open(root: &TrustedDir) -> Result<Self, Error> {
        root.file(LOCK, OFlags::RDWR | OFlags::CREATE).map(Self)
    }

    /// Locks the registry until the result is dropped.
    fn hold(&self, root: &TrustedDir) -> Result<Held<'_>, Error> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match flock(&self.0, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Held(&self.0)),
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(errno) => {
                    let path = root.path().join(LOCK);
                    return Err(Error::system("lock", path.display(), errno));
                }
            }
        }
    }
}

/// The registry is locked.
struct Held<'a>(&'a File);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // It cannot fail on a lock that is held.
        let _ = flock(self.0, FlockOperation::Unlock);
    }
}

/// Under the lock: removes `name` from the folder of `rival` if it has no server.
fn clear_stale(root: &TrustedDir, rival: &Key, key: &Key, name: &Name) -> Result<(), Error> {
    let folder = rival.folder();
    let dir = match root.dir(&folder) {
        Err(error) if error.errno() == Errno::NOENT => return Ok(()),
        other => other?,
    };
    match is_stale(&dir, name.as_str())? {
        None => Ok(()),
        Some(false) => Err(Error::InUse {
            name: name.to_string(),
            object: key.to_string(),
        }),
        Some(true) => {
            unlink(&dir, name.as_str())?;
            remove_if_empty(root, &folder)
        }
    }
}

/// The entries in the registry of `runtime_dir` whose servers are gone: killed, so that they could not remove them.
///
/// # Errors
///
/// When the registry is another user's, or cannot be read.
pub fn stale_entries(runtime_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    find_stale(runtime_dir, |_, _| Ok(()))
}

/// Removes the [`stale_entries`], and returns them.
///
/// # Errors
///
/// As for [`stale_entries`], and when one cannot be removed.
pub fn remove_stale_entries(runtime_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    find_stale(runtime_dir, unlink)
}

fn find_stale(
    runtime_dir: &Path,
    found: impl Fn(&TrustedDir, &str) -> Result<(), Error>,
) -> Result<Vec<PathBuf>, Error> {
    let root = match TrustedDir::open(runtime_dir).and_then(|dir| dir.dir(FOLDER)) {
        Err(error) if error.errno() == Errno::NOENT => return Ok(Vec::new()),
        other => other?,
    };
    // A server that publishes holds it from the making of an entry until it listens.
    let lock = Lock::open(&root)?;
    let _held = lock.hold(&root)?;
    let mut stale = Vec::new();
    for folder in root.names()?.into_iter().filter(|name| name != LOCK) {
        let dir = root.dir(&folder)?;
        for name in dir.names()? {
            if is_stale(&dir, &name)? == Some(true) {
                found(&dir, &name)?;
                stale.push(dir.path().join(name));
            }
        }
        remove_if_empty(&root, &folder)?;
    }
    Ok(stale)
}

/// Whether an entry has no server; `None` if there is no entry.
fn is_stale(dir: &TrustedDir, name: &str) -> Result<Option<bool>, Error> {
    match dir.socket(name) {
        Err(error) if error.errno() == Errno::NOENT => Ok(None),
        other => {
            let served = is_served(&socket::proc_path(other?.as_fd()));
            let served = served.or_cannot("examine", dir.path().join(name).display())?;
            Ok(Some(!served))
        }
    }
}

/// Whether a socket file has a server. Asked by a datagram socket: with a server the answer is EPROTOTYPE, and the server
/// does not see a short connection.
fn is_served(address: &str) -> Result<bool, Errno> {
    let probe = socket::new(SocketType::DGRAM)?;
    match net::connect(&probe, &SocketAddrUnix::new(address)?) {
        Err(Errno::CONNREFUSED) => Ok(false),
        Ok(()) | Err(Errno::PROTOTYPE) => Ok(true),
        Err(errno) => Err(errno),
    }
}

fn unlink(dir: &TrustedDir, name: &str) -> Result<(), Error> {
    unlinkat(dir, name, AtFlags::empty()).or_cannot("remove", dir.path().join(name).display())
}

fn remove_if_empty(root: &TrustedDir, folder: &str) -> Result<(), Error> {
    match unlinkat(root, folder, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT | Errno::EXIST) => Ok(()),
        Err(errno) => Err(Error::system(
            "remove",
            root.path().join(folder).display(),
            errno,
        )),
    }
}
