//! Who has a block device open, from `/proc`: for messages, and for drivers that cannot be asked.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};

/// The first processes named; more are only counted.
const NAMED: usize = 3;

/// Who has the disk with this number open, as far as this process can see; `None` if nobody.
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
        fs::metadata(file.path()).is_ok_and(|meta| {
            let block = rustix::fs::FileType::from_raw_mode(meta.mode())
                == rustix::fs::FileType::BlockDevice;
            block && (major(meta.rdev()), minor(meta.rdev())) == disk
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
        let number = null.metadata().unwrap().rdev();
        let ours = Path::new("/proc/self");
        assert!(!has_open(ours, (major(number), minor(number))));
    }
}
