//! Who has a block device open, from `/proc`: for messages, and for drivers that cannot be asked.

use std::fs;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

/// The first processes named; more are only counted.
const NAMED: usize = 3;

/// The processes that have a block device open, as far as this process can see; `None` if there are none.
#[must_use]
pub fn openers_of(block_device: &Path) -> Option<String> {
    let found = statx(
        CWD,
        block_device,
        AtFlags::STATX_DONT_SYNC,
        StatxFlags::TYPE,
    )
    .ok()?;
    let is_block = FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice;
    openers((found.stx_rdev_major, found.stx_rdev_minor)).filter(|_| is_block)
}

/// The processes that have the disk with this number open, as far as this process can see; `None` if there are none.
pub(super) fn openers(disk: (u32, u32)) -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let found: Vec<_> = processes
        .filter(|process| has_open(&process.path(), disk))
        .filter_map(|process| {
            let pid = process.file_name().into_string().ok()?;
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            Some(format!("process {pid} ({})", name.trim()))
        })
        .collect();
    match &found[..] {
        [] => None,
        few if few.len() <= NAMED => Some(few.join(", ")),
        many => Some(format!(
            "{} and {} more",
            many[..NAMED].join(", "),
            many.len() - NAMED
        )),
    }
}

fn has_open(process: &Path, disk: (u32, u32)) -> bool {
    // What is no process has no such folder, and what is another user's cannot be looked into.
    let Ok(files) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    files.flatten().any(|file| {
        // Nothing that may block: a process may have files open whose own server does not answer.
        let known = statx(CWD, file.path(), AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE);
        known.is_ok_and(|known| {
            let kind = FileType::from_raw_mode(known.stx_mode.into());
            kind == FileType::BlockDevice && (known.stx_rdev_major, known.stx_rdev_minor) == disk
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_does_not_exist_is_open_nowhere() {
        assert_eq!(openers((4095, 1 << 19)), None);
    }

    #[test]
    fn a_character_device_of_the_same_number_is_no_disk() {
        let null = fs::File::open("/dev/null").unwrap();
        let number = rustix::fs::fstat(&null).unwrap().st_rdev;
        let number = (rustix::fs::major(number), rustix::fs::minor(number));
        assert!(!has_open(Path::new("/proc/self"), number));
    }
}
