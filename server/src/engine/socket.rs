//! Listening sockets: where they may be, and which users may connect.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen};
use upgrade_proto::Peer;

use super::Accept;

/// Bytes a path may have in `sockaddr_un`, without the final NUL.
const MAX_PATH_BYTES: usize = 107;

const BACKLOG: i32 = 16;

/// Why there is no socket. Each says which path and what to do.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit a socket address.
    #[error(
        "{}: the path has {} bytes, a socket's path has at most {MAX_PATH_BYTES}; choose a shorter one",
        .0.display(), .0.as_os_str().len()
    )]
    PathTooLong(PathBuf),
    /// A process listens there.
    #[error("{}: socket in use; stop the server that listens on it or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{}: exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The system said no.
    #[error("{}: cannot {what}: {error}", .path.display())]
    System {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

/// A listening socket, whose file goes away with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file: another process may have put another in its place.
    file: Option<(u64, u64)>,
}

impl Socket {
    /// Listens at `path`; only the user of this process may connect. A socket that no server listens
    /// on is replaced.
    ///
    /// # Errors
    ///
    /// When a server listens there, or it cannot be made.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let system = |what: &'static str| {
            move |error: io::Error| SocketError::System {
                path: path.to_owned(),
                what,
                error,
            }
        };
        if path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(SocketError::PathTooLong(path.to_owned()));
        }
        clear(path)?;
        let socket = new_socket().map_err(system("make a socket"))?;
        let address = SocketAddrUnix::new(path.as_os_str().as_bytes())
            .map_err(|error| system("use the path for a socket")(error.into()))?;
        bind(&socket, &address).map_err(|error| system("bind a socket")(error.into()))?;
        let file = identity(path);
        let listening = listen(&socket, BACKLOG);
        let socket = Self {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
            file,
        };
        listening.map_err(|error| system("listen")(error.into()))?;
        Ok(socket)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Accept for Socket {
    type Client = UnixStream;

    fn accept_client(&self) -> io::Result<Option<UnixStream>> {
        self.listener.accept_client()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.file.is_some() && identity(&self.path) == self.file {
            // There is no caller to tell; the next server replaces what is left.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // On Linux the socket's mode becomes its file's, so there is no moment with a wider one.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    Ok(socket)
}

/// Removes a stale socket; refuses anything else that is at `path`.
fn clear(path: &Path) -> Result<(), SocketError> {
    let Ok(found) = std::fs::symlink_metadata(path) else {
        // Nothing there, or nothing to be seen: bind will tell.
        return Ok(());
    };
    if !found.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    // Without waiting: the queue of the socket at the path may be full.
    let connected = new_socket().and_then(|socket| {
        let address = SocketAddrUnix::new(path.as_os_str().as_bytes())?;
        Ok(connect(&socket, &address)?)
    });
    match connected {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        _ => return Err(SocketError::InUse(path.to_owned())),
    }
    std::fs::remove_file(path).map_err(|error| SocketError::System {
        path: path.to_owned(),
        what: "remove the stale socket",
        error,
    })
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// The process at the other end, if it has a number here.
#[must_use]
pub fn peer_pid(stream: &UnixStream) -> Option<i32> {
    let pid = Peer::of(stream).ok()?.pid;
    (pid > 0).then_some(pid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc;
    use std::time::Duration;

    use testkit::namespaces::{is_inside, run_inside};

    use super::*;

    #[test]
    fn a_socket_with_a_full_queue_is_in_use_and_is_not_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("s");
        let address = SocketAddrUnix::new(path.as_os_str().as_bytes()).unwrap();
        let planted = new_socket().unwrap();
        bind(&planted, &address).unwrap();
        listen(&planted, 0).unwrap();
        let mut clients = Vec::new();
        loop {
            let client = new_socket().unwrap();
            match connect(&client, &address) {
                Ok(()) => clients.push(client),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || sender.send(Socket::bind(&path).map(drop)));
        let bound = receiver.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(matches!(bound, Err(SocketError::InUse(_))), "{bound:?}");
    }

    #[test]
    fn a_peer_in_another_pid_namespace_is_unknown() {
        if is_inside() {
            let ours = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
            assert_eq!(peer_pid(&ours.into()), None);
            return;
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(peer_pid(&ours), Some(std::process::id().cast_signed()));
        let test = "engine::socket::tests::a_peer_in_another_pid_namespace_is_unknown";
        run_inside(["--pid", "--fork"], test, OwnedFd::from(ours));
    }

    #[test]
    fn only_its_user_may_connect_and_a_stale_one_is_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let socket = Socket::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }
}
