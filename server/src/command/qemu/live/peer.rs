//! The process at the other end of a monitor's connection, and which block devices it may use already.
//!
//! A monitor is just a socket, and what answers there names any device it likes. Its process gets a descriptor of a
//! disk only if it has that disk open as the descriptor would be. The answer comes from copies of the process's own
//! descriptors (pidfd_getfd(2)): a copy stays what it is, while `/proc/PID/fd/N` can be another file at each look, and
//! an `O_PATH` descriptor, which anybody can have, looks like the device there.
//!
//! Nor is every descriptor copied. A file of FUSE or NFS is asked about by fstat(2), and told of by close(2), and if its
//! server does not answer, the caller cannot even be killed. Copied are descriptors of which the kernel alone tells: of
//! sockets, and of files on the file systems that device nodes are on, which are in memory ([`Kind`]).

use std::fs;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fcntl_getfl, fstat, open, openat2};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, geteuid, getpid, pidfd_getfd, pidfd_open};

use super::refusal::refuse;

/// What may be done through a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    ReadWrite,
}

/// A process.
#[derive(Debug)]
pub struct Peer {
    pid: Pid,
    /// Stands for the same process as long as it is open, even when the number is given to another one.
    process: OwnedFd,
    /// It cannot be examined, and it runs as this program's user, who is not root.
    is_same_user: bool,
}

/// What kind of descriptor is copied.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Socket,
    /// A file on devtmpfs, or on tmpfs: containers and libvirt's QEMU have a `/dev` of their own there.
    Device,
}

/// A device that was named, and its number when it was looked up.
#[derive(Debug)]
pub struct Named {
    pub path: PathBuf,
    pub number: u64,
    /// What is to be opened instead, if the path is QEMU's name for a descriptor: the device itself.
    pub copy: Option<OwnedFd>,
}

impl Peer {
    /// The process at the other end.
    ///
    /// # Errors
    ///
    /// When it cannot be found out. The kernel tells which process called listen(2); another one may have
    /// accepted the connection, and the number may be another process's by now. So the process must have the
    /// connection: a socket whose other end is this process's.
    pub fn of(stream: &UnixStream) -> Result<Self> {
        let pid = Pid::from_raw(upgrade_proto::Peer::of(stream)?.pid);
        let pid =
            pid.context("QEMU's process is not visible from here (another pid namespace?)")?;
        let process = pidfd_open(pid, PidfdFlags::empty())
            .with_context(|| format!("cannot watch QEMU's process {pid}"))?;
        let mut peer = Self {
            pid,
            process,
            is_same_user: false,
        };
        let own = getpid().as_raw_nonzero().get();
        let is_ours = |fd: &OwnedFd| upgrade_proto::Peer::of(fd).is_ok_and(|it| it.pid == own);
        match peer.find(Kind::Socket, is_ours) {
            Ok(Some(_connection)) => {}
            Ok(None) => refuse(format!(
                "process {pid} listens at this monitor, but another one has taken the connection"
            ))?,
            Err(Errno::PERM) if runs_as_this_user(pid) => peer.is_same_user = true,
            Err(errno) => refuse(format!(
                "cannot see which files QEMU's process {pid} has open ({errno}), and only a disk that it has open \
                 already is given to it: run this as root"
            ))?,
        }
        Ok(peer)
    }

    /// Refuses what the process does not have open for `access` itself; `is_it` knows a descriptor of it.
    ///
    /// # Errors
    ///
    /// When it does not, or cannot be examined.
    pub fn expect_open(
        &self,
        path: &Path,
        access: Access,
        is_it: impl Fn(&OwnedFd) -> bool,
    ) -> Result<()> {
        // Where it cannot be examined, it can open what this program can open.
        if self.is_same_user {
            return Ok(());
        }
        match self.find(Kind::Device, |fd| allows(fd, access) && is_it(fd)) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => refuse(format!(
                "QEMU's process {} does not have {} open for {} itself, and is not given it",
                self.pid,
                path.display(),
                match access {
                    Access::Read => "reading",
                    Access::ReadWrite => "writing",
                }
            )),
            Err(errno) => bail!("cannot examine QEMU's process {}: {errno}", self.pid),
        }
    }

    /// A copy of a descriptor of the process. `None` if it cannot be had, or is not of a file in a `/dev`.
    pub fn copy(&self, fd: RawFd) -> Option<OwnedFd> {
        self.copy_of(Kind::Device, fd).ok().flatten()
    }

    /// The block device that the process calls `filename`. Only paths below `/dev` are looked up, without leaving the
    /// file system there: elsewhere a path can lead to a file system of another user, which never answers.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn block_device(&self, filename: &str) -> Result<Named> {
        let own = (filename.strip_prefix("/proc/self/fd/")).and_then(|fd| fd.parse().ok());
        let fd = match own {
            Some(number) => self.copy(number),
            None => below_dev(filename),
        };
        match fd.as_ref().and_then(block_number) {
            Some(number) => Ok(Named {
                path: filename.into(),
                number,
                copy: fd.filter(|_| own.is_some()),
            }),
            None => refuse(format!("'{}' is not a block device in /dev here", filename)),
        }
    }

    /// The first descriptor of the process that is of this kind and that `wanted` picks.
    fn find(
        &self,
        kind: Kind,
        wanted: impl Fn(&OwnedFd) -> bool,
    ) -> Result<Option<OwnedFd>, Errno> {
        let folder = format!("/proc/{}/fd", self.pid);
        let entries = fs::read_dir(folder).map_err(|error| errno(&error))?;
        for entry in entries {
            let entry = entry.map_err(|error| errno(&error))?;
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let Some(number) = number else {
                continue;
            };
            if let Some(fd) = self.copy_of(kind, number)?
                && wanted(&fd)
            {
                return Ok(Some(fd));
            }
        }
        Ok(None)
    }

    /// A copy of a descriptor of the process; `None` if it is not of this kind, or was closed.
    fn copy_of(&self, kind: Kind, number: RawFd) -> Result<Option<OwnedFd>, Errno> {
        if !self.is(kind, &self.pid.to_string(), number) {
            return Ok(None);
        }
        let copy = match pidfd_getfd(&self.process, number, PidfdGetfdFlags::empty()) {
            Ok(copy) => copy,
            Err(Errno::BADF) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        // The process can have put another file there since the look, and can have given the number of a mount to another
        // one. The copy keeps its file and that file's mount: what is found out about it stays true.
        if self.is(kind, "self", copy.as_raw_fd()) {
            return Ok(Some(copy));
        }
        // To close it might be to wait for a server that does not answer. It stays open until this program ends, which
        // by then has said why.
        let _left_open = copy.into_raw_fd();
        Ok(None)
    }

    /// Whether a descriptor of a process is of this kind. No file system is asked: links, mount ids and the types of
    /// mounts are the kernel's own text.
    fn is(&self, kind: Kind, process: &str, number: RawFd) -> bool {
        let link = fs::read_link(format!("/proc/{process}/fd/{number}"));
        let has_name = |beginning| {
            (link.as_ref())
                .is_ok_and(|link| (link.as_os_str().as_encoded_bytes()).starts_with(beginning))
        };
        match kind {
            Kind::Socket => has_name(b"socket:["),
            // The name is to save work: what is called `/dev/…` there need not be on a file system for that.
            Kind::Device => {
                has_name(b"/")
                    && mount_id(process, number).is_some_and(|mount| {
                        // Ids are of the machine, and a process sees the mounts of its namespace. What was opened here
                        // and handed to QEMU is on one of ours.
                        ["self", &self.pid.to_string()].into_iter().any(|viewer| {
                            let mounts = fs::read(format!("/proc/{viewer}/mountinfo"));
                            let mounts = mounts.unwrap_or_default();
                            let mounts = String::from_utf8_lossy(&mounts);
                            matches!(file_system(&mounts, &mount), Some("devtmpfs" | "tmpfs"))
                        })
                    })
            }
        }
    }
}

/// The mount that the file of a descriptor is on, from its fdinfo.
fn mount_id(process: &str, number: RawFd) -> Option<String> {
    let text = fs::read(format!("/proc/{process}/fdinfo/{number}")).ok()?;
    let text = String::from_utf8_lossy(&text);
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    Some(id.trim().to_owned())
}

/// The type of the file system of a mount, from the text of mountinfo. Users' names in it have no spaces: the kernel
/// escapes them.
pub(super) fn file_system<'a>(mountinfo: &'a str, id: &str) -> Option<&'a str> {
    let mut lines = mountinfo.lines().map(|line| line.split(' '));
    let mount = lines.find_map(|mut fields| (fields.next() == Some(id)).then_some(fields))?;
    // Behind the mount point and the options there may be more fields, up to this one.
    mount.skip(5).skip_while(|&field| field != "-").nth(1)
}

/// Whether reads, and writes if asked for, are possible through a descriptor. `O_PATH` has no access mode.
fn allows(fd: &OwnedFd, access: Access) -> bool {
    fcntl_getfl(fd).is_ok_and(|flags| {
        let mode = flags & OFlags::ACCMODE;
        let reads = mode == OFlags::RDONLY && access == Access::Read;
        !flags.contains(OFlags::PATH) && (reads || mode == OFlags::RDWR)
    })
}

fn runs_as_this_user(pid: Pid) -> bool {
    let user = geteuid();
    !user.is_root()
        && fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() == user.as_raw())
}

fn below_dev(path: &str) -> Option<OwnedFd> {
    let below = Path::new(path).strip_prefix("/dev").ok()?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let dev = open("/dev", flags | OFlags::DIRECTORY, Mode::empty()).ok()?;
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    openat2(dev, below, flags, Mode::empty(), stay).ok()
}

/// The number of a block device; `None` for any other file.
pub fn block_number(fd: impl AsFd) -> Option<u64> {
    let stat = fstat(fd).ok()?;
    (FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice).then_some(stat.st_rdev)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
