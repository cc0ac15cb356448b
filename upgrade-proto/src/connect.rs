//! The client's side.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Stat, fstat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::Error;
use crate::address::{FdAddress, Name};
use crate::error::{NoService, OrCannot};
use crate::object::{self, Key};
use crate::registry::{self, Entry};
use crate::socket::{self, Peer};
use crate::trusted;

/// How a client finds a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// By the fd address: the kernel knows the service.
    Kernel,
    /// By an entry in the registry.
    Registry,
}

impl Route {
    /// `kernel` or `registry`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Registry => "registry",
        }
    }
}

/// A connected stream socket, blocking and close-on-exec.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    route: Route,
    peer: Peer,
    /// By the registry's route: the runtime directory, and the socket's path in it.
    entry: Option<(PathBuf, PathBuf)>,
}

impl Connection {
    /// Of a socket; `whom` is what its other end is, for a message.
    pub(crate) fn new(stream: OwnedFd, route: Route, whom: &str) -> Result<Self, Error> {
        Ok(Self {
            peer: socket::peer(&stream).or_cannot("examine", whom)?,
            stream: stream.into(),
            route,
            entry: None,
        })
    }

    /// How the client found the server.
    pub fn route(&self) -> Route {
        self.route
    }

    /// The process at the other end.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The path of the registry's socket, on the client's side, for a program that takes a path only, and resolves it
    /// again whenever it connects again. `None` by the kernel's route.
    ///
    /// # Errors
    ///
    /// [`Error::Untrusted`] if another user could lead that path elsewhere: it owns, or may write to, a directory above
    /// the runtime directory. This connection is none the worse for it.
    pub fn lasting_path(&self) -> Result<Option<PathBuf>, Error> {
        let Some((runtime_dir, entry)) = &self.entry else {
            return Ok(None);
        };
        Ok(Some(trusted::lasting_path(runtime_dir)?.join(entry)))
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The socket, to keep.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The answer to a client. "No service" is an answer and no error: the client keeps using the object that it has.
#[derive(Debug)]
pub enum Answer<T> {
    /// The service is there and this leads to it.
    Found(T),
    /// There is none for this client, for this reason.
    NoService(NoService),
}

impl<T> Answer<T> {
    /// What was found, without the reason if nothing was.
    pub fn found(self) -> Option<T> {
        match self {
            Self::Found(found) => Some(found),
            Self::NoService(_) => None,
        }
    }
}

/// Where a client looks, and how long it waits.
#[derive(Clone, Debug)]
pub struct Lookup {
    /// Whether the kernel's route is tried.
    pub kernel: bool,
    /// Runtime directories whose registries are searched, in order; empty: the kernel's route only.
    pub runtime_dirs: Vec<PathBuf>,
    /// How long to wait for a server with a full backlog; then EAGAIN.
    pub timeout: Duration,
}

impl Default for Lookup {
    fn default() -> Self {
        Self {
            kernel: true,
            runtime_dirs: registry::client_runtime_dirs(),
            timeout: Duration::from_secs(5),
        }
    }
}

/// Connects to the service `name` of the object behind `fd`, by the kernel's route or else the registry's.
///
/// A refusal by a kernel that knows the service (EACCES, EPERM, EPROTOTYPE) is final: the registry is not tried then. The
/// server of a block device is root or the owner of its node, and the process that listens still runs, whatever the route.
///
/// This claims no disk and leaves its page cache as it is: see [`BlockUpgrade`](crate::BlockUpgrade).
pub fn connect(fd: impl AsFd, name: &Name, lookup: &Lookup) -> Result<Answer<Connection>, Error> {
    let fd = fd.as_fd();
    let address = FdAddress::new(fd.as_raw_fd(), name.clone())?;
    let connected = match lookup.kernel {
        true => socket::connect(address.to_string(), lookup.timeout),
        false => Err(Errno::NOENT),
    };
    match connected {
        Ok(stream) => {
            let connection = Connection::new(stream, Route::Kernel, "the server")?;
            let object = fstat(fd).or_cannot("examine descriptor", fd.as_raw_fd())?;
            match check_server_of_disk(&object, connection) {
                // Where a socket of a server that ended is in the way, the next one is found in the registry only.
                Answer::NoService(stale @ NoService::ServerEnded { .. }) => {
                    match connect_by_registry(fd, name, lookup, &mut || Key::of(fd))? {
                        Answer::NoService(NoService::NotOffered) => Ok(Answer::NoService(stale)),
                        other => Ok(other),
                    }
                }
                answer => Ok(answer),
            }
        }
        Err(
            Errno::CONNREFUSED | Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG,
        ) => connect_by_registry(fd, name, lookup, &mut || Key::of(fd)),
        Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::PROTOTYPE)) => {
            Ok(Answer::NoService(NoService::Refused(errno)))
        }
        Err(errno) => Err(Error::system("connect to", address, errno)),
    }
}

/// The registry's route. `key` is called before and after connecting, and must return the same.
fn connect_by_registry(
    fd: BorrowedFd<'_>,
    name: &Name,
    lookup: &Lookup,
    key: &mut dyn FnMut() -> Result<Key, Error>,
) -> Result<Answer<Connection>, Error> {
    let before = match key() {
        // The kernel's answer for another kind of object is ECONNREFUSED, which is "not offered", too.
        Err(Error::Unsupported { .. }) => return Ok(Answer::NoService(NoService::NotOffered)),
        other => other?,
    };
    if matches!(before, Key::Block { .. })
        && let Some(why) = object::lacking_access(fd)?
    {
        return Ok(Answer::NoService(why));
    }
    let mut refusal = NoService::NotOffered;
    for dir in &lookup.runtime_dirs {
        for candidate in before.listeners() {
            let stream = match try_entry(dir, &candidate, name, lookup.timeout)? {
                Answer::Found(stream) => stream,
                Answer::NoService(NoService::NotOffered) => continue,
                Answer::NoService(why) => {
                    refusal = why;
                    continue;
                }
            };
            let mut connection = Connection::new(stream, Route::Registry, "the server")?;
            connection.entry = Some((dir.clone(), registry::entry_path(&candidate, name)));
            let object = fstat(fd).or_cannot("examine descriptor", fd.as_raw_fd())?;
            if !is_trusted_peer(&object, connection.peer()) {
                refusal = NoService::ForeignPeer {
                    uid: connection.peer().uid,
                };
                continue;
            }
            let connection = match check_server_of_disk(&object, connection) {
                Answer::Found(connection) => connection,
                Answer::NoService(why) => {
                    refusal = why;
                    continue;
                }
            };
            if key()? != before {
                return Ok(Answer::NoService(NoService::ObjectChanged));
            }
            return Ok(Answer::Found(connection));
        }
    }
    Ok(Answer::NoService(refusal))
}

fn try_entry(
    dir: &Path,
    key: &Key,
    name: &Name,
    timeout: Duration,
) -> Result<Answer<OwnedFd>, Error> {
    let entry = match Entry::find(dir, key, name) {
        Ok(Some(entry)) => entry,
        Ok(None) => return Ok(Answer::NoService(NoService::NotOffered)),
        Err(
            error @ (Error::Untrusted { .. }
            | Error::System {
                errno: Errno::LOOP | Errno::NAMETOOLONG,
                ..
            }),
        ) => return Ok(Answer::NoService(NoService::Untrusted(error.to_string()))),
        Err(error) => return Err(error),
    };
    match entry.connect(timeout) {
        Ok(stream) => Ok(Answer::Found(stream)),
        Err(Errno::NOENT) if !socket::has_proc() => Ok(Answer::NoService(NoService::NoProc)),
        // A server that died left its entry; one that ends may remove it between the two steps.
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(Answer::NoService(NoService::NotOffered)),
        Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::PROTOTYPE)) => {
            Ok(Answer::NoService(NoService::Refused(errno)))
        }
        Err(errno) => Err(Error::system(
            "connect to",
            format!("'{name}' in {}", dir.display()),
            errno,
        )),
    }
}

/// A connection to a disk's server, if the server may be one: who has the disk open could offer a service on it, and a
/// process that inherited the listening socket of a server that ended never answers. The two ends of a pipe have no such
/// owner.
fn check_server_of_disk(object: &Stat, connection: Connection) -> Answer<Connection> {
    let is_disk = FileType::from_raw_mode(object.st_mode) == FileType::BlockDevice;
    let peer = connection.peer();
    if is_disk && !is_trusted_peer(object, peer) {
        return Answer::NoService(NoService::ForeignPeer { uid: peer.uid });
    }
    if is_disk && has_ended(peer) {
        return Answer::NoService(NoService::ServerEnded { pid: peer.pid });
    }
    Answer::Found(connection)
}

/// Whether there is no process any more with the number of the one that made the socket listen (unix(7), SO_PEERCRED). It
/// has none here if it is in another pid namespace.
fn has_ended(peer: Peer) -> bool {
    Pid::from_raw(peer.pid)
        .is_some_and(|pid| matches!(pidfd_open(pid, PidfdFlags::empty()), Err(Errno::SRCH)))
}

/// Whether the server is root or the owner of the device node, or of the pipe.
fn is_trusted_peer(object: &Stat, peer: Peer) -> bool {
    peer.uid == 0 || peer.uid == object.st_uid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listener::{Listener, Options};

    #[test]
    fn a_key_that_changes_while_connecting_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let (read, _write) = std::io::pipe().expect("a pipe");
        let name = Name::new("service").expect("a name");
        let end = |ino, side| Key::Pipe { dev: 1, ino, side };
        let pipe = |ino| end(ino, object::Side::Write);
        let options = Options {
            kernel: false,
            runtime_dir: Some(dir.path().to_owned()),
            key: Some(end(7, object::Side::Read)),
            ..Options::default()
        };
        let _listener = Listener::bind(&read, &name, &options).expect("bound");
        let lookup = Lookup {
            runtime_dirs: vec![dir.path().to_owned()],
            ..Lookup::default()
        };
        let mut recycled = [pipe(7), pipe(8)].into_iter();
        let mut next = || Ok(recycled.next().expect("asked twice"));
        let answer =
            connect_by_registry(read.as_fd(), &name, &lookup, &mut next).expect("an answer");
        assert!(
            matches!(answer, Answer::NoService(NoService::ObjectChanged)),
            "{answer:?}"
        );
        let mut same = || Ok(pipe(7));
        let answer =
            connect_by_registry(read.as_fd(), &name, &lookup, &mut same).expect("an answer");
        let connection = answer.found().expect("a connection");
        let path = connection.lasting_path().expect("trusted").expect("a path");
        UnixStream::connect(path).expect("the path leads to the same server");
    }

    #[test]
    fn the_server_of_a_disk_runs_as_root_or_the_owner_of_the_node_and_that_of_a_pipe_anyhow() {
        let file = tempfile::tempfile().expect("a file");
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let mut object = fstat(&file).expect("examined");
        object.st_uid = 1000;
        let own = std::process::id().cast_signed();
        let mut ended = std::process::Command::new("true").spawn().expect("started");
        let ended_pid = ended.id().cast_signed();
        ended.wait().expect("it ended");
        let mut answer = |kind: FileType, uid, pid| {
            object.st_mode = kind.as_raw_mode() | 0o600;
            let peer = Peer { pid, uid, gid: 0 };
            let stream = ours.try_clone().expect("cloned");
            let connection = Connection {
                stream,
                route: Route::Kernel,
                peer,
                entry: None,
            };
            match check_server_of_disk(&object, connection) {
                Answer::Found(_) => None,
                Answer::NoService(why) => Some(why),
            }
        };
        assert_eq!(answer(FileType::BlockDevice, 0, own), None);
        assert_eq!(answer(FileType::BlockDevice, 1000, own), None);
        let stranger = Some(NoService::ForeignPeer { uid: 1001 });
        assert_eq!(answer(FileType::BlockDevice, 1001, own), stranger);
        assert_eq!(answer(FileType::Fifo, 1001, own), None);
        let stale = Some(NoService::ServerEnded { pid: ended_pid });
        assert_eq!(answer(FileType::BlockDevice, 0, ended_pid), stale);
        let elsewhere = 0;
        assert_eq!(answer(FileType::BlockDevice, 0, elsewhere), None);
    }
}
