//! Steps that tests run in machines they boot themselves.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use testkit::images::{self, KnownFiles};
use testkit::random::Random;
use testkit::server::Server;
use testkit::shell::sh;

use super::io::{Exercise, open_direct, write_direct};
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
    let switch = format!("/sys/block/{name}/cache_type");
    std::fs::write(&switch, "write through").with_context(|| format!("cannot write {switch}"))?;
    let seen = std::fs::read_to_string(&switch)?;
    ensure!(
        seen.trim() == "write through",
        "the cache is still on: {seen}"
    );
    let disk = open_direct(&PathBuf::from("/dev").join(name))?;
    for block in 0..WRITE_THROUGH_BLOCKS {
        let data = write_through_data(block);
        write_direct(&disk, block * WRITE_THROUGH_BLOCK_BYTES as u64, &data)?;
    }
    Ok(())
}

/// For [`serve_and_add_files`] and [`serve_and_check_files`].
#[derive(Debug, Serialize, Deserialize)]
pub struct FilesInImage {
    /// Name of the image in the exchange directory.
    pub image: String,
    /// What must be in it.
    pub known: KnownFiles,
    /// For new files.
    pub seed: u64,
}

fn serve_image(cx: &Context, image: &str) -> Result<Server> {
    cx.serve()
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .ublk("yes")
        .arg("--vhost")
        .arg("no")
        .arg(format!("disk=file:{}", cx.exchange().join(image).display()))
        .start()
}

/// Serves an image through the ublk door, mounts `/dev/ublkbN`, compares its files, writes new
/// ones, unmounts, checks; replies with the new files.
fn serve_and_add_files(cx: &Context) -> Result<()> {
    let files: FilesInImage = cx.args()?;
    let server = serve_image(cx, &files.image)?;
    let device = server.block_device()?;
    let mounted = images::mount_ext4(&device, &cx.scratch().join("mnt"), false)?;
    files.known.verify(mounted.dir())?;
    let new = KnownFiles::generate(mounted.dir(), files.seed)?;
    mounted.unmount()?;
    images::fsck(&device)?;
    server.stop()?;
    cx.reply(&new)
}

/// Serves an image through the ublk door, mounts it and compares its files.
fn serve_and_check_files(cx: &Context) -> Result<()> {
    let files: FilesInImage = cx.args()?;
    let server = serve_image(cx, &files.image)?;
    let device = server.block_device()?;
    images::fsck(&device)?;
    let mounted = images::mount_ext4(&device, &cx.scratch().join("mnt"), true)?;
    files.known.verify(mounted.dir())?;
    mounted.unmount()?;
    server.stop()?;
    Ok(())
}
