//! What uses a block device: the cause of an EBUSY, as text.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, major, minor, open, openat2};

use crate::text::printable;

/// What uses a disk exclusively, as text: a mount, a holder (dm, md, …) or a swap area, of the disk or of one of its
/// partitions. `None` if nothing is known; a mount in a mount namespace without a process that this one sees,
/// and a program that claimed the disk (O_EXCL), are not found.
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
    if let Some(place) = mounted_at(&mounts(proc), &numbers) {
        return Some(format!("mounted at {}", printable(&place)));
    }
    if let Some(pool) = mounted_pool(sysfs, &numbers) {
        return Some(format!(
            "mounted as part of the file system {}",
            printable(&pool)
        ));
    }
    let holders: Vec<_> = numbers
        .iter()
        .flat_map(|number| names_in(&sysfs.join("dev/block").join(number).join("holders")))
        .collect();
    if !holders.is_empty() {
        return Some(format!("held by {}", printable(&holders.join(", "))));
    }
    let is_ours = |path: &str| number_of(path).is_some_and(|number| numbers.contains(&number));
    swap_on(&text_of(&proc.join("swaps")), is_ours)
        .map(|swap| format!("swap on {}", printable(&swap)))
}

/// A file that the kernel writes. It has names in it that users have chosen, and that need not be UTF-8.
fn text_of(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The text of mountinfo of all mount namespaces with a process that this one sees, once or, where it may not look
/// which namespace a process is in, once for each process. A process shows what is below its root.
fn mounts(proc: &Path) -> String {
    let mut seen = BTreeSet::new();
    let processes = names_in(proc)
        .into_iter()
        .filter(|name| name == "self" || name.bytes().all(|byte| byte.is_ascii_digit()));
    let mut text = String::new();
    for process in processes {
        let folder = proc.join(&process);
        let [namespace, root] =
            ["ns/mnt", "root"].map(|link| fs::read_link(folder.join(link)).ok());
        // In its sandbox a server sees no links of other processes, but their mounts.
        if namespace.is_none() || seen.insert((namespace, root)) {
            text += &text_of(&folder.join("mountinfo"));
        }
    }
    text
}

/// The first mount point of one of the devices, from the text of mountinfo. By its number: what a file system calls its
/// source is the choice of who mounts it, which for FUSE is any user.
fn mounted_at(mountinfo: &str, numbers: &[String]) -> Option<String> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let number = fields.next()?;
        let place = fields.nth(1)?;
        numbers
            .iter()
            .any(|wanted| wanted == number)
            .then(|| unescape(place))
    })
}

/// The file system over several disks that one of the devices is part of. Such a file system has a number of its own in
/// mountinfo; sysfs has its disks, as long as it is mounted anywhere.
fn mounted_pool(sysfs: &Path, numbers: &[String]) -> Option<String> {
    let pools = |kind: &'static str| {
        let dir = sysfs.join("fs").join(kind);
        let ids = names_in(&dir).into_iter();
        ids.map(move |id| (format!("{kind} {id}"), dir.join(id)))
    };
    let btrfs = pools("btrfs").map(|(pool, dir)| (pool, disks_in(&dir.join("devices"), "")));
    let bcachefs = pools("bcachefs").map(|(pool, dir)| (pool, disks_in(&dir, "block")));
    btrfs
        .chain(bcachefs)
        .find(|(_, disks)| disks.iter().any(|disk| numbers.contains(disk)))
        .map(|(pool, _)| pool)
}

/// The numbers of the disks that the entries of a directory of sysfs link to, or the files `link` in the entries.
fn disks_in(dir: &Path, link: &str) -> Vec<String> {
    let entries = names_in(dir).into_iter().map(|name| dir.join(name));
    entries
        .filter_map(|entry| fs::read_to_string(entry.join(link).join("dev")).ok())
        .map(|number| number.trim().to_owned())
        .collect()
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

/// `major:minor` of the block device at a path below /dev. Nothing is resolved that could lead to another file system: its
/// server, if it has one, need not answer.
fn number_of(path: &str) -> Option<String> {
    let dir = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dev = open("/dev", dir, Mode::empty()).ok()?;
    let stay = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let node = openat2(
        &dev,
        path.strip_prefix("/dev/")?,
        flags,
        Mode::empty(),
        stay,
    )
    .ok()?;
    let stat = fstat(&node).ok()?;
    let is_disk = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    is_disk.then(|| format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev)))
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
    use std::os::fd::AsRawFd;

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

    /// `/proc` and `/sys` with this mountinfo and these links to the sysfs directories of disks with these numbers.
    fn machine(mountinfo: &[u8], links: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        let (proc, sysfs) = (dir.path().join("proc/self"), dir.path().join("sys"));
        fs::create_dir_all(&proc).expect("made");
        fs::write(proc.join("mountinfo"), mountinfo).expect("written");
        for (link, number) in links {
            let disk = sysfs.join("dev/block").join(number);
            fs::create_dir_all(&disk).expect("made");
            fs::write(disk.join("dev"), format!("{number}\n")).expect("written");
            let link = sysfs.join(link);
            fs::create_dir_all(link.parent().expect("a parent")).expect("made");
            std::os::unix::fs::symlink(disk, link).expect("linked");
        }
        dir
    }

    fn user_of(machine: &tempfile::TempDir, major: u32, minor: u32) -> Option<String> {
        let [proc, sysfs] = ["proc", "sys"].map(|name| machine.path().join(name));
        known_user(&proc, &sysfs, major, minor)
    }

    #[test]
    fn a_mount_in_another_namespace_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let (proc, sysfs) = (dir.path().join("proc"), dir.path().join("sys"));
        let process = |pid: &str, namespace: &str, mounts: &str| {
            fs::create_dir_all(proc.join(pid).join("ns")).expect("made");
            let link = proc.join(pid).join("ns/mnt");
            std::os::unix::fs::symlink(format!("mnt:[{namespace}]"), link).expect("made");
            fs::write(proc.join(pid).join("mountinfo"), mounts).expect("written");
        };
        process("self", "1", "");
        process("7", "1", "");
        assert_eq!(known_user(&proc, &sysfs, 259, 5), None);
        process("8", "2", MOUNTS);
        let found = known_user(&proc, &sysfs, 259, 5);
        assert_eq!(found.as_deref(), Some("mounted at /mnt/two words"));
        // The link may not be read: of another user's process, or in a sandbox.
        fs::remove_file(proc.join("8/ns/mnt")).expect("removed");
        let found = known_user(&proc, &sysfs, 259, 5);
        assert_eq!(found.as_deref(), Some("mounted at /mnt/two words"));
    }

    #[test]
    fn a_file_system_over_several_disks_is_found_in_sysfs() {
        let pools = machine(
            b"40 22 0:77 / /data rw - btrfs /dev/ublkb7 rw\n",
            &[
                ("fs/btrfs/1f-2a/devices/ublkb7", "259:7"),
                ("fs/btrfs/1f-2a/devices/ublkb8", "259:8"),
                ("fs/bcachefs/3c/dev-0/block", "259:9"),
            ],
        );
        for (minor, pool) in [(7, "btrfs 1f-2a"), (8, "btrfs 1f-2a"), (9, "bcachefs 3c")] {
            let user = user_of(&pools, 259, minor).expect("found");
            assert_eq!(user, format!("mounted as part of the file system {pool}"));
        }
        assert_eq!(user_of(&pools, 259, 6), None);
    }

    /// Any block device of this machine, by its path and its number.
    fn any_disk() -> Option<(String, String)> {
        let nodes = fs::read_dir("/dev").expect("read").flatten();
        nodes.into_iter().find_map(|node| {
            let path = node.path().to_str()?.to_owned();
            number_of(&path).map(|number| (path, number))
        })
    }

    #[test]
    fn what_a_user_calls_the_source_of_a_mount_uses_no_disk_and_is_not_looked_at() {
        // So that a look at the path would find the number.
        let disk = any_disk();
        let (path, number) = disk.unwrap_or(("/dev/vda".into(), "254:0".into()));
        let (major, minor) = number.split_once(':').expect("a number");
        let [major, minor] = [major, minor].map(|part| part.parse().expect("a number"));
        let mounts = format!("40 22 0:77 / /x rw - fuse.sshfs {path} rw\n");
        assert_eq!(
            user_of(&machine(mounts.as_bytes(), &[]), major, minor),
            None
        );
    }

    #[test]
    fn names_that_are_not_text_hide_no_mount_and_forge_no_line() {
        let mounts = b"40 22 0:77 / /home/u/\xff rw - fuse x rw\n\
                       41 22 259:7 / /mnt/a\\012ERROR\x1b[2J rw - ext4 /dev/ublkb7 rw\n";
        let user = user_of(&machine(mounts, &[]), 259, 7);
        assert_eq!(user.as_deref(), Some(r"mounted at /mnt/a\nERROR\u{1b}[2J"));
    }

    #[test]
    fn only_a_node_in_dev_itself_is_asked_for_its_number() {
        assert_eq!(number_of("/dev/null"), None, "no disk");
        let (path, _) = any_disk().unwrap_or(("/dev/vda".into(), String::new()));
        let name = path.trim_start_matches("/dev/");
        // The last leads through a link, and out of /dev.
        let shown = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let number = shown.as_ref().map_or(0, AsRawFd::as_raw_fd);
        let ways = [
            format!("/dev/../dev/{name}"),
            format!("/proc/self/root{path}"),
            format!("/dev/fd/{number}"),
        ];
        for path in ways {
            assert_eq!(number_of(&path), None, "{path}");
        }
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
