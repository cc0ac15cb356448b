//! Why a file cannot be served.

use std::io;
use std::path::PathBuf;

use crate::request::MAX_DISK_BYTES;

/// Why a file cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// An error of the system.
    #[error("cannot open {}: {source}{}", .path.display(), hint(.source, *.read_only))]
    Open {
        /// The file.
        path: PathBuf,
        /// Whether it was to be opened for reading only.
        read_only: bool,
        /// The error.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{} is {what}: only regular files and block devices can be served", .path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Another process has it.
    #[error("{} is in use by another process (a server, a mount, a virtual machine): stop that first", .0.display())]
    InUse(PathBuf),
    /// Another writer has it and does not let go of it.
    #[error(
        "{} is in use by another process that would not let go of it for a guest that moves here: a server, for \
         instance, that was started without --migration",
        .0.display()
    )]
    Kept(PathBuf),
    /// Servers that let their guests move serve it.
    #[error(
        "{} is in use by a server with --migration, whose guests may come back to it: start this one with \
         --migration and --ublk no as well, or stop that one",
        .0.display()
    )]
    TakesTurns(PathBuf),
    /// Too small to be a disk.
    #[error("{} has {len_bytes} bytes, less than one block of {block_bytes}: enlarge it (truncate -s)", .path.display())]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its size.
        len_bytes: u64,
        /// The smallest disk.
        block_bytes: u32,
    },
    /// Too large.
    #[error("{} is larger than {MAX_DISK_BYTES} bytes, the largest disk there can be", .0.display())]
    TooLarge(PathBuf),
    /// `cache=direct` where the file system has no `O_DIRECT`.
    #[error("{}: its file system cannot go around the page cache (O_DIRECT): use cache=auto or cache=buffered", .0.display())]
    NotDirect(PathBuf),
    /// The storage has blocks larger than a disk may have here.
    #[error("{} has blocks of {needed_bytes} bytes, and 4096 is the most that can be served: put the disk in a file on it", .path.display())]
    LargeBlocks {
        /// The file.
        path: PathBuf,
        /// What the storage takes.
        needed_bytes: u32,
    },
    /// `block-size` smaller than what the storage takes.
    #[error("{}: its storage takes blocks of {needed_bytes} bytes, not {asked_bytes}: leave block-size out{}", .path.display(), if *.is_device { "" } else { ", or use cache=buffered" })]
    BlockSize {
        /// The file.
        path: PathBuf,
        /// What the storage takes.
        needed_bytes: u32,
        /// What was asked for.
        asked_bytes: u32,
        /// A block device, which takes no smaller blocks through the page cache either.
        is_device: bool,
    },
}

fn hint(error: &io::Error, read_only: bool) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if !read_only => {
            " (it can perhaps be served --read-only)"
        }
        Some(libc::ENOENT) => " (truncate -s SIZE makes an empty image)",
        _ => "",
    }
}
