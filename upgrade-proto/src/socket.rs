//! The few socket calls that both sides need.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::address::PREFIX;

/// A new AF_UNIX socket, close-on-exec.
pub(crate) fn new(kind: SocketType) -> Result<OwnedFd, Errno> {
    net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
}

/// A stream socket connected to `address`; a full backlog is waited for, up to `timeout`, then EAGAIN.
pub(crate) fn connect(
    address: impl rustix::path::Arg,
    timeout: Duration,
) -> Result<OwnedFd, Errno> {
    let socket = new(SocketType::STREAM)?;
    // Zero would mean "for ever".
    let limit = timeout.max(Duration::from_millis(1));
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(limit))?;
    let address = SocketAddrUnix::new(address)?;
    // A timed connect is not restarted by the kernel, and one that was interrupted has not begun.
    while let Err(errno) = net::connect(&socket, &address) {
        if errno != Errno::INTR {
            return Err(errno);
        }
    }
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(socket)
}

/// A stream socket connected to the socket at `path`. A server with a full backlog is waited for, up to `timeout`; a plain
/// connect(2) would wait without limit.
///
/// # Errors
///
/// What connect(2) answered; [`std::io::ErrorKind::WouldBlock`] when the time is over.
pub fn connect_within(path: &Path, timeout: Duration) -> std::io::Result<UnixStream> {
    Ok(connect(path, timeout)?.into())
}

/// Whether descriptors have names here, [`proc_path`].
pub(crate) fn has_proc() -> bool {
    access("/proc/self/fd", Access::EXISTS).is_ok()
}

/// A stream socket bound to `address` with mode 0600, listening.
pub(crate) fn listen(address: &str, backlog: i32) -> Result<OwnedFd, Errno> {
    let socket = new(SocketType::STREAM)?;
    // bind(2) makes a file with the mode of the socket, less the umask, so it is never accessible to others. There is no
    // file at an fd address, which a process may bind that may not change modes.
    if !address.starts_with(PREFIX) {
        rustix::fs::fchmod(&socket, 0o600.into())?;
    }
    net::bind(&socket, &SocketAddrUnix::new(address)?)?;
    net::listen(&socket, backlog)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// The name under which this process reaches an object that it holds by descriptor: no path can be
/// exchanged between a check of the descriptor and the use of this name.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The process that called listen(2) or connect(2) on the other end of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process id in our namespace, 0 if it has none there.
    pub pid: i32,
    /// Effective user id at that moment.
    pub uid: u32,
    /// Effective group id at that moment.
    pub gid: u32,
}

impl Peer {
    /// The peer of a connected AF_UNIX socket (SO_PEERCRED).
    pub fn of(socket: impl AsFd) -> Result<Self, Errno> {
        peer(socket)
    }
}

/// SO_PEERCRED. Not rustix's: its type cannot hold process id 0, which peers from other namespaces have.
pub(crate) fn peer(socket: impl AsFd) -> Result<Peer, Errno> {
    let mut credentials = MaybeUninit::<libc::ucred>::zeroed();
    let mut len_bytes =
        libc::socklen_t::try_from(size_of::<libc::ucred>()).map_err(|_| Errno::INVAL)?;
    // SAFETY: the kernel writes at most `len_bytes` into `credentials`, which we own throughout.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            credentials.as_mut_ptr().cast(),
            &mut len_bytes,
        )
    };
    if answer != 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    // SAFETY: all of it was zeroed, and any three integers are a valid ucred.
    let credentials = unsafe { credentials.assume_init() };
    Ok(Peer {
        pid: credentials.pid,
        uid: credentials.uid,
        gid: credentials.gid,
    })
}
