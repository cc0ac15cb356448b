//! The ublk door, from inside a kernel with ublk.

mod life;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use testkit::images::{self, KnownFiles};
use testkit::server::{Serve, Server};
use testkit::shell::{Shell, sh};

use super::io::{Exercise, open_direct, write_direct};
use super::own_tests;
use crate::test;
use crate::test::{Context, Test};

const MIB: u64 = 1 << 20;

/// cargo's test programs, for every guest.
pub const DRIVER_TESTS: &[Test] = &[
    test!(the_block_doors_own_tests_pass).limit_s(600),
    test!(the_registrys_tests_that_need_root_pass),
    test!(the_file_backends_tests_that_need_loop_devices_pass),
    test!(a_disks_upgrade_passes_its_tests_by_the_kernels_way).limit_s(120),
    test!(a_disks_upgrade_passes_its_tests_by_the_registrys_way).limit_s(120),
];

/// For every guest.
pub const TESTS: &[Test] = &[
    test!(verified_io_on_memory).limit_s(300),
    test!(verified_io_on_a_file_in_tmpfs).limit_s(300),
    test!(verified_io_on_a_file_in_ext4_around_the_page_cache).limit_s(300),
    test!(verified_io_on_a_block_device_with_4_kib_sectors).limit_s(300),
    test!(a_file_system_is_made_mounted_and_checked),
    test!(a_read_only_disk_refuses_writes),
    test!(flushes_and_forced_writes_reach_the_storage),
    test!(without_a_driver_the_block_door_says_what_to_load),
    test!(life::an_id_in_use_is_told),
    test!(life::a_user_without_rights_is_told),
    test!(life::a_mounted_disk_is_not_served),
    test!(life::stopping_under_load_ends_the_io_and_leaves_nothing),
    test!(life::a_killed_server_is_followed_by_one_of_the_same_name),
    test!(life::a_device_removed_behind_our_back_leaves_the_other_door_open),
    test!(life::several_exports_come_and_go_without_each_other).limit_s(120),
];

/// For guests with several processors.
pub const SMP_TESTS: &[Test] = &[test!(verified_io_on_several_queues).limit_s(400)];

fn serve(cx: &Context, spec: &str) -> Serve {
    cx.serve()
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .ublk("yes")
        .arg("--name")
        .arg("disk")
        .arg(spec)
}

fn ublkup(cx: &Context, args: &[&str]) -> Shell {
    Shell::new(&cx.paths.server)
        .args(args)
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
}

/// No device, no folder.
fn nothing_left(cx: &Context) -> Result<()> {
    let devices = sh("ls /dev | grep ublk[bc] || :").run()?;
    ensure!(devices.is_empty(), "devices are left: {devices}");
    let exports = cx.scratch().join("run/exports");
    let left = fs::read_dir(&exports).map_or(0, Iterator::count);
    ensure!(left == 0, "{} has {left} folders left", exports.display());
    Ok(())
}

fn exercise(cx: &Context, server: Server, exercise: &Exercise) -> Result<()> {
    exercise.run(cx)?;
    let stat = ublkup(cx, &["stat", "disk", "--json"]).run()?;
    let stat: serde_json::Value = serde_json::from_str(&stat)?;
    let counters = &stat["ublk"]["counters"];
    for what in ["reads", "writes", "discards", "write_zeroes"] {
        ensure!(
            counters[what].as_u64() > Some(0),
            "no {what} reached the server: {counters}"
        );
    }
    ensure!(counters["errors"] == 0, "requests failed: {counters}");
    server.stop()?;
    nothing_left(cx)
}

fn the_block_doors_own_tests_pass(cx: &Context) -> Result<()> {
    own_tests::pass_ignored(cx, "ublk", &[])?;
    nothing_left(cx)
}

fn the_registrys_tests_that_need_root_pass(cx: &Context) -> Result<()> {
    own_tests::pass_ignored(cx, "registry", &[])
}

fn the_file_backends_tests_that_need_loop_devices_pass(cx: &Context) -> Result<()> {
    own_tests::pass_ignored(cx, "file", &[])
}

/// Every guest has a driver; here it is out of sight.
fn without_a_driver_the_block_door_says_what_to_load(cx: &Context) -> Result<()> {
    let without_dev = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs none /dev && exec \"$0\" \"$@\"",
    ];
    let run = cx.scratch().join("run");
    let serve = cx
        .serve()
        .under(without_dev)
        .env("UBLKUP_RUNTIME_DIR", &run);
    let (status, said) = serve.ublk("yes").arg("mem:1M").launch()?.wait()?;
    ensure!(status.code() == Some(1), "{status}: {said}");
    ensure!(said.contains("modprobe ublk_drv"), "{said}");
    // Left to itself it opens the other door, and says once, not per export, what is missing.
    let serve = cx
        .serve()
        .under(without_dev)
        .env("UBLKUP_RUNTIME_DIR", &run);
    let log = serve.arg("a=mem:1M").arg("b=mem:1M").start()?.stop()?;
    ensure!(log.matches("modprobe").count() == 1, "{log}");
    nothing_left(cx)
}

fn a_disks_upgrade_passes_its_tests_by_the_kernels_way(cx: &Context) -> Result<()> {
    upgrade_scratch_disk(cx, "kernel")
}

fn a_disks_upgrade_passes_its_tests_by_the_registrys_way(cx: &Context) -> Result<()> {
    upgrade_scratch_disk(cx, "registry")
}

/// The scratch disk is a file behind the page cache: one of the tests needs a disk with something
/// to flush, which memory has not.
fn upgrade_scratch_disk(cx: &Context, way: &str) -> Result<()> {
    let path = cx.scratch().join("disk.img");
    image(&path, 64 * MIB)?;
    let spec = format!("file:{},cache=buffered", path.display());
    let server = serve(cx, &spec).arg("--vhost").arg("no").start()?;
    let disk = server.block_device()?.display().to_string();
    let env = [
        ("UPGRADE_TEST_DEVICE", disk.as_str()),
        ("UPGRADE_TEST_WAY", way),
    ];
    own_tests::pass_ignored(cx, "block", &env)?;
    server.stop()?;
    nothing_left(cx)
}

fn verified_io_on_memory(cx: &Context) -> Result<()> {
    let server = serve(cx, "mem:128M").start()?;
    let disk = server.block_device()?;
    exercise(cx, server, &Exercise::new(&disk, 128 * MIB))
}

fn image(path: &Path, size_bytes: u64) -> Result<()> {
    fs::File::create(path)
        .and_then(|file| file.set_len(size_bytes))
        .with_context(|| format!("cannot make {}", path.display()))
}

fn verified_io_on_a_file_in_tmpfs(cx: &Context) -> Result<()> {
    // No multiple of a page.
    let size_bytes = 96 * MIB + 512;
    let path = cx.scratch().join("disk.img");
    image(&path, size_bytes)?;
    let server = serve(cx, &format!("file:{},cache=buffered", path.display())).start()?;
    let disk = server.block_device()?;
    let seen = sh(&format!("blockdev --getsize64 {}", disk.display())).run()?;
    ensure!(seen.trim() == size_bytes.to_string(), "{seen} bytes");
    exercise(cx, server, &Exercise::new(&disk, size_bytes))
}

/// A file system on a loop device, unmounted and detached when dropped.
pub(super) struct LoopMount {
    pub(super) dir: PathBuf,
}

impl LoopMount {
    pub(super) fn ext4(cx: &Context, size_bytes: u64) -> Result<Self> {
        let backing = cx.scratch().join("backing.img");
        images::make_ext4(&backing, size_bytes, None)?;
        let dir = cx.scratch().join("ext4");
        fs::create_dir(&dir)?;
        let (backing, mount) = (backing.display(), dir.display());
        sh(&format!("mount -o loop {backing} {mount}")).run()?;
        Ok(Self { dir })
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        if let Err(error) = sh(&format!("umount {}", self.dir.display())).run() {
            eprintln!("{error:#}");
        }
    }
}

fn verified_io_on_a_file_in_ext4_around_the_page_cache(cx: &Context) -> Result<()> {
    let mount = LoopMount::ext4(cx, 256 * MIB)?;
    let path = mount.dir.join("disk.img");
    image(&path, 96 * MIB)?;
    let server = serve(cx, &format!("file:{},cache=direct", path.display())).start()?;
    let disk = server.block_device()?;
    let mut plan = Exercise::new(&disk, 96 * MIB);
    plan.block_bytes = block_bytes(&disk)?;
    exercise(cx, server, &plan)
}

fn block_bytes(disk: &Path) -> Result<u64> {
    let text = sh(&format!("blockdev --getss {}", disk.display())).run()?;
    text.trim()
        .parse()
        .with_context(|| format!("no block size: {text}"))
}

fn verified_io_on_a_block_device_with_4_kib_sectors(cx: &Context) -> Result<()> {
    let backing = cx.scratch().join("backing.img");
    image(&backing, 96 * MIB)?;
    let attach = format!(
        "losetup --find --show --sector-size 4096 {}",
        backing.display()
    );
    let device = sh(&attach).run()?.trim().to_owned();
    let result = (|| {
        let server = serve(cx, &format!("file:{device}")).start()?;
        let disk = server.block_device()?;
        ensure!(
            block_bytes(&disk)? == 4096,
            "512-byte sectors on a 4 KiB disk"
        );
        let small = open_direct(&disk).and_then(|disk| write_direct(&disk, 512, &[1; 512]));
        ensure!(
            small.is_err(),
            "a request smaller than a sector went through"
        );
        let mut plan = Exercise::new(&disk, 96 * MIB);
        plan.block_bytes = 4096;
        exercise(cx, server, &plan)
    })();
    sh(&format!("losetup --detach {device}")).run()?;
    result
}

fn verified_io_on_several_queues(cx: &Context) -> Result<()> {
    for queues in 1..=4 {
        let path = cx.scratch().join("disk.img");
        image(&path, 96 * MIB)?;
        let spec = format!("file:{}", path.display());
        let server = serve(cx, &spec)
            .arg("--queues")
            .arg(queues.to_string())
            .start()?;
        let disk = server.block_device()?;
        let name = disk
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let mq = format!("/sys/block/{name}/mq");
        let seen = fs::read_dir(&mq).with_context(|| mq.clone())?.count();
        let processors = thread::available_parallelism()?.get();
        ensure!(
            seen == queues.min(processors),
            "{seen} queues instead of {queues}"
        );
        let mut plan = Exercise::new(&disk, 96 * MIB);
        plan.depths = vec![16];
        exercise(cx, server, &plan)?;
    }
    Ok(())
}

fn a_file_system_is_made_mounted_and_checked(cx: &Context) -> Result<()> {
    let server = serve(cx, "mem:128M").start()?;
    let disk = server.block_device()?;
    sh(&format!("mkfs.ext4 -q {}", disk.display())).run()?;
    let mounted = images::mount_ext4(&disk, &cx.scratch().join("mnt"), false)?;
    let known = KnownFiles::generate(mounted.dir(), 7)?;
    mounted.unmount()?;
    images::fsck(&disk)?;
    let mounted = images::mount_ext4(&disk, &cx.scratch().join("mnt"), true)?;
    known.verify(mounted.dir())?;
    mounted.unmount()?;
    server.stop()?;
    nothing_left(cx)
}

fn a_read_only_disk_refuses_writes(cx: &Context) -> Result<()> {
    let path = cx.scratch().join("disk.ext4");
    let known = images::ext4_with_known_files(&path, 64 * MIB, 3)?;
    let spec = format!("file:{}", path.display());
    let server = serve(cx, &spec).arg("--read-only").start()?;
    let disk = server.block_device()?;
    let read_only = sh(&format!("blockdev --getro {}", disk.display())).run()?;
    ensure!(read_only.trim() == "1", "the kernel takes it for writable");
    ensure!(
        fs::OpenOptions::new()
            .write(true)
            .open(&disk)
            .and_then(|f| f.sync_all())
            .is_err()
            || open_direct(&disk)
                .and_then(|disk| write_direct(&disk, 0, &[1; 4096]))
                .is_err(),
        "a write went through"
    );
    let mounted = images::mount_ext4(&disk, &cx.scratch().join("mnt"), true)?;
    known.verify(mounted.dir())?;
    mounted.unmount()?;
    server.stop()?;
    nothing_left(cx)
}

/// Two servers, one on top of the other's disk: what the upper one asks of its storage is counted
/// by the lower one.
fn flushes_and_forced_writes_reach_the_storage(cx: &Context) -> Result<()> {
    let path = cx.scratch().join("disk.img");
    image(&path, 64 * MIB)?;
    let lower = cx
        .serve()
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .ublk("yes")
        .arg(format!("lower=file:{}", path.display()))
        .start()?;
    let lower_disk = lower.block_device()?;
    let upper = serve(cx, &format!("file:{}", lower_disk.display())).start()?;
    let disk = upper.block_device()?;
    let count = |what: &str| -> Result<u64> {
        let stat = ublkup(cx, &["stat", "lower", "--json"]).run()?;
        let stat: serde_json::Value = serde_json::from_str(&stat)?;
        let count = &stat["ublk"]["counters"][what];
        count
            .as_u64()
            .with_context(|| format!("no count of {what}"))
    };
    let device = disk.display();
    let before = count("flushes")?;
    sh(&format!(
        "dd if=/dev/zero of={device} bs=4k count=1 oflag=direct status=none"
    ))
    .run()?;
    ensure!(
        count("flushes")? == before,
        "a plain write flushed the storage"
    );
    ensure!(
        count("forced_writes")? == 0,
        "a plain write was forced to the storage"
    );
    sh(&format!(
        "dd if=/dev/zero of={device} bs=4k count=1 oflag=direct conv=fsync status=none"
    ))
    .run()?;
    ensure!(
        count("flushes")? > before,
        "fsync did not reach the storage"
    );
    // O_DSYNC with O_DIRECT is a forced write (FUA) from the file system's view down to the disk.
    sh(&format!(
        "dd if=/dev/zero of={device} bs=4k count=8 oflag=direct,dsync status=none"
    ))
    .run()?;
    ensure!(
        count("forced_writes")? >= 8,
        "8 synchronous writes, but only {} forced writes at the storage",
        count("forced_writes")?
    );
    upper.stop()?;
    lower.stop()?;
    nothing_left(cx)
}
