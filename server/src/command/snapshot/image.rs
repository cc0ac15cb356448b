//! The image of an export, as the process that starts its `qemu-storage-daemon` knows it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::getpid;

use crate::export::admin;
use crate::storage::qemu_image_of;

/// How long a server may take to accept.
const LIMIT: Duration = Duration::from_secs(5);

/// The image of the export whose admin socket and folder these are, without links in its path.
///
/// The server is not asked: it may be a guest's that has taken it over, and the file is about to be renamed. It was started with
/// the path, as its keeper was: a child of the server, made before the server confined itself, which confined servers cannot make.
///
/// # Errors
///
/// When it cannot be found out, or the export has no image that snapshots are made of.
pub(super) fn image(name: &str, control: &Path, folder: &Path) -> Result<PathBuf> {
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
            "process {} may have been started by a guest that has taken the server over: its filters of system calls are no \
             fewer than those of the server",
            keeper.pid
        );
    }
    let image = qemu_image_of(&keeper.arguments).with_context(|| {
        format!(
            "{name} is not a qcow2 image that is in a file of its own, not encrypted and without options of its backing files: \
             its snapshots are made with qemu-img while it is not served"
        )
    })?;
    fs::canonicalize(&image).with_context(|| image)
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
    /// away.
    fn is_older_than_sandbox(&self) -> bool {
        let filters = |pid| status(pid, "Seccomp_filters:").unwrap_or_default();
        let (keeper, own) = (filters(self.pid), filters(getpid().as_raw_nonzero().get()));
        // All have those of a container.
        keeper <= own || keeper < filters(self.server)
    }
}

/// A number in `/proc/PID/status` (proc_pid_status(5)).
fn status(pid: i32, key: &str) -> Option<i64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().parse().ok()
}
