//! Attempts of a queue thread to reach what is outside the sandbox, as a guest that has taken the server over would make
//! them: by system calls, and by the thread's own ring. For tests; the log tells how each one ended.
//!
//! The environment names a folder with a file `secret`, a socket `listener`, and a file `target` that may go.

use std::ffi::CString;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::net::{AddressFamily, SocketType, socket};

/// The environment variable that names the folder.
pub const VARIABLE: &str = "UBLKUP_TEST_ESCAPE";

/// Attempts by the ring, in their order.
const BY_RING: [&str; 4] = ["openat", "socket", "connect", "unlinkat"];

/// The attempts by the ring that are still to be made. What they point to lives as long as this.
#[derive(Debug)]
pub(super) struct Escape {
    next: usize,
    secret: CString,
    target: CString,
    address: Box<libc::sockaddr_un>,
    /// For connecting.
    socket: OwnedFd,
}

impl Escape {
    /// Makes all attempts by system calls.
    pub(super) fn begin() -> io::Result<Self> {
        let folder = std::env::var_os(VARIABLE).map(PathBuf::from);
        let folder = folder.ok_or_else(|| io::Error::other(format!("no {VARIABLE}")))?;
        by_system_calls(&folder);
        let ring = another_ring(&folder.join("secret"), &folder.join("listener"));
        for (attempt, result) in ring? {
            tell("another ring", attempt, as_result(result));
        }
        let listener = address(&folder.join("listener"))?;
        Ok(Self {
            next: 0,
            secret: c_path(&folder.join("secret"))?,
            target: c_path(&folder.join("target"))?,
            address: Box::new(listener),
            socket: socket(AddressFamily::UNIX, SocketType::STREAM, None)?,
        })
    }

    /// The next attempt by the ring.
    pub(super) fn next(&mut self) -> Option<squeue::Entry> {
        let here = types::Fd(libc::AT_FDCWD);
        self.next += 1;
        Some(match *BY_RING.get(self.next - 1)? {
            "openat" => opcode::OpenAt::new(here, self.secret.as_ptr()).build(),
            "socket" => opcode::Socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0).build(),
            "connect" => connect(self.socket.as_raw_fd(), &self.address),
            _ => opcode::UnlinkAt::new(here, self.target.as_ptr()).build(),
        })
    }

    /// How the last attempt by the ring ended.
    pub(super) fn ended(&self, result: i32) {
        let attempt = BY_RING[self.next - 1];
        if matches!(attempt, "openat" | "socket") && result >= 0 {
            close(result);
        }
        tell("ring", attempt, as_result(result));
    }
}

fn by_system_calls(folder: &Path) {
    let call = |attempt, result| tell("call", attempt, result);
    // SAFETY: these get no memory of ours: null and numbers.
    let raw = |number: libc::c_long, arguments: [i64; 2]| unsafe {
        let [first, second] = arguments;
        match libc::syscall(number, first, second, 0, 0, 0, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    let parent = i64::from(std::os::unix::process::parent_id());
    let made = folder.join("made");
    call("open", std::fs::read(folder.join("secret")).map(drop));
    call("create", std::fs::write(&made, "x"));
    call("chmod", raw(libc::SYS_fchmodat, [-1, 0]));
    call(
        "connect",
        UnixStream::connect(folder.join("listener")).map(drop),
    );
    call("udp", UdpSocket::bind("127.0.0.1:0").map(drop));
    call("exec", Command::new("/bin/true").status().map(drop));
    // Wrong arguments: what is not forbidden gets another error.
    call(
        "ptrace",
        raw(libc::SYS_ptrace, [libc::PTRACE_PEEKDATA.into(), parent]),
    );
    call("memory", raw(libc::SYS_process_vm_readv, [parent, 0]));
    call("descriptor", raw(libc::SYS_pidfd_getfd, [-1, 0]));
    call("signal", raw(libc::SYS_kill, [parent, 0]));
    call("unshare", raw(libc::SYS_unshare, [0, 0]));
    call("setns", raw(libc::SYS_setns, [-1, 0]));
    call("keys", raw(libc::SYS_keyctl, [0, -3]));
    let environment = std::fs::read(format!("/proc/{parent}/environ"));
    call("environment", environment.map(drop));
}

/// A file opened and a socket connected by a ring that the server has not made.
fn another_ring(secret: &Path, listener: &Path) -> io::Result<[(&'static str, i32); 2]> {
    let (path, address) = (c_path(secret)?, address(listener)?);
    let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    let mut ring = IoUring::new(2)?;
    let mut result_of = |entry: squeue::Entry| {
        // SAFETY: what the entries below point to lives until they have completed, here.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let completion = ring.completion().next();
        completion
            .map(|completion| completion.result())
            .ok_or_else(|| io::Error::other("lost"))
    };
    let opened = result_of(opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build())?;
    if opened >= 0 {
        close(opened);
    }
    let connected = result_of(connect(socket.as_raw_fd(), &address))?;
    Ok([("openat", opened), ("connect", connected)])
}

fn connect(socket: RawFd, address: &libc::sockaddr_un) -> squeue::Entry {
    let len = u32::try_from(size_of_val(address)).unwrap_or(0);
    opcode::Connect::new(types::Fd(socket), ptr::from_ref(address).cast(), len).build()
}

fn address(path: &Path) -> io::Result<libc::sockaddr_un> {
    // SAFETY: all zeroes is an address without a path.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX.try_into().map_err(io::Error::other)?;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::other("the path is too long"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(address)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn close(fd: RawFd) {
    // SAFETY: the kernel has just made it for us.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

fn as_result(result: i32) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

fn tell(by: &str, attempt: &str, result: io::Result<()>) {
    let refused = result
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    let outcome = if refused { "refused" } else { "possible" };
    tracing::warn!("escape by {by}: {attempt} -> {outcome} ({result:?})");
}
