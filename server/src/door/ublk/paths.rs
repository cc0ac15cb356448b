//! Where the devices of a number are, and what sysfs knows of them.

use std::fs;
use std::path::PathBuf;

/// The character device with this number.
pub(super) fn char_path(id: u32) -> PathBuf {
    format!("/dev/ublkc{id}").into()
}

/// Major and minor number of `/dev/ublkbN`, from sysfs: the server never opens its own disk.
pub(super) fn disk_number(id: u32) -> Option<(u32, u32)> {
    let text = fs::read_to_string(format!("/sys/block/ublkb{id}/dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
