//! What only block devices need: while a client uses the disk through its server directly, no other program may use
//! the device, and its page cache must not hold data that the client does not see.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Advice, FileType, Mode, OFlags, fadvise, fstat, fsync, major, minor, open};
use rustix::io::Errno;
use rustix::ioctl::{self, opcode};

use crate::address::Name;
use crate::claim;
use crate::connect::{Answer, Connection, Lookup, connect};
use crate::error::OrCannot;
use crate::object::is_read_only_disk;
use crate::{Error, socket};

/// An exclusive claim of a block device.
///
/// Dropping it ends the claim without touching the page cache; see [`DiskClaim::release`].
#[derive(Debug)]
pub struct DiskClaim {
    fd: OwnedFd,
    device: String,
    read_only: bool,
}

impl DiskClaim {
    /// Opens the block device at `path` with `O_RDWR|O_DIRECT|O_EXCL` and touches nothing else.
    ///
    /// A writable device that is mounted or otherwise claimed is [`Error::Claimed`]. A read-only one is
    /// opened for reading and shared.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_as(path, path.display().to_string())
    }

    fn open_as(path: &Path, device: String) -> Result<Self, Error> {
        let (fd, read_only) = open_claimed(path, &device)?;
        Ok(Self {
            fd,
            device,
            read_only,
        })
    }

    /// The claim that another process made as [`DiskClaim::open`] does, through a copy of its descriptor: both have
    /// the same open file, and the claim ends with the last copy.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        let device = socket::proc_path(fd.as_fd());
        expect_block_device(fd.as_fd(), &device)?;
        let read_only = is_read_only_disk(fd.as_fd())?;
        Ok(Self {
            fd,
            device,
            read_only,
        })
    }

    /// Writes the page cache of the device out and drops it: earlier writes have reached the server then, and later
    /// reads come from the server.
    pub fn settle(&self) -> Result<(), Error> {
        write_out(self.fd.as_fd(), &self.device)?;
        drop_cache(self.fd.as_fd(), &self.device)
    }

    /// [`connect`] with the claimed descriptor.
    pub fn connect(&self, name: &Name, lookup: &Lookup) -> Result<Answer<Connection>, Error> {
        connect(&self.fd, name, lookup)
    }

    /// Ends the claim and keeps the device open, for a caller that only checks whether it can be claimed.
    pub fn give_up(self) -> Result<OwnedFd, Error> {
        let mode = match self.read_only {
            true => OFlags::RDONLY,
            false => OFlags::RDWR,
        };
        let flags = mode | OFlags::DIRECT | OFlags::CLOEXEC;
        open(socket::proc_path(self.fd.as_fd()), flags, Mode::empty())
            .or_cannot("open", &self.device)
    }

    /// Whether the device is read-only, and so shared instead of claimed.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Drops from the page cache what other programs have read of the device meanwhile, and ends the claim.
    pub fn release(self) -> Result<(), Error> {
        drop_cache(self.fd.as_fd(), &self.device)
    }
}

impl AsFd for DiskClaim {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A block device whose service is in use: the exclusive claim and the connection, held together.
///
/// Dropping it does what [`BlockUpgrade::release`] does, but ignores errors.
#[derive(Debug)]
pub struct BlockUpgrade {
    connection: Connection,
    claim: DiskClaim,
    released: bool,
}

impl BlockUpgrade {
    /// Upgrades the block device at `path`.
    ///
    /// A writable device is opened with O_EXCL, so a mounted or otherwise claimed one is
    /// [`Error::Claimed`], and stays claimed until release. A read-only one is shared.
    pub fn open(path: &Path, name: &Name, lookup: &Lookup) -> Result<Answer<Self>, Error> {
        Self::start(path, path.display().to_string(), name, lookup)
    }

    /// Upgrades the block device behind an open descriptor, which the caller keeps. A descriptor that
    /// reads only, of a writable device, or writes only is refused: reopening it must not be a way to
    /// more rights.
    pub fn from_fd(fd: impl AsFd, name: &Name, lookup: &Lookup) -> Result<Answer<Self>, Error> {
        let fd = fd.as_fd();
        let path = socket::proc_path(fd);
        expect_block_device(fd, &path)?;
        if let Some(why) = crate::object::lacking_access(fd)? {
            return Ok(Answer::NoService(why));
        }
        Self::start(Path::new(&path), path.clone(), name, lookup)
    }

    fn start(
        path: &Path,
        device: String,
        name: &Name,
        lookup: &Lookup,
    ) -> Result<Answer<Self>, Error> {
        let claim = DiskClaim::open_as(path, device)?;
        claim.settle()?;
        Ok(match claim.connect(name, lookup)? {
            Answer::Found(connection) => Answer::Found(Self {
                connection,
                claim,
                released: false,
            }),
            Answer::NoService(why) => Answer::NoService(why),
        })
    }

    /// The connection to the server.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The claimed descriptor of the device, for a caller that uses the block device again after the release.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.claim.as_fd()
    }

    /// Whether the device is read-only, and so shared instead of claimed.
    pub fn is_read_only(&self) -> bool {
        self.claim.is_read_only()
    }

    /// Ends the upgrade: shuts the connection down, drops from the page cache what other programs have read of the
    /// device meanwhile, and ends the claim. Stop the protocol on the connection first.
    pub fn release(mut self) -> Result<(), Error> {
        self.end()
    }

    fn end(&mut self) -> Result<(), Error> {
        if self.released {
            return Ok(());
        }
        self.released = true;
        // An error means that the peer has disconnected before.
        let _gone = self.connection.stream().shutdown(Shutdown::Both);
        drop_cache(self.claim.as_fd(), &self.claim.device)
    }
}

impl Drop for BlockUpgrade {
    fn drop(&mut self) {
        let _reported_by_release = self.end();
    }
}

fn expect_block_device(fd: BorrowedFd<'_>, device: &str) -> Result<(u32, u32), Error> {
    let stat = fstat(fd).or_cannot("examine", device)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return Err(Error::system("upgrade", device, Errno::NOTBLK));
    }
    Ok((major(stat.st_rdev), minor(stat.st_rdev)))
}

/// Opens the device: (descriptor, read-only).
fn open_claimed(path: &Path, device: &str) -> Result<(OwnedFd, bool), Error> {
    let flags = OFlags::DIRECT | OFlags::CLOEXEC;
    let failed = |errno| match errno {
        Errno::NOENT if !socket::has_proc() => Error::NoProc,
        errno => Error::system("open", device, errno),
    };
    // O_PATH first: to open another kind of file can block, or have an effect.
    let seen = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let (major, minor) = expect_block_device(seen.as_fd(), device)?;
    let same = socket::proc_path(seen.as_fd());
    let shared = open(&same, OFlags::RDONLY | flags, Mode::empty()).map_err(failed)?;
    if is_read_only_disk(shared.as_fd())? {
        return Ok((shared, true));
    }
    match open(&same, OFlags::RDWR | OFlags::EXCL | flags, Mode::empty()) {
        Ok(claimed) => Ok((claimed, false)),
        Err(Errno::BUSY) => {
            let cause = claim::cause(Path::new("/proc"), Path::new("/sys"), major, minor);
            Err(Error::Claimed {
                device: device.to_owned(),
                cause,
            })
        }
        Err(errno) => Err(failed(errno)),
    }
}

fn write_out(fd: BorrowedFd<'_>, device: &str) -> Result<(), Error> {
    fsync(fd).or_cannot("write out the page cache of", device)
}

/// Drops the device's page cache. BLKFLSBUF needs CAP_SYS_ADMIN; without it posix_fadvise(2) drops the clean pages that
/// no process has mapped or locked, after a second write-out.
fn drop_cache(fd: BorrowedFd<'_>, device: &str) -> Result<(), Error> {
    // SAFETY: BLKFLSBUF takes no argument and accesses no memory of this process.
    let answer = unsafe { ioctl::ioctl(fd, ioctl::NoArg::<{ opcode::none(0x12, 97) }>::new()) };
    match answer {
        Ok(()) => Ok(()),
        Err(Errno::ACCESS | Errno::PERM) => {
            write_out(fd, device)?;
            fadvise(fd, 0, None, Advice::DontNeed).or_cannot("drop the page cache of", device)
        }
        Err(errno) => Err(Error::system("drop the page cache of", device, errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_block_device_is_not_upgraded() {
        let name = Name::new("vhost-user-blk").expect("a name");
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error =
            BlockUpgrade::open(file.path(), &name, &Lookup::default()).expect_err("refused");
        assert_eq!(error.errno(), Errno::NOTBLK);
        let error =
            BlockUpgrade::from_fd(file.as_file(), &name, &Lookup::default()).expect_err("refused");
        assert_eq!(error.errno(), Errno::NOTBLK);
    }
}
