//! Listening sockets: where they may be, and which users may connect.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmod, chownat, fchmod, fstat, openat,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, sockopt,
};
use rustix::process::geteuid;
use upgrade_proto::Peer;

use super::Accept;
use super::accounts::{Group, User};

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
    /// It was replaced while it was being made.
    #[error("{}: another program has replaced the new socket; choose a folder that only its owner can write to", .0.display())]
    Exchanged(PathBuf),
    /// The file keeps its owner.
    #[error(
        "{}: cannot give the socket to {to}: {error}; run the server as root, or as that user or a member of that group",
        .path.display()
    )]
    Owner {
        /// The path.
        path: PathBuf,
        /// To whom.
        to: String,
        /// What the system said.
        #[source]
        error: io::Error,
    },
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

/// Which users may connect; by default the one of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// The owner of the file.
    pub owner: Option<User>,
    /// Its group.
    pub group: Option<Group>,
    /// Its mode; by default 0600, or 0660 with a group.
    pub mode: Option<SocketMode>,
}

impl SocketAccess {
    fn mode(&self) -> Mode {
        let default = if self.group.is_some() { 0o660 } else { 0o600 };
        Mode::from_raw_mode(self.mode.map_or(default, |mode| mode.0))
    }
}

/// The mode of a socket's file: who may write may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(u32);

impl FromStr for SocketMode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        match u32::from_str_radix(digits, 8) {
            Ok(mode @ 0..=0o777) => Ok(Self(mode)),
            _ => Err("give an octal number like 0660"),
        }
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

serialize_as_text!(SocketMode);

/// A listening socket, whose file goes away with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file: another process may have put another in its place.
    file: Option<(u64, u64)>,
}

impl Socket {
    /// Listens at `path`, for the users of `access`. A socket that no server listens on is replaced.
    ///
    /// No client can connect before the file has its owner and its mode: it is made for this user alone, and listened on
    /// last.
    ///
    /// # Errors
    ///
    /// When a server listens there, or it cannot be made.
    pub fn bind(path: &Path, access: &SocketAccess) -> Result<Self, SocketError> {
        let socket = Self::prepare(path, access)?;
        listen(&socket.listener, BACKLOG).map_err(|error| SocketError::System {
            path: path.to_owned(),
            what: "listen",
            error: error.into(),
        })?;
        Ok(socket)
    }

    /// Makes the file, with its owner and its mode. It is not listened on yet.
    fn prepare(path: &Path, access: &SocketAccess) -> Result<Self, SocketError> {
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
        bind(&socket, &address).map_err(|error| {
            let what = match error {
                Errno::NOENT => "bind a socket in a folder that does not exist",
                _ => "bind a socket",
            };
            system(what)(error.into())
        })?;
        // From here on the file goes away with this value.
        let socket = Self {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
            file: identity(path),
        };
        if *access != SocketAccess::default() {
            socket.admit(access)?;
        }
        Ok(socket)
    }

    /// Gives the file its owner, group and mode.
    fn admit(&self, access: &SocketAccess) -> Result<(), SocketError> {
        let system = |what: &'static str, error: io::Error| SocketError::System {
            path: self.path.clone(),
            what,
            error,
        };
        // By descriptor: where others may write to the folder, the path may be a link by the next call.
        let file = openat(
            CWD,
            &self.path,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| system("open the new socket", error.into()))?;
        let found = fstat(&file).map_err(|error| system("examine the new socket", error.into()))?;
        // What another process has put in its place between bind(2) and `identity` has the right number, too.
        let is_made_here = FileType::from_raw_mode(found.st_mode).is_socket()
            && found.st_uid == geteuid().as_raw()
            && found.st_nlink == 1;
        if Some((found.st_dev, found.st_ino)) != self.file || !is_made_here {
            return Err(SocketError::Exchanged(self.path.clone()));
        }
        let owner = access.owner.as_ref().map(|user| Uid::from_raw(user.id));
        let group = access.group.as_ref().map(|group| Gid::from_raw(group.id));
        chownat(&file, "", owner, group, AtFlags::EMPTY_PATH).map_err(|error| {
            let named = |what, name: Option<String>| name.map(|name| format!("{what} '{name}'"));
            let user = named("user", access.owner.as_ref().map(ToString::to_string));
            let group = named("group", access.group.as_ref().map(ToString::to_string));
            let to: Vec<_> = user.into_iter().chain(group).collect();
            SocketError::Owner {
                path: self.path.clone(),
                to: to.join(" and "),
                error: error.into(),
            }
        })?;
        // Last: the group of before never gets what is meant for the new one. There is no fchmod(2) for it.
        let file = format!("/proc/self/fd/{}", file.as_raw_fd());
        chmod(file, access.mode()).map_err(|error| system("set the mode", error.into()))
    }

    /// Takes a socket that another program listens on, also after this server has ended. Its file stays.
    ///
    /// # Errors
    ///
    /// When it is no listening Unix stream socket with a path.
    pub fn inherit(socket: OwnedFd) -> io::Result<Self> {
        let is_local = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
            && sockopt::socket_type(&socket)? == SocketType::STREAM
            && sockopt::socket_acceptconn(&socket)?;
        let listener = UnixListener::from(socket);
        let path = match is_local.then(|| listener.local_addr()).transpose()? {
            Some(address) => address.as_pathname().map(Path::to_owned),
            None => None,
        };
        let path =
            path.ok_or_else(|| io::Error::other("not a listening stream socket with a path"))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path,
            file: None,
        })
    }

    /// Takes a socket that another process has bound for this one. Its file goes away with it.
    ///
    /// # Errors
    ///
    /// As for [`inherit`](Self::inherit).
    pub fn adopt(socket: OwnedFd) -> io::Result<Self> {
        let mut socket = Self::inherit(socket)?;
        // Clients are told the process that has listened last.
        listen(&socket.listener, BACKLOG)?;
        socket.file = identity(&socket.path);
        Ok(socket)
    }

    /// Leaves the file to a process that [adopts](Self::adopt) the socket.
    pub fn hand_over(mut self) {
        self.file = None;
    }

    /// Whether the file goes away with it.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.file.is_some()
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
        std::thread::spawn(move || {
            sender.send(Socket::bind(&path, &SocketAccess::default()).map(drop))
        });
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
        let socket = Socket::bind(&path, &SocketAccess::default()).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_is_closed_to_others_from_bind_on_whatever_the_umask() {
        if !is_inside() {
            let test = "engine::socket::tests::a_socket_is_closed_to_others_from_bind_on_whatever_the_umask";
            // Other tests make files meanwhile.
            run_inside(["--mount"], test, std::process::Stdio::null());
            return;
        }
        rustix::process::umask(Mode::empty());
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("s");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        // Right after bind(2), before anything else is done to the file.
        let address = SocketAddrUnix::new(path.as_os_str().as_bytes()).unwrap();
        let bound = new_socket().unwrap();
        bind(&bound, &address).unwrap();
        assert_eq!(mode(), 0o600);
        drop(bound);
        let group = rustix::process::getegid().as_raw().to_string();
        let for_group = SocketAccess {
            group: Some(group.parse().unwrap()),
            ..SocketAccess::default()
        };
        for (access, expected) in [(SocketAccess::default(), 0o600), (for_group, 0o660)] {
            let prepared = Socket::prepare(&path, &access).unwrap();
            // Its mode is final, and no client has come in before that.
            assert_eq!(mode(), expected);
            let refused = UnixStream::connect(&path).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            drop(prepared);
            let _bound = Socket::bind(&path, &access).unwrap();
            assert_eq!(mode(), expected);
            UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn owner_group_and_mode_are_as_asked_and_a_group_may_connect() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("s");
        let group = rustix::process::getegid().as_raw();
        // One of another number where that is allowed.
        let group = if group == 0 { 1 } else { group };
        let group = Some(group.to_string().parse::<Group>().unwrap());
        for (mode, expected) in [(None, 0o660), (Some("0666"), 0o666), (Some("0o620"), 0o620)] {
            let access = SocketAccess {
                owner: None,
                group: group.clone(),
                mode: mode.map(|mode| mode.parse().unwrap()),
            };
            let _socket = Socket::bind(&path, &access).unwrap();
            let found = std::fs::metadata(&path).unwrap();
            assert_eq!(found.permissions().mode() & 0o777, expected);
            assert_eq!(Some(found.gid()), access.group.map(|group| group.id));
        }
        for wrong in ["0888", "1777", "rw", "", "-1"] {
            assert!(wrong.parse::<SocketMode>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_socket_that_is_handed_over_stays_with_its_file() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("s");
        let manager = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let socket = Socket::inherit(manager.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!((socket.path(), socket.is_own()), (&*path, false));
        assert!(socket.accept_client().unwrap().is_some(), "it waited");
        assert!(socket.accept_client().unwrap().is_none());
        drop(socket);
        UnixStream::connect(&path).unwrap();
        let wrong = Socket::inherit(client.into());
        assert!(wrong.unwrap_err().to_string().contains("not a listening"));
        let wrong = std::fs::File::open("/dev/null").unwrap();
        assert!(Socket::inherit(wrong.into()).is_err());
    }
}
