//! What a block device says about itself.

use std::fs;
use std::os::fd::AsRawFd;

use rustix::fs::{ioctl_blkpbszget, ioctl_blksszget};

/// `BLKROGET`, `_IO(0x12, 94)` (`include/uapi/linux/fs.h`).
const BLKROGET: libc::Ioctl = (0x12 << 8) | 94;

/// Sizes and limits of a block device.
pub(super) struct DeviceFacts {
    pub(super) logical_bytes: u32,
    pub(super) physical_bytes: u32,
    pub(super) optimal_io_bytes: u32,
    pub(super) discards: bool,
    pub(super) discard_granularity_bytes: u32,
}

impl DeviceFacts {
    pub(super) fn read(file: &fs::File, device: u64) -> Self {
        let logical_bytes = ioctl_blksszget(file).unwrap_or(512);
        let physical_bytes = ioctl_blkpbszget(file).unwrap_or(logical_bytes);
        let number = format!(
            "/sys/dev/block/{}:{}",
            rustix::fs::major(device),
            rustix::fs::minor(device)
        );
        // A partition has no queue of its own; its disk, the folder above, has.
        let folders = [format!("{number}/queue"), format!("{number}/../queue")];
        let limit = |name: &str| -> u64 {
            folders
                .iter()
                .find_map(|folder| fs::read_to_string(format!("{folder}/{name}")).ok())
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        let small = |bytes: u64| u32::try_from(bytes).unwrap_or(0);
        Self {
            logical_bytes,
            physical_bytes,
            optimal_io_bytes: small(limit("optimal_io_size")),
            discards: limit("discard_max_bytes") > 0,
            discard_granularity_bytes: small(limit("discard_granularity")),
        }
    }
}

/// Whether a device is write-protected. Opening it for writing succeeds even then.
pub(super) fn is_read_only(device: &fs::File) -> bool {
    let mut read_only: libc::c_int = 0;
    // SAFETY: the kernel writes one int to where `read_only` is, which lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKROGET, &raw mut read_only) };
    result == 0 && read_only != 0
}
