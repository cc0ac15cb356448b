//! The image of an export, as the process that starts its `qemu-storage-daemon` knows it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::export::admin;
use crate::storage::qemu_image_of;

/// How long a server may take to accept.
const LIMIT: Duration = Duration::from_secs(5);

/// The image of the export whose admin socket and folder these are, without links in its path, and whether QEMU has the same
/// path.
///
/// The server is not asked: it may be a guest's that has taken it over, and the file is about to be renamed. It was started with
/// the path, as its keeper was: a child of the server, made before the server confined itself, which confined servers cannot make.
///
/// # Errors
///
/// When it cannot be found out, or the export has no image that snapshots are made of.
pub(super) fn image(name: &str, control: &Path, folder: &Path) -> Result<(PathBuf, bool)> {
    let server = admin::server_process(control, LIMIT)?;
    let folder = fs::canonicalize(folder)?;
    let keepers = (fs::read_dir("/proc")?.flatten())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Keeper::of(pid, server, &folder));
    let [keeper] = &keepers.collect::<Vec<_>>()[..] else {
        bail!(
            "no qemu-storage-daemon is seen for {name}: snapshots are made of exports of qcow2:, from the server's own pid \
             namespace (those of Ceph are made by rbd snap create, those of other files by their file system)"
        );
    };
    if !keeper.is_older_than_sandbox() {
        bail!(
            "process {} may have been started by a guest that has taken the server over: it has as many filters of system calls as \
             the server",
            keeper.pid
        );
    }
    let image = qemu_image_of(&keeper.arguments).with_context(|| {
        format!(
            "{name} is not a qcow2 image that is in a file of its own, not encrypted and without options of its backing files: \
             its snapshots are made with qemu-img while it is not served"
        )
    })?;
    if !image.starts_with('/') {
        bail!("{name}: snapshots take the whole path of the image in its SPEC: {image}");
    }
    // The server may have another root, or a mount of its own.
    let theirs = fs::metadata(format!("/proc/{}/root{image}", keeper.pid));
    let (ours, theirs) = (fs::metadata(&image), theirs);
    match (ours, theirs) {
        (Ok(ours), Ok(theirs)) if (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) => {
            let path = fs::canonicalize(&image).with_context(|| image.clone())?;
            let is_direct = path == Path::new(&image);
            Ok((path, is_direct))
        }
        (Err(error), _) => Err(error).with_context(|| image),
        _ => bail!(
            "{image} is another file for the server than here: run this in the server's mount namespace"
        ),
    }
}

/// `ublkup qemu-keeper`, for one export.
struct Keeper {
    pid: i32,
    server: i32,
    arguments: Vec<OsString>,
}

impl Keeper {
    fn of(pid: i32, server: i32, folder: &Path) -> Option<Self> {
        if status(pid, "PPid:")? != i64::from(server) {
            return None;
        }
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words = line.strip_suffix(&[0])?.split(|byte| *byte == 0);
        let mut words = words.map(|word| OsString::from_vec(word.to_vec()));
        let command = [words.nth(1)?, words.next()?, words.next()?];
        let is_keeper = command[0] == "qemu-keeper" && command[2] == "--";
        let is_keeper = is_keeper && fs::canonicalize(&command[1]).ok()? == folder;
        is_keeper.then(|| Self {
            pid,
            server,
            arguments: words.collect(),
        })
    }

    /// Whether it was made before its server confined itself: children inherit filters of system calls, and nothing takes one
    /// away. A confined server has given up new privileges; one that has not is not confined, and could do all itself.
    fn is_older_than_sandbox(&self) -> bool {
        let filters = |pid| status(pid, "Seccomp_filters:");
        let has_fewer = match (filters(self.pid), filters(self.server)) {
            (Some(keeper), Some(server)) => keeper < server,
            _ => false,
        };
        has_fewer || status(self.server, "NoNewPrivs:") == Some(0)
    }
}

/// A number in `/proc/PID/status` (proc_pid_status(5)).
fn status(pid: i32, key: &str) -> Option<i64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().parse().ok()
}
