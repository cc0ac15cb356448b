//! The object behind a descriptor, and its key in the registry.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fstatfs, major, minor};
use rustix::io::Errno;
use rustix::ioctl::{self, opcode};

use crate::Error;
use crate::error::{NoService, OrCannot};

/// The file system of anonymous pipes.
const PIPEFS_MAGIC: u64 = 0x5049_5045;

/// The side of a pipe that a descriptor is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The read end.
    Read,
    /// The write end.
    Write,
    /// Opened for both: it counts as either end.
    Both,
}

impl Side {
    const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Both];

    /// Whether a client on this side finds a listener on `other`: the ends must complement each other.
    pub fn meets(self, other: Self) -> bool {
        self == Self::Both || other == Self::Both || self != other
    }

    /// Whether two listeners on these sides could be found by the same client.
    fn overlaps(self, other: Self) -> bool {
        self == Self::Both || other == Self::Both || self == other
    }
}

/// The identity of an object, chosen so that it does not outlive the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// A block device: its number can be used again, its disk sequence number cannot.
    Block {
        /// Major device number.
        major: u32,
        /// Minor device number; a partition has its own.
        minor: u32,
        /// The disk's sequence number since boot.
        diskseq: u64,
    },
    /// An anonymous pipe.
    Pipe {
        /// `st_dev` of pipefs.
        dev: u64,
        /// The pipe's inode number.
        ino: u64,
        /// The side of the descriptor.
        side: Side,
    },
}

impl Key {
    /// The key of the object behind `fd`; [`Error::Unsupported`] if it is neither a block device nor a pipe.
    pub fn of(fd: impl AsFd) -> Result<Self, Error> {
        let fd = fd.as_fd();
        let number = fd.as_raw_fd();
        let flags = fcntl_getfl(fd).or_cannot("examine descriptor", number)?;
        if flags.contains(OFlags::PATH) {
            return Err(Error::system("use O_PATH descriptor", number, Errno::BADF));
        }
        let stat = fstat(fd).or_cannot("examine descriptor", number)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Ok(Self::Block {
                major: major(stat.st_rdev),
                minor: minor(stat.st_rdev),
                diskseq: disk_sequence(fd)?,
            }),
            FileType::Fifo => {
                let fs = fstatfs(fd).or_cannot("examine descriptor", number)?;
                if u64::try_from(fs.f_type) != Ok(PIPEFS_MAGIC) {
                    let why = "a named FIFO has no key that ends with it";
                    return Err(Error::Unsupported { fd: number, why });
                }
                let mode = flags & OFlags::ACCMODE;
                let side = match mode {
                    OFlags::WRONLY => Side::Write,
                    OFlags::RDWR => Side::Both,
                    _ => Side::Read,
                };
                Ok(Self::Pipe {
                    dev: stat.st_dev,
                    ino: stat.st_ino,
                    side,
                })
            }
            _ => Err(Error::Unsupported {
                fd: number,
                why: "it is neither a block device nor a pipe",
            }),
        }
    }

    /// The key of a block device from sysfs, for a server, which must not open its own device.
    pub fn of_disk(major: u32, minor: u32) -> Result<Self, Error> {
        Self::of_disk_in(Path::new("/sys"), major, minor)
    }

    /// [`Key::of_disk`] with sysfs at another path.
    pub fn of_disk_in(sysfs: &Path, major: u32, minor: u32) -> Result<Self, Error> {
        let device = sysfs.join(format!("dev/block/{major}:{minor}"));
        // A partition has no number of its own: its directory lies inside its disk's.
        let device = std::fs::canonicalize(&device).unwrap_or(device);
        let own = device.join("diskseq");
        let text = std::fs::read_to_string(&own).or_else(|error| match device.parent() {
            Some(disk) if device.join("partition").exists() => {
                std::fs::read_to_string(disk.join("diskseq"))
            }
            _ => Err(error),
        });
        let errno = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let text = text.map_err(errno).or_cannot("read", own.display())?;
        let diskseq = text.trim().parse().map_err(|_| Errno::PROTO);
        let diskseq = diskseq.or_cannot("understand", own.display())?;
        Ok(Self::Block {
            major,
            minor,
            diskseq,
        })
    }

    /// The registry's folder for a listener with this key.
    pub(crate) fn folder(&self) -> String {
        match self {
            Self::Block {
                major,
                minor,
                diskseq,
            } => format!("blk-{major}-{minor}-{diskseq}"),
            Self::Pipe { dev, ino, side } => {
                let side = match side {
                    Side::Read => "r",
                    Side::Write => "w",
                    Side::Both => "rw",
                };
                format!("pipe-{dev}-{ino}-{side}")
            }
        }
    }

    /// The keys of the listeners that a client with this key may use, best first.
    pub(crate) fn listeners(&self) -> Vec<Self> {
        self.with_sides(Side::meets)
    }

    /// The keys of the listeners that cannot exist beside one with this key.
    pub(crate) fn rivals(&self) -> Vec<Self> {
        self.with_sides(Side::overlaps)
    }

    fn with_sides(&self, wanted: impl Fn(Side, Side) -> bool) -> Vec<Self> {
        match *self {
            Self::Block { .. } => vec![*self],
            Self::Pipe { dev, ino, side } => Side::ALL
                .into_iter()
                .filter(|other| wanted(side, *other))
                .map(|side| Self::Pipe { dev, ino, side })
                .collect(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block {
                major,
                minor,
                diskseq,
            } => {
                write!(f, "block device {major}:{minor} (disk sequence {diskseq})")
            }
            Self::Pipe { ino, .. } => write!(f, "pipe:[{ino}]"),
        }
    }
}

/// The disk sequence number behind an open block device.
fn disk_sequence(fd: BorrowedFd<'_>) -> Result<u64, Error> {
    // SAFETY: BLKGETDISKSEQ writes one u64, into memory that `Getter` owns during the call.
    let answer = unsafe {
        ioctl::ioctl(
            fd,
            ioctl::Getter::<{ opcode::read::<u64>(0x12, 128) }, u64>::new(),
        )
    };
    answer.or_cannot(
        "read the disk sequence number of descriptor",
        fd.as_raw_fd(),
    )
}

/// Whether an open block device is read-only as a device.
pub(crate) fn is_read_only_disk(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    // SAFETY: BLKROGET writes one int, into memory that `Getter` owns during the call.
    let answer =
        unsafe { ioctl::ioctl(fd, ioctl::Getter::<{ opcode::none(0x12, 94) }, i32>::new()) };
    let read_only = answer.or_cannot("read the state of descriptor", fd.as_raw_fd())?;
    Ok(read_only != 0)
}

/// What a client's descriptor of a disk gives less than the service would: that reads, and writes unless
/// the disk is read-only. The kernel's rule, which a registry cannot enforce and a client can keep.
pub(crate) fn lacking_access(fd: BorrowedFd<'_>) -> Result<Option<NoService>, Error> {
    let flags = fcntl_getfl(fd).or_cannot("examine descriptor", fd.as_raw_fd())?;
    Ok(match flags & OFlags::ACCMODE {
        OFlags::RDWR => None,
        OFlags::RDONLY if is_read_only_disk(fd)? => None,
        OFlags::RDONLY => Some(NoService::ReadOnlyDescriptor),
        _ => Some(NoService::WriteOnlyDescriptor),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, mknodat, open};

    #[test]
    fn only_complementary_ends_of_a_pipe_meet() {
        assert!(Side::Read.meets(Side::Write) && Side::Write.meets(Side::Read));
        assert!(!Side::Read.meets(Side::Read) && !Side::Write.meets(Side::Write));
        let meets_both = |side: Side| side.meets(Side::Both) && Side::Both.meets(side);
        assert!(Side::ALL.into_iter().all(meets_both));
    }

    #[test]
    fn the_two_ends_of_a_pipe_differ_only_in_their_side() {
        let (read, write) = std::io::pipe().expect("a pipe");
        let reader = Key::of(&read).expect("key");
        let Key::Pipe { dev, ino, side } = reader else {
            panic!("{reader:?}");
        };
        assert_eq!(side, Side::Read);
        let side = Side::Write;
        assert_eq!(Key::of(&write).expect("key"), Key::Pipe { dev, ino, side });
    }

    #[test]
    fn a_file_a_fifo_and_a_path_descriptor_have_no_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let (file, fifo) = (dir.path().join("file"), dir.path().join("fifo"));
        std::fs::write(&file, "").expect("a file");
        mknodat(CWD, &fifo, FileType::Fifo, 0o600.into(), 0).expect("a FIFO");
        for (path, flags, errno) in [
            (&*file, OFlags::RDWR, Errno::OPNOTSUPP),
            (&*fifo, OFlags::RDWR, Errno::OPNOTSUPP),
            (dir.path(), OFlags::PATH, Errno::BADF),
        ] {
            let opened = open(path, flags, Mode::empty()).expect("opened");
            assert_eq!(Key::of(&opened).expect_err("refused").errno(), errno);
        }
    }

    #[test]
    fn a_server_learns_the_key_of_disk_and_partition_from_sysfs() {
        let sysfs = tempfile::tempdir().expect("a directory");
        let disk = sysfs.path().join("devices/disk");
        std::fs::create_dir_all(disk.join("part1")).expect("directories");
        std::fs::create_dir_all(sysfs.path().join("dev/block")).expect("directories");
        std::fs::write(disk.join("diskseq"), "42\n").expect("written");
        std::fs::write(disk.join("part1/partition"), "1\n").expect("written");
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(
                sysfs.path().join(target),
                sysfs.path().join("dev/block").join(name),
            )
        };
        link("devices/disk", "259:0").expect("linked");
        link("devices/disk/part1", "259:1").expect("linked");
        let key = |minor| Key::of_disk_in(sysfs.path(), 259, minor);
        for minor in [0, 1] {
            let (major, diskseq) = (259, 42);
            let expected = Key::Block {
                major,
                minor,
                diskseq,
            };
            assert_eq!(key(minor).expect("key"), expected);
        }
        assert_eq!(key(2).expect_err("absent").errno(), Errno::NOENT);
        assert_ne!(key(0).expect("key").folder(), key(1).expect("key").folder());
    }
}
