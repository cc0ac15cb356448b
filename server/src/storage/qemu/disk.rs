//! What `qemu-storage-daemon` is to open, and its command line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::storage::range_lock;

/// The node that is exported.
pub(super) const NODE: &str = "disk";

/// The export of the daemon.
pub(super) const EXPORT: &str = "export";

/// What follows the name of an image in that of the one that is to replace it.
pub const NEW_IMAGE: &str = ".ublkup-new";

/// How long the disk has no daemon at most, while its image is being exchanged.
pub const HELD_LIMIT: Duration = Duration::from_secs(10);

/// The descriptor by which the daemon has its monitor.
pub(super) const MONITOR: RawFd = 100;

/// Keys `secret.ID=FILE` make secrets.
const SECRET: &str = "secret.";

/// A disk that QEMU reads: options of its `--blockdev`, and files with secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuDisk {
    /// The image of the short form, `qcow2:PATH`.
    pub image: Option<PathBuf>,
    /// Options of `--blockdev`, and `secret.ID` with a file.
    pub options: BTreeMap<String, String>,
}

impl QemuDisk {
    /// `qcow2:PATH`, with what is said beyond that.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn qcow2(path: &str, options: BTreeMap<String, String>) -> Result<Self, String> {
        if path.is_empty() {
            return Err("no path after 'qcow2:': write qcow2:/srv/disk.qcow2, for instance".into());
        }
        let image = Some(path.into());
        Self { image, options }.checked()
    }

    /// `qemu:KEY=VALUE,…`
    ///
    /// # Errors
    ///
    /// What is missing, or must not be there.
    pub fn new(options: BTreeMap<String, String>) -> Result<Self, String> {
        if !options.contains_key("driver") {
            return Err(
                "no driver: write qemu:driver=vmdk,file.driver=file,file.filename=/srv/disk.vmdk, for instance".into(),
            );
        }
        let image = None;
        Self { image, options }.checked()
    }

    fn checked(self) -> Result<Self, String> {
        match self.options.contains_key("node-name") {
            true => Err("node-name: the server names the node".into()),
            false => Ok(self),
        }
    }

    /// The same with relative paths resolved from `folder`.
    #[must_use]
    pub fn resolved(self, folder: &Path) -> Self {
        let resolve = |(key, value): (String, String)| {
            let is_path = key == "filename" || key.ends_with(".filename");
            let is_path = is_path && !value.contains(':') || key.starts_with(SECRET);
            let path = || folder.join(&value).to_string_lossy().into_owned();
            let value = if is_path { path() } else { value };
            (key, value)
        };
        Self {
            image: self.image.map(|path| folder.join(path)),
            options: self.options.into_iter().map(resolve).collect(),
        }
    }

    /// Name of an export that was given none.
    #[must_use]
    pub fn default_name(&self) -> String {
        let path = self.path().unwrap_or_else(|| "qemu".into());
        let stem = path.file_stem().unwrap_or_default();
        stem.to_string_lossy().into_owned()
    }

    /// The file, if the disk is in one.
    fn path(&self) -> Option<PathBuf> {
        let named = |key: &str| self.options.get(key).map(PathBuf::from);
        let options = || named("filename").or_else(|| named("file.filename"));
        self.image.clone().or_else(options)
    }

    /// The options of `--blockdev`.
    fn node(&self, read_only: bool) -> BTreeMap<&str, String> {
        let mut all = BTreeMap::new();
        if let Some(image) = &self.image {
            all.extend([
                ("driver", "qcow2".to_owned()),
                ("discard", "unmap".into()),
                ("file.driver", "file".into()),
                ("file.filename", image.to_string_lossy().into_owned()),
                ("file.discard", "unmap".into()),
                ("file.cache.direct", "on".into()),
                ("file.aio", "native".into()),
            ]);
        }
        let given = self.options.iter();
        let given = given.filter(|(key, _)| !key.starts_with(SECRET));
        all.extend(given.map(|(key, value)| (key.as_str(), value.clone())));
        all.insert("node-name", NODE.into());
        if read_only {
            all.insert("read-only", "on".into());
        }
        all
    }

    /// The arguments of `qemu-storage-daemon`, whose monitor is a socket that it inherits: one with a name could be used by a
    /// guest that has taken the server over, to have the daemon open any file.
    pub(super) fn arguments(&self, disk: &Path, (queues, read_only): (u16, bool)) -> Vec<OsString> {
        let mut all = Vec::new();
        let mut add = |option: &str, value: String| {
            all.extend([OsString::from(option), OsString::from(value)]);
        };
        for (key, file) in &self.options {
            if let Some(id) = key.strip_prefix(SECRET) {
                let file = commas(file);
                add("--object", format!("secret,id={id},file={file}"));
            }
        }
        let node = self.node(read_only);
        let node = node
            .iter()
            .map(|(key, value)| format!("{key}={}", commas(value)));
        add("--blockdev", node.collect::<Vec<_>>().join(","));
        let writable = if read_only { "off" } else { "on" };
        let path = |path: &Path| commas(&path.to_string_lossy());
        let disk = path(disk);
        add(
            "--export",
            format!(
                "type=vhost-user-blk,id={EXPORT},node-name={NODE},addr.type=unix,addr.path={disk},writable={writable},\
                 num-queues={queues}"
            ),
        );
        add("--chardev", format!("socket,id=monitor,fd={MONITOR}"));
        add("--monitor", "chardev=monitor,mode=control".into());
        all
    }
}

impl fmt::Display for QemuDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let kind = match &self.image {
            Some(image) => {
                parts.push(commas(&image.to_string_lossy()));
                "qcow2"
            }
            None => "qemu",
        };
        let options = self.options.iter();
        parts.extend(options.map(|(key, value)| format!("{key}={}", commas(value))));
        write!(f, "{kind}:{}", parts.join(","))
    }
}

/// The options of `--blockdev` in the arguments of a daemon.
pub(super) fn blockdev(arguments: &[OsString]) -> BTreeMap<String, String> {
    let pair = arguments.windows(2).find(|pair| pair[0] == "--blockdev");
    let text = pair.map_or_else(Default::default, |pair| pair[1].to_string_lossy());
    // Commas in values are written twice; no argument has a NUL.
    let text = text.replace(",,", "\0");
    let options = text.split(',').filter_map(|option| option.split_once('='));
    options
        .map(|(key, value)| (key.to_owned(), value.replace('\0', ",")))
        .collect()
}

/// The file of a qcow2 image that the server may exchange for another: one that has all in that file, and in its backing files.
#[must_use]
pub fn image_of(arguments: &[OsString]) -> Option<String> {
    let mut options = blockdev(arguments);
    let is = |key: &str, value: &str| options.get(key).is_some_and(|is| is == value);
    let is_plain = is("driver", "qcow2") && is("file.driver", "file");
    let is_other = |key: &String| {
        ["backing", "encrypt", "data-file", "read-only"]
            .iter()
            .any(|other| key.starts_with(other))
    };
    let is_plain = is_plain && !options.keys().any(is_other);
    is_plain.then(|| options.remove("file.filename")).flatten()
}

/// What is locked of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    /// What QEMU locks: none opens it as long as the lock is there.
    Qemu,
    /// That an image, which is told by its inode, may be merged into it. A process that cannot write to it cannot have this
    /// lock.
    Merge(u64),
    /// That names are exchanged for it: one program does that at a time.
    Names,
}

impl Locked {
    /// The bytes: from, and how many.
    fn range(self) -> (i64, i64) {
        match self {
            // docs/system/qemu-block-drivers.rst.inc, "Disk image file locking".
            Self::Qemu => (100, 200),
            // Behind those that servers of plain files lock.
            Self::Names => ((1 << 62) + 16, 1),
            Self::Merge(inode) => ((1 << 62) + (1 << 40) + (inode % (1 << 40)).cast_signed(), 1),
        }
    }
}

/// Locks an image, until the file that is returned is closed.
///
/// # Errors
///
/// When another program has it locked, or it cannot be written to.
pub fn lock_image(image: &Path, what: Locked) -> io::Result<File> {
    let file = File::options().read(true).write(true).open(image)?;
    range_lock::set(&file, range_lock::Lock::Write, what.range())?;
    Ok(file)
}

/// Whether a program has locked a backing file so that an image may be merged into it.
pub(super) fn is_locked_for_merge(backing: &Path, image: &Path) -> io::Result<bool> {
    let merge = Locked::Merge(fs::metadata(image)?.ino());
    range_lock::is_locked_for_writing(&File::open(backing)?, merge.range())
}

/// Commas in values are written twice, by QEMU as by SPECs.
fn commas(text: &str) -> String {
    text.replace(',', ",,")
}
