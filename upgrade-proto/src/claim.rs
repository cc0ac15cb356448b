//! What uses a block device: the cause of an EBUSY, as text.

use std::fs;
use std::path::Path;

/// What uses a disk exclusively, as text: a mount, a holder (dm, md, …) or a swap area, of the disk or of one of its
/// partitions. `None` if nothing is known; a mount in another mount namespace and a program that claimed the disk
/// (O_EXCL) are not found.
pub fn disk_user(major: u32, minor: u32) -> Option<String> {
    known_user(Path::new("/proc"), Path::new("/sys"), major, minor)
}

/// The cause, as far as `/proc` and `/sys` say. Never empty.
pub(crate) fn cause(proc: &Path, sysfs: &Path, major: u32, minor: u32) -> String {
    known_user(proc, sysfs, major, minor).unwrap_or_else(|| {
        "claimed exclusively by another program or in another mount namespace".to_owned()
    })
}

fn known_user(proc: &Path, sysfs: &Path, major: u32, minor: u32) -> Option<String> {
    let device = sysfs.join(format!("dev/block/{major}:{minor}"));
    let mut numbers = vec![format!("{major}:{minor}")];
    numbers.extend(partitions(&device));
    let mounts = fs::read_to_string(proc.join("self/mountinfo")).unwrap_or_default();
    let is_ours = |path: &str| numbers.contains(&number_of(path));
    if let Some(place) = mounted_at(&mounts, &numbers, is_ours) {
        return Some(format!("mounted at {place}"));
    }
    let holders: Vec<_> = numbers
        .iter()
        .flat_map(|number| names_in(&sysfs.join("dev/block").join(number).join("holders")))
        .collect();
    if !holders.is_empty() {
        return Some(format!("held by {}", holders.join(", ")));
    }
    let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
    swap_on(&swaps, is_ours).map(|swap| format!("swap on {swap}"))
}

/// The first mount point of one of the devices, from the text of mountinfo. A file system over several disks (btrfs) has
/// a number of its own there, and is found by its source, for which `is_ours` is true.
fn mounted_at(
    mountinfo: &str,
    numbers: &[String],
    is_ours: impl Fn(&str) -> bool,
) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let number = fields.next()?;
        let place = fields.nth(1)?;
        let source = fields.skip_while(|field| *field != "-").nth(2)?;
        let used = numbers.iter().any(|wanted| wanted == number)
            || source.starts_with('/') && is_ours(&unescape(source));
        used.then(|| unescape(place))
    })
}

/// The first swap area for which `is_ours` is true, from the text of /proc/swaps.
fn swap_on(swaps: &str, is_ours: impl Fn(&str) -> bool) -> Option<String> {
    let paths = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    paths.map(unescape).find(|path| is_ours(path))
}

/// Undoes the kernel's octal escapes for space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    let escapes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    escapes
        .iter()
        .fold(text.to_owned(), |text, (escape, plain)| {
            text.replace(escape, plain)
        })
}

/// `major:minor` of the block device at a path; empty if there is none.
fn number_of(path: &str) -> String {
    use rustix::fs::{FileType, major, minor, stat};
    match stat(path) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice => {
            format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev))
        }
        _ => String::new(),
    }
}

/// The device numbers of a disk's partitions: while one is mounted the disk cannot be claimed.
fn partitions(device: &Path) -> Vec<String> {
    let inside = names_in(device).into_iter().map(|name| device.join(name));
    inside
        .filter(|path| path.join("partition").exists())
        .filter_map(|path| fs::read_to_string(path.join("dev")).ok())
        .map(|number| number.trim().to_owned())
        .collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 259:0 / / rw,relatime shared:1 - ext4 /dev/root rw
31 22 259:5 / /mnt/two\\040words rw - xfs /dev/ublkb0p1 rw
";

    #[test]
    fn the_cause_names_the_mount_point_of_a_disk_and_of_its_partition() {
        let dir = tempfile::tempdir().expect("a directory");
        let (proc, sysfs) = (dir.path().join("proc"), dir.path().join("sys"));
        let disk = sysfs.join("dev/block/259:4");
        fs::create_dir_all(proc.join("self")).expect("made");
        fs::create_dir_all(disk.join("ublkb0p1")).expect("made");
        fs::write(proc.join("self/mountinfo"), MOUNTS).expect("written");
        fs::write(disk.join("ublkb0p1/partition"), "1\n").expect("written");
        fs::write(disk.join("ublkb0p1/dev"), "259:5\n").expect("written");
        assert_eq!(cause(&proc, &sysfs, 259, 4), "mounted at /mnt/two words");
        assert_eq!(cause(&proc, &sysfs, 259, 5), "mounted at /mnt/two words");
        assert_eq!(cause(&proc, &sysfs, 259, 0), "mounted at /");
        assert!(cause(&proc, &sysfs, 259, 9).starts_with("claimed exclusively"));
        fs::create_dir_all(sysfs.join("dev/block/259:9/holders/dm-3")).expect("made");
        assert_eq!(cause(&proc, &sysfs, 259, 9), "held by dm-3");
    }

    #[test]
    fn a_file_system_over_several_disks_is_found_by_its_source() {
        let mounts =
            "40 22 0:77 / /data rw - btrfs /dev/ublkb7 rw\n41 22 0:78 / /x rw - tmpfs tmpfs rw\n";
        let found =
            |disk: &'static str| mounted_at(mounts, &["259:7".into()], move |path| path == disk);
        assert_eq!(found("/dev/ublkb7").as_deref(), Some("/data"));
        assert_eq!(found("tmpfs"), None);
    }

    #[test]
    fn a_swap_area_is_found_by_its_path() {
        let swaps = "Filename Type Size Used Priority\n/dev/a partition 1 0 -2\n/dev/b\\040c partition 1 0 -3\n";
        assert_eq!(
            swap_on(swaps, |path| path == "/dev/b c").as_deref(),
            Some("/dev/b c")
        );
        assert_eq!(swap_on(swaps, |path| path == "/dev/c"), None);
    }
}
