//! Opening a file disk: what the storage is, what it takes, and the claim on it.

use std::fs::{self, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::fs::{fallocate, fcntl_getfl, fcntl_setfl, fstatfs};

use super::device::{self, DeviceFacts};
use super::error::OpenError;
use super::image_format::{self, ImageFormat};
use super::lock::{self, Lock, Part, is_taken, unless_taken};
use super::operations::{RELEASE_BYTES, ZERO_RANGE_BYTES};
use super::shared::{Alignment, Lacks, Shared};
use crate::io::AnonymousMemory;
use crate::request::{Limits, MAX_DISK_BYTES, Serial};
use crate::storage::failures::Failures;

/// How a file disk uses the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheMode {
    /// `O_DIRECT` where the file system supports it, else through the page cache.
    #[default]
    Auto,
    /// `O_DIRECT`, or the file is not served.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// Which file to serve, and how.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The export, for those who watch events.
    pub export: String,
    /// A regular file or a block device.
    pub path: PathBuf,
    /// How the page cache is used.
    pub cache: CacheMode,
    /// What the file holds, if the operator says so; otherwise another format is warned of.
    pub format: Option<ImageFormat>,
    /// Open it for reading only; writes are refused.
    pub read_only: bool,
    /// Logical block size to advertise; by default the smallest that the storage takes.
    pub block_bytes: Option<u32>,
    /// What the disk calls itself.
    pub serial: Serial,
    /// Leave it unclaimed, so that another server may have it, until `StorageControl::claim`.
    pub claim_later: bool,
}

/// Block sizes that a disk may have.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=4096;

/// Largest read or write that the doors offer.
const MAX_IO_BYTES: u32 = 1 << 20;

/// How long a file may stay taken by a server that was just killed: its last operations in the
/// kernel end a little after its process.
const TAKEN_LIMIT: Duration = Duration::from_secs(2);

pub(super) fn open(options: FileOptions) -> Result<(Limits, Shared), OpenError> {
    let file = open_file(&options.path, options.read_only, options.claim_later)?;
    examine(options, file)
}

/// Makes sure that a file which another process has opened is one that [`open_file`] would have opened.
pub(super) fn check_opened(options: &FileOptions, file: &fs::File) -> Result<(), OpenError> {
    let (path, read_only) = (&options.path, options.read_only);
    let failed = |source: io::Error| OpenError::Open {
        path: path.clone(),
        read_only,
        source,
    };
    let flags = fcntl_getfl(file).map_err(|errno| failed(errno.into()))?;
    let mode = flags & OFlags::RWMODE;
    let may_be_used = mode == OFlags::RDWR || read_only && mode == OFlags::RDONLY;
    // All writes of one that appends go to its end.
    if !may_be_used || flags.intersects(OFlags::APPEND | OFlags::PATH) {
        let why = "the file that was handed over is open in another way";
        return Err(failed(io::Error::other(why)));
    }
    let metadata = file.metadata().map_err(failed)?;
    check_kind(path, &metadata)
}

/// Finds out what an open file takes, and claims it.
pub(super) fn examine(
    options: FileOptions,
    mut file: fs::File,
) -> Result<(Limits, Shared), OpenError> {
    let FileOptions {
        export,
        path,
        cache,
        format,
        read_only,
        block_bytes: asked_bytes,
        serial,
        claim_later,
    } = options;
    let failed = |source: io::Error| OpenError::Open {
        path: path.clone(),
        read_only,
        source,
    };
    let metadata = file.metadata().map_err(failed)?;
    let is_device = metadata.file_type().is_block_device();
    if is_device && !read_only && device::is_read_only(&file) {
        return Err(failed(io::Error::from_raw_os_error(libc::EROFS)));
    }
    // The data of a device is not locked.
    let has_locks = match (is_device || claim_later, read_only) {
        (true, _) => true,
        (false, true) => lock(&file, &path, Lock::Read, Part::First, OpenError::InUse)?,
        (false, false) => lock(&file, &path, Lock::Write, Part::Data, OpenError::InUse)?,
    };
    // On a device too: flock(2), which udev uses, is another kind of lock.
    match (claim_later, read_only) {
        (true, _) => {
            lock(&file, &path, Lock::Read, Part::Turns, OpenError::Kept)?;
        }
        (false, false) if has_locks => {
            lock(
                &file,
                &path,
                Lock::Write,
                Part::Turns,
                OpenError::TakesTurns,
            )?;
        }
        _ => {}
    }
    if format.is_none() {
        // Before O_DIRECT, which a short buffer anywhere does not satisfy.
        image_format::warn_unless_raw(&file, &path);
    }
    let alignment = choose_cache(&file, &path, cache).map_err(|error| match error {
        Some(error) => failed(error),
        None => OpenError::NotDirect(path.clone()),
    })?;
    let device = is_device.then(|| DeviceFacts::read(&file, metadata.rdev()));

    let needed_bytes = match (alignment, &device) {
        (Some(alignment), _) => u32::try_from(alignment.block_bytes).unwrap_or(u32::MAX),
        (None, Some(device)) => device.logical_bytes,
        (None, None) => *BLOCK_SIZES.start(),
    };
    if needed_bytes > *BLOCK_SIZES.end() {
        return Err(OpenError::LargeBlocks { path, needed_bytes });
    }
    let block_bytes = asked_bytes.unwrap_or(needed_bytes);
    if block_bytes < needed_bytes || !BLOCK_SIZES.contains(&block_bytes) {
        return Err(OpenError::BlockSize {
            path,
            needed_bytes,
            asked_bytes: block_bytes,
            is_device,
        });
    }
    // Works for block devices too, where the metadata say 0.
    let len_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let capacity_bytes = len_bytes / u64::from(block_bytes) * u64::from(block_bytes);
    if capacity_bytes == 0 {
        return Err(OpenError::TooSmall {
            path,
            len_bytes,
            block_bytes,
        });
    }
    if capacity_bytes > MAX_DISK_BYTES {
        return Err(OpenError::TooLarge(path));
    }
    if capacity_bytes != len_bytes {
        tracing::warn!(
            "{}: its last {} bytes are less than a block of {block_bytes} and are not served",
            path.display(),
            len_bytes - capacity_bytes
        );
    }
    let physical_block_bytes = device.as_ref().map_or(4096, |device| device.physical_bytes);
    let discards = !read_only
        && match &device {
            Some(device) => device.discards,
            None => punches_holes(&file, len_bytes),
        };
    let limits = Limits {
        capacity: capacity_bytes.into(),
        block_bytes,
        physical_block_bytes: physical_block_bytes.max(block_bytes),
        optimal_io_bytes: device.as_ref().map_or(0, |device| device.optimal_io_bytes),
        max_io_bytes: MAX_IO_BYTES,
        discard_granularity_bytes: device
            .as_ref()
            .map_or(4096, |device| device.discard_granularity_bytes)
            .max(block_bytes),
        max_discard_bytes: if discards { RELEASE_BYTES } else { 0 },
        max_write_zeroes_bytes: if read_only { 0 } else { ZERO_RANGE_BYTES },
        read_only,
        write_cache: true,
        serial,
    };
    let is_in_memory = !is_device && is_in_memory(&file);
    let shared = Shared {
        export,
        path,
        file,
        claims_later: claim_later,
        claim: Mutex::default(),
        is_device,
        is_in_memory,
        alignment,
        lacks: Lacks::default(),
        failures: Failures::default(),
        has_lost_writes: AtomicBool::new(false),
    };
    Ok((limits, shared))
}

/// What identifies an open file: the number of a block device, or the inode and the file system it is in. The
/// latter by its own id where it has one, since the device number of some (btrfs, overlayfs) is another one after
/// each mount.
#[must_use]
pub fn identity(file: &fs::File) -> Option<String> {
    let metadata = file.metadata().ok()?;
    if metadata.file_type().is_block_device() {
        return Some(format!("block:{:x}", metadata.rdev()));
    }
    let id = rustix::fs::fstatvfs(file).map_or(0, |fs| fs.f_fsid);
    let file_system = if id == 0 { metadata.dev() } else { id };
    Some(format!("inode:{file_system:x}:{:x}", metadata.ino()))
}

/// Whether the file lies in a file system that has no storage but memory (linux/magic.h).
fn is_in_memory(file: &fs::File) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    // Without an answer everything works all the same.
    fstatfs(file).is_ok_and(|fs| matches!(fs.f_type, TMPFS_MAGIC | RAMFS_MAGIC))
}

/// Whether the file lies in XFS (linux/magic.h).
fn is_xfs(file: &fs::File) -> bool {
    const XFS_SUPER_MAGIC: i64 = 0x5846_5342;
    fstatfs(file).is_ok_and(|fs| fs.f_type == XFS_SUPER_MAGIC)
}

/// Opens the file of a disk: without blocking on a FIFO, and exclusively if it is a block device, unless that is claimed
/// later.
///
/// # Errors
///
/// When it cannot be opened, is in use, or is neither a regular file nor a block device.
pub fn open_file(path: &Path, read_only: bool, claim_later: bool) -> Result<fs::File, OpenError> {
    let failed = |source: io::Error| OpenError::Open {
        path: path.to_owned(),
        read_only,
        source,
    };
    let known = fs::metadata(path).map_err(failed)?;
    check_kind(path, &known)?;
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    if known.file_type().is_block_device() && !read_only && !claim_later {
        // Refused when the device is mounted or claimed by another writer.
        flags |= OFlags::EXCL;
    }
    let mut how = OpenOptions::new();
    how.read(true)
        .write(!read_only)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0));
    let opened = unless_taken(
        TAKEN_LIMIT,
        || how.open(path),
        |error| error.raw_os_error() == Some(libc::EBUSY),
    );
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => OpenError::InUse(path.to_owned()),
        _ => failed(error),
    })?;
    // It may have been replaced in between.
    check_kind(path, &file.metadata().map_err(failed)?)?;
    Ok(file)
}

fn check_kind(path: &Path, metadata: &fs::Metadata) -> Result<(), OpenError> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "something else"
    };
    Err(OpenError::Kind {
        path: path.to_owned(),
        what,
    })
}

/// Locks a part of a file, if its file system has locks; whether it has. `taken` is the error if another
/// process has it.
fn lock(
    file: &fs::File,
    path: &Path,
    kind: Lock,
    part: Part,
    taken: fn(PathBuf) -> OpenError,
) -> Result<bool, OpenError> {
    match lock::lock(file, kind, part, TAKEN_LIMIT) {
        Ok(()) => Ok(true),
        Err(error) if is_taken(&error) => Err(taken(path.to_owned())),
        Err(error) => {
            tracing::warn!(
                "{}: cannot be locked: {error}; make sure that no other program writes to it",
                path.display()
            );
            Ok(false)
        }
    }
}

/// Switches to the cache mode that was asked for; the alignment it needs, if it is around the
/// page cache. `Err(None)`: that cannot be had here.
fn choose_cache(
    file: &fs::File,
    path: &Path,
    cache: CacheMode,
) -> Result<Option<Alignment>, Option<io::Error>> {
    let system = |error: rustix::io::Errno| Some(error.into());
    // Without O_NONBLOCK, which was for FIFOs: io_uring takes it seriously.
    let plain = fcntl_getfl(file).map_err(system)? - OFlags::NONBLOCK;
    if cache != CacheMode::Buffered {
        if fcntl_setfl(file, plain | OFlags::DIRECT).is_ok()
            && let Some(alignment) = direct_alignment(file).map_err(Some)?
        {
            return Ok(Some(alignment));
        }
        if cache == CacheMode::Direct {
            return Err(None);
        }
        tracing::info!(
            "{}: its file system cannot go around the page cache; going through it",
            path.display()
        );
    }
    fcntl_setfl(file, plain).map_err(system)?;
    Ok(None)
}

/// What `O_DIRECT` asks for here: what the kernel says (`STATX_DIOALIGN`, Linux 6.1), confirmed by
/// a read, or the smallest block that reads.
fn direct_alignment(file: &fs::File) -> io::Result<Option<Alignment>> {
    let said = rustix::fs::statx(
        file,
        "",
        rustix::fs::AtFlags::EMPTY_PATH,
        rustix::fs::StatxFlags::DIOALIGN,
    )
    .ok()
    .filter(|said| said.stx_mask & rustix::fs::StatxFlags::DIOALIGN.bits() != 0);
    let mut candidates = vec![512, 1024, 2048, 4096];
    let mut memory_bytes = 0;
    if let Some(said) = said {
        if said.stx_dio_offset_align == 0 {
            // The file system can, but not for this file: encrypted, or with its data journalled.
            return Ok(None);
        }
        // For a file that shares extents with another (cp --reflink, a snapshot), XFS says its own block size,
        // because it does smaller writes through the page cache. It does them, and a disk keeps its blocks.
        let block_bytes = match is_xfs(file) {
            true => 512,
            false => said.stx_dio_offset_align.max(512),
        };
        candidates.retain(|candidate| *candidate >= block_bytes);
        memory_bytes = said.stx_dio_mem_align;
    }
    let probe = AnonymousMemory::new(4096)?;
    for block_bytes in candidates {
        // SAFETY: `probe` has 4096 bytes and lives through the call.
        let got = unsafe {
            libc::pread(
                file.as_raw_fd(),
                probe.as_ptr().cast(),
                block_bytes as usize,
                0,
            )
        };
        if got >= 0 {
            return Ok(Some(Alignment {
                // Where the kernel does not say, memory is held to the block size.
                memory_bytes: if memory_bytes == 0 {
                    block_bytes
                } else {
                    memory_bytes
                } as usize,
                block_bytes: block_bytes as usize,
            }));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
    }
    Ok(None)
}

/// Whether holes can be punched: tried behind the end, where it changes nothing.
fn punches_holes(file: &fs::File, len_bytes: u64) -> bool {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let behind = len_bytes.next_multiple_of(4096);
    match fallocate(file, mode, behind, 4096) {
        // The file is as long as the file system allows, or as 63 bits do: there is nothing behind it to try.
        Ok(()) | Err(rustix::io::Errno::FBIG) => true,
        Err(_) => behind > MAX_DISK_BYTES - 4096,
    }
}

#[cfg(test)]
#[path = "open_tests.rs"]
mod tests;
