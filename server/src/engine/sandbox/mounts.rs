//! A mount namespace of the server's own, with those mounts in it that the server still needs.
//!
//! When the last process of a mount namespace ends, the kernel unmounts what is mounted there, and writes it out before.
//! If that process is the server of a mounted disk, as in a container, it waits for itself and cannot be killed.
//!
//! Files and sockets that are open stay on the mounts that they were opened on, so a file system with an image or a
//! socket on it cannot be unmounted outside, as ever; all others can, because there is no copy of their mounts here.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, statx};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount,
    open_tree, unmount,
};
use rustix::process::{fchdir, pivot_root};

const PROC: &str = "/proc";

/// A mount namespace that threads can enter.
#[derive(Debug)]
pub(super) struct Namespace {
    namespace: OwnedFd,
    /// Where relative paths begin, as before.
    working_dir: OwnedFd,
}

impl Namespace {
    /// One that has the mounts of the root directory and of the `needed` paths, each without what is mounted below it,
    /// and what processes there are.
    ///
    /// # Errors
    ///
    /// Without `CAP_SYS_ADMIN` and `CAP_SYS_CHROOT`, or when the root directory is not that of the namespace.
    pub(super) fn new(needed: &[PathBuf]) -> io::Result<Self> {
        let dir = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let working_dir = open(".", dir, Mode::empty())?;
        // On a thread that ends then: after an error there is nothing to take back.
        let namespace = thread::scope(|scope| {
            let made = thread::Builder::new()
                .name("mounts".into())
                .spawn_scoped(scope, || make(needed))?;
            made.join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread that makes it panicked")))
        })?;
        Ok(Self {
            namespace,
            working_dir,
        })
    }

    /// Moves the calling thread there. Makes system calls and nothing else: it runs in a signal handler.
    pub(super) fn enter(&self) -> io::Result<()> {
        enter(self.namespace.as_raw_fd())?;
        Ok(fchdir(&self.working_dir)?)
    }
}

/// Threads that are not in the namespace of this one, by name.
pub(super) fn threads_elsewhere() -> io::Result<Vec<String>> {
    let own = fs::read_link("/proc/thread-self/ns/mnt")?;
    let is_elsewhere = |thread: &PathBuf| {
        // One that cannot be read has ended.
        fs::read_link(thread.join("ns/mnt")).is_ok_and(|namespace| namespace != own)
    };
    let threads = fs::read_dir("/proc/self/task")?.flatten();
    let threads = threads.map(|thread| thread.path()).filter(is_elsewhere);
    let name = |thread: PathBuf| fs::read_to_string(thread.join("comm")).unwrap_or_default();
    Ok(threads
        .map(|thread| name(thread).trim().to_owned())
        .collect())
}

fn enter(namespace: RawFd) -> io::Result<()> {
    // A thread that shares its root directory with others must not change namespaces.
    unshare(libc::CLONE_FS)?;
    // SAFETY: affects what paths mean to this thread, and no memory.
    match unsafe { libc::setns(namespace, libc::CLONE_NEWNS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn unshare(what: libc::c_int) -> io::Result<()> {
    // SAFETY: affects what paths mean to this thread, and no memory.
    match unsafe { libc::unshare(what) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Leaves the thread in the new namespace.
fn make(needed: &[PathBuf]) -> io::Result<OwnedFd> {
    unshare(libc::CLONE_NEWNS)?;
    // What happens here is not seen outside, nor the other way.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let kept = kept(&fs::read("/proc/self/mountinfo")?, needed);
    let copy = |path: &Path| {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, path, flags)
    };
    let root = copy(Path::new("/"))?;
    let mut mounts = Vec::new();
    for path in kept {
        let mount = match path == Path::new(PROC) {
            true => all_processes().or_else(|_| copy(&path)),
            false => copy(&path),
        };
        mounts.push((path, mount?));
    }
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    // It needs a place before it can be the root, and there is one with this name.
    move_mount(&root, "", CWD, PROC, empty)?;
    for (path, mount) in &mounts {
        move_mount(
            mount,
            "",
            &root,
            path.strip_prefix("/").unwrap_or(path),
            empty,
        )?;
    }
    fchdir(&root)?;
    // With the old root on top of the new one (pivot_root(2)).
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    let namespace = File::open("/proc/thread-self/ns/mnt")?.into();
    // A thread that enters gets the namespace's root. Where that is not the one of before, as after chroot(2), it must not.
    let before = root_mount()?;
    enter(OwnedFd::as_raw_fd(&namespace))?;
    match root_mount()? == before {
        true => Ok(namespace),
        false => Err(io::Error::other(
            "the root directory is not that of the mount namespace",
        )),
    }
}

/// The processes, with those of other users, also where the mount outside hides them (`hidepid=`, Linux 5.8). What others
/// have mounted is not found otherwise.
fn all_processes() -> rustix::io::Result<OwnedFd> {
    let proc = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&proc)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&proc, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn root_mount() -> rustix::io::Result<u64> {
    let root = statx(CWD, "/", AtFlags::empty(), StatxFlags::MNT_ID)?;
    Ok(root.stx_mnt_id)
}

/// The mount points, but for the root, that lead to the `needed` paths, in an order in which they can be mounted.
fn kept(mountinfo: &[u8], needed: &[PathBuf]) -> BTreeSet<PathBuf> {
    let meant = needed.iter().filter_map(|path| fs::canonicalize(path).ok());
    let needed: Vec<_> = needed.iter().cloned().chain(meant).collect();
    let points = mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape);
    let leads = |point: &PathBuf| needed.iter().any(|path| path.starts_with(point));
    points
        .filter(|point| point != Path::new("/"))
        .filter(leads)
        .collect()
}

/// Undoes the octal escapes of mountinfo.
fn unescape(mut text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        let code = rest.first_chunk::<3>().filter(|_| *first == b'\\');
        let code = code.and_then(|code| u8::from_str_radix(str::from_utf8(code).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        text = &rest[if code.is_some() { 3 } else { 0 }..];
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_kept_that_lead_to_a_needed_path() {
        let mounts = b"\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
23 22 0:20 / /nowhere rw - tmpfs run rw
24 23 0:21 / /nowhere/user rw - tmpfs user rw
25 22 259:0 / /mnt rw - ext4 /dev/ublkb0 rw
26 25 0:22 / /mnt/two\\040words rw - tmpfs x rw
27 22 0:23 / /nowhere/else rw - tmpfs y rw
";
        let needed = ["/nowhere/ublkup/exports/d", "/mnt/two words/d.sock", "/etc"];
        let kept = kept(mounts, &needed.map(PathBuf::from));
        let expected = ["/mnt", "/mnt/two words", "/nowhere"];
        assert_eq!(Vec::from_iter(kept), expected.map(PathBuf::from));
    }

    #[test]
    fn escapes_of_mountinfo_are_undone() {
        for (text, path) in [
            ("/a", "/a"),
            ("/a\\040b\\134c\\012", "/a b\\c\n"),
            ("/end\\", "/end\\"),
            ("/no\\9code", "/no\\9code"),
        ] {
            assert_eq!(unescape(text.as_bytes()), PathBuf::from(path), "{text}");
        }
    }
}
