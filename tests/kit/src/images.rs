//! Disk images with known content: trees of files, ext4 made of them, mounts
//! that are checked and taken away again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, UnmountFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::random::Random;
use crate::shell::Shell;

/// Files (relative path → SHA-256 of the content) that a tree must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownFiles {
    files: BTreeMap<String, String>,
}

/// Lengths around every boundary that matters: empty, sector, page, cluster.
const LENGTHS_BYTES: [usize; 12] = [
    0, 1, 511, 512, 513, 4095, 4096, 4097, 65_536, 65_537, 1_048_577, 3_000_000,
];

impl KnownFiles {
    /// Writes a tree of files into `dir`; the same seed gives the same files.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn generate(dir: &Path, seed: u64) -> Result<Self> {
        let mut known = KnownFiles::default();
        let mut random = Random(seed);
        for (index, &length_bytes) in LENGTHS_BYTES.iter().enumerate() {
            let name = format!("seed{seed}/d{}/file{index}", index % 3);
            let path = dir.join(&name);
            let content = random.bytes(length_bytes);
            write_file(&path, &content)?;
            known.files.insert(name, hex(&Sha256::digest(&content)));
        }
        Ok(known)
    }

    /// Reads every file below `dir` and compares; other files are ignored.
    ///
    /// # Errors
    /// A file is missing, unreadable or different; the message names it.
    pub fn verify(&self, dir: &Path) -> Result<()> {
        ensure!(!self.files.is_empty(), "no known files to compare with");
        for (name, wanted) in &self.files {
            let path = dir.join(name);
            let found = checksum(&path)?;
            ensure!(
                found == *wanted,
                "{} has the wrong content: SHA-256 {found}, not {wanted}",
                path.display()
            );
        }
        Ok(())
    }

    /// Both sets of files.
    #[must_use]
    pub fn and(mut self, other: KnownFiles) -> Self {
        self.files.extend(other.files);
        self
    }

    /// How many files are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

/// Makes an ext4 image of `size_bytes` that holds what is in `content`.
///
/// # Errors
/// The image cannot be written, or `mkfs.ext4` fails.
pub fn make_ext4(image: &Path, size_bytes: u64, content: Option<&Path>) -> Result<()> {
    File::create(image)
        .and_then(|file| file.set_len(size_bytes))
        .with_context(|| format!("cannot create the image {}", image.display()))?;
    let mut mkfs = Shell::new(tool("mkfs.ext4")).args(["-q", "-F", "-b", "4096"]);
    if let Some(dir) = content {
        mkfs = mkfs.arg("-d").arg(dir);
    }
    mkfs.arg(image).run()?;
    Ok(())
}

/// Makes an ext4 image with freshly generated files in it.
///
/// # Errors
/// As [`make_ext4`] and [`KnownFiles::generate`].
pub fn ext4_with_known_files(image: &Path, size_bytes: u64, seed: u64) -> Result<KnownFiles> {
    let content = tempfile::tempdir().context("cannot make a temporary directory")?;
    let known = KnownFiles::generate(content.path(), seed)?;
    make_ext4(image, size_bytes, Some(content.path()))?;
    Ok(known)
}

/// Checks an unmounted ext4 file system (image or device) without repairing it.
///
/// # Errors
/// `fsck.ext4` found something to complain about.
pub fn fsck(disk: &Path) -> Result<()> {
    Shell::new(tool("fsck.ext4"))
        .args(["-f", "-n"])
        .arg(disk)
        .run()
        .with_context(|| format!("the file system on {} is damaged", disk.display()))?;
    Ok(())
}

/// A mounted ext4 file system. Dropping it unmounts, quietly; a test that cares
/// calls [`Mounted::unmount`].
#[derive(Debug)]
pub struct Mounted {
    dir: PathBuf,
    mounted: bool,
}

/// Mounts an ext4 block device on `dir`, which is created. Needs root, so it is
/// for guests.
///
/// # Errors
/// The kernel refused; its log is the place to look.
pub fn mount_ext4(device: &Path, dir: &Path, read_only: bool) -> Result<Mounted> {
    mount(device, "ext4", dir, read_only)
}

/// Mounts a block device with any file system on `dir`, which is created.
///
/// # Errors
/// The kernel refused; its log is the place to look.
pub fn mount(device: &Path, kind: &str, dir: &Path, read_only: bool) -> Result<Mounted> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let flags = if read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    rustix::mount::mount(device, dir, kind, flags, None)
        .with_context(|| format!("cannot mount {} as {kind}", device.display()))?;
    Ok(Mounted {
        dir: dir.to_owned(),
        mounted: true,
    })
}

impl Mounted {
    /// Where it is mounted.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts; everything written is on the device afterwards.
    ///
    /// # Errors
    /// A process still uses it.
    pub fn unmount(mut self) -> Result<()> {
        self.mounted = false;
        rustix::mount::unmount(&self.dir, UnmountFlags::empty())
            .with_context(|| format!("cannot unmount {}", self.dir.display()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.mounted {
            // The test is failing already; detaching keeps the next one clean.
            let _failing = rustix::mount::unmount(&self.dir, UnmountFlags::DETACH);
        }
    }
}

/// The SHA-256 of a file (or block device), in hexadecimal.
///
/// # Errors
/// The file cannot be read.
pub fn checksum(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = file
            .read(&mut buffer)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

/// A program by name, also where only root's PATH would find it.
fn tool(name: &str) -> PathBuf {
    ["/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from(name))
}

fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let Some(parent) = path.parent() else {
        bail!("{} is not a file name", path.display());
    };
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    File::create(path)
        .and_then(|mut file| file.write_all(content))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_changed_byte_in_a_tree_is_noticed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let known = KnownFiles::generate(dir.path(), 7).expect("files can be written");
        known
            .verify(dir.path())
            .expect("the tree is as it was written");
        let victim = dir.path().join("seed7/d1/file7");
        let mut content = fs::read(&victim).expect("the file exists");
        content[4000] ^= 1;
        fs::write(&victim, content).expect("the file can be written");
        let error = known.verify(dir.path()).expect_err("it was changed");
        assert!(error.to_string().contains("file7"), "{error}");
    }

    #[test]
    fn the_same_seed_makes_the_same_files_and_another_seed_others() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let one = KnownFiles::generate(&dir.path().join("a"), 1).expect("files can be written");
        let again = KnownFiles::generate(&dir.path().join("b"), 1).expect("files can be written");
        let other = KnownFiles::generate(&dir.path().join("c"), 2).expect("files can be written");
        assert_eq!(one, again);
        assert_ne!(one, other);
        assert_eq!(one.and(other).len(), 2 * LENGTHS_BYTES.len());
    }

    #[test]
    fn comparing_with_nothing_is_an_error() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert!(KnownFiles::default().verify(dir.path()).is_err());
    }
}
