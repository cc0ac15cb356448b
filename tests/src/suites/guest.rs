//! Steps that tests run in machines they boot themselves.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::kit::images::{self, KnownFiles};
use crate::kit::shell::sh;
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const STEPS: &[Test] = &[
    test!(run_script),
    test!(check_files_on_disk),
    test!(add_files_to_disk),
    test!(describe_disk),
];

/// Runs a shell script (the argument is its text) and replies with its output.
fn run_script(cx: &Context) -> Result<()> {
    let script: String = cx.args()?;
    let output = sh(&script).limit(cx.patience(300)).run()?;
    cx.reply(&output)
}

/// For [`check_files_on_disk`] and [`add_files_to_disk`].
#[derive(Debug, Serialize, Deserialize)]
pub struct FilesOnDisk {
    /// The block device with an ext4 file system.
    pub device: PathBuf,
    /// What must be on it.
    pub known: KnownFiles,
    /// For new files.
    pub seed: u64,
}

/// Mounts the disk read-only and compares every known file.
fn check_files_on_disk(cx: &Context) -> Result<()> {
    let disk: FilesOnDisk = cx.args()?;
    let mounted = images::mount_ext4(&disk.device, &cx.scratch().join("mnt"), true)?;
    disk.known.verify(mounted.dir())?;
    mounted.unmount()
}

/// Mounts the disk, compares, writes new files, unmounts, checks the file
/// system; replies with the new files' [`KnownFiles`].
fn add_files_to_disk(cx: &Context) -> Result<()> {
    let disk: FilesOnDisk = cx.args()?;
    let mounted = images::mount_ext4(&disk.device, &cx.scratch().join("mnt"), false)?;
    disk.known.verify(mounted.dir())?;
    let new = KnownFiles::generate(mounted.dir(), disk.seed)?;
    mounted.unmount()?;
    images::fsck(&disk.device)?;
    cx.reply(&new)
}

/// What a guest's kernel says about a virtio or ublk disk.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFacts {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size.
    pub block_bytes: u64,
    /// Whether the kernel takes it for read-only.
    pub read_only: bool,
    /// The kernel's idea of the cache: `write back` or `write through`.
    pub write_cache: String,
    /// Hardware queues.
    pub queues: usize,
}

/// Replies with the [`DiskFacts`] of the disk whose name (`vda`) is the argument.
fn describe_disk(cx: &Context) -> Result<()> {
    let name: String = cx.args()?;
    let dir = PathBuf::from("/sys/block").join(&name);
    ensure!(dir.exists(), "there is no disk {name}");
    let read = |file: &str| {
        let path = dir.join(file);
        std::fs::read_to_string(&path)
            .map(|text| text.trim().to_owned())
            .with_context(|| format!("cannot read {}", path.display()))
    };
    let number = |file: &str| -> Result<u64> {
        let text = read(file)?;
        text.parse()
            .with_context(|| format!("{name}/{file} is no number: {text}"))
    };
    let queues = std::fs::read_dir(dir.join("mq"))
        .with_context(|| format!("cannot list the queues of {name}"))?
        .count();
    cx.reply(&DiskFacts {
        size_bytes: number("size")? * 512,
        block_bytes: number("queue/logical_block_size")?,
        read_only: number("ro")? != 0,
        write_cache: read("queue/write_cache")?,
        queues,
    })
}
