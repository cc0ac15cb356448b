//! Steps that tests run in machines they boot themselves.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use testkit::images::{self, KnownFiles};
use testkit::random::Random;
use testkit::server::Server;
use testkit::shell::sh;

use super::io::{Exercise, open_direct, write_direct};
use crate::kit::sysfs::Sysfs;
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const STEPS: &[Test] = &[
    test!(run_script),
    test!(check_files_on_disk),
    test!(add_files_to_disk),
    test!(describe_disk),
    test!(exercise_disk).limit_s(500),
    test!(write_through).limit_s(120),
    test!(serve_and_add_files).limit_s(120),
    test!(serve_and_check_files).limit_s(120),
];

/// Runs a shell script (the argument is its text) and replies with its output.
fn run_script(cx: &Context) -> Result<()> {
    let script: String = cx.args()?;
    let output = sh(&script).limit(cx.patience(300)).run()?;
    cx.reply(&output)
}

/// A file system, what must be in it and what to add.
#[derive(Debug, Serialize, Deserialize)]
pub struct FilesOnDisk {
    /// The block device with an ext4 file system.
    pub device: PathBuf,
    /// What must be on it.
    pub known: KnownFiles,
    /// For new files.
    pub seed: u64,
}

impl FilesOnDisk {
    /// Mounts the disk read-only and compares every known file.
    pub fn check(&self, cx: &Context) -> Result<()> {
        let mounted = images::mount_ext4(&self.device, &cx.scratch().join("mnt"), true)?;
        self.known.verify(mounted.dir())?;
        mounted.unmount()
    }

    /// Mounts the disk, compares, writes new files, unmounts, checks the file system; the new files.
    pub fn add(&self, cx: &Context) -> Result<KnownFiles> {
        let mounted = images::mount_ext4(&self.device, &cx.scratch().join("mnt"), false)?;
        self.known.verify(mounted.dir())?;
        let new = KnownFiles::generate(mounted.dir(), self.seed)?;
        mounted.unmount()?;
        images::fsck(&self.device)?;
        Ok(new)
    }
}

/// The argument is a [`FilesOnDisk`].
fn check_files_on_disk(cx: &Context) -> Result<()> {
    cx.args::<FilesOnDisk>()?.check(cx)
}

/// The argument is a [`FilesOnDisk`]; replies with the new files' [`KnownFiles`].
fn add_files_to_disk(cx: &Context) -> Result<()> {
    cx.reply(&cx.args::<FilesOnDisk>()?.add(cx)?)
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
    let disk = Sysfs::of(&name)?;
    cx.reply(&DiskFacts {
        size_bytes: disk.size_bytes()?,
        block_bytes: disk.number("queue/logical_block_size")?,
        read_only: disk.number("ro")? != 0,
        write_cache: disk.get("queue/write_cache")?,
        queues: disk.queues()?,
    })
}

/// Verified I/O on the disk that the argument, an [`Exercise`], names.
fn exercise_disk(cx: &Context) -> Result<()> {
    let exercise: Exercise = cx.args()?;
    exercise.run(cx)
}

/// Blocks that [`write_through`] writes.
pub const WRITE_THROUGH_BLOCKS: u64 = 64;

/// Bytes of each.
pub const WRITE_THROUGH_BLOCK_BYTES: usize = 16 << 10;

/// What [`write_through`] writes to block `block`.
pub fn write_through_data(block: u64) -> Vec<u8> {
    Random(block + 1).bytes(WRITE_THROUGH_BLOCK_BYTES)
}

/// Switches the disk's write cache off, as an administrator of the guest would, and writes blocks
/// one after the other. When this step ends, every one of them was acknowledged.
fn write_through(cx: &Context) -> Result<()> {
    let name: String = cx.args()?;
    let sysfs = Sysfs::of(&name)?;
    sysfs.set("cache_type", "write through")?;
    ensure!(sysfs.get("cache_type")? == "write through");
    let disk = open_direct(&PathBuf::from("/dev").join(name))?;
    for block in 0..WRITE_THROUGH_BLOCKS {
        let data = write_through_data(block);
        write_direct(&disk, block * WRITE_THROUGH_BLOCK_BYTES as u64, &data)?;
    }
    Ok(())
}

/// Serves an image of the exchange directory through the ublk door; its path there is in the place of
/// the device.
fn serve_image(cx: &Context) -> Result<(Server, FilesOnDisk)> {
    let mut files: FilesOnDisk = cx.args()?;
    let spec = format!("file:{}", cx.exchange().join(files.device).display());
    let doors = ["--ublk", "yes", "--vhost", "no"];
    let server = cx.serve().args(doors).name("disk").arg(spec).start()?;
    files.device = server.block_device()?;
    Ok((server, files))
}

/// Serves an image through the ublk door and does as [`add_files_to_disk`] on `/dev/ublkbN`.
fn serve_and_add_files(cx: &Context) -> Result<()> {
    let (server, files) = serve_image(cx)?;
    let new = files.add(cx)?;
    server.stop()?;
    cx.reply(&new)
}

/// Serves an image through the ublk door and compares its files.
fn serve_and_check_files(cx: &Context) -> Result<()> {
    let (server, files) = serve_image(cx)?;
    images::fsck(&files.device)?;
    files.check(cx)?;
    server.stop().map(drop)
}
