//! The ublk door, from inside a kernel with ublk.

mod life;

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use testkit::images::{self, KnownFiles};
use testkit::server::{Serve, Server};
use testkit::shell::sh;

use super::io::{Exercise, all_kinds_came, open_direct, write_direct};
use super::own_tests;
use crate::kit::sysfs::Sysfs;
use crate::test;
use crate::test::{Context, Test};

const MIB: u64 = 1 << 20;

/// cargo's test programs, for every guest.
pub const DRIVER_TESTS: &[Test] = &[
    test!(the_block_doors_own_tests_pass, |cx| {
        own_tests::pass_ignored(cx, "ublk", &[])?;
        nothing_left(cx)
    })
    .limit_s(600),
    test!(the_registrys_tests_that_need_root_pass, |cx| {
        own_tests::pass_ignored(cx, "registry", &[])
    }),
    test!(the_file_backends_tests_that_need_loop_devices_pass, |cx| {
        own_tests::pass_ignored(cx, "file", &[])
    }),
    test!(a_queue_thread_cannot_leave_the_sandbox, |cx| {
        own_tests::pass_all(cx, "sandbox", &[])
    }),
    test!(a_disks_upgrade_passes_its_tests_by_the_kernels_way, |cx| {
        upgrade_scratch_disk(cx, "kernel")
    })
    .limit_s(120),
    test!(
        a_disks_upgrade_passes_its_tests_by_the_registrys_way,
        |cx| { upgrade_scratch_disk(cx, "registry") }
    )
    .limit_s(120),
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
    test!(life::a_disk_that_is_only_open_is_stopped_when_it_is_closed),
];

/// For guests with several processors.
pub const SMP_TESTS: &[Test] = &[test!(verified_io_on_several_queues).limit_s(400)];

fn serve(cx: &Context, spec: &str) -> Serve {
    cx.serve().ublk("yes").name("disk").arg(spec)
}

/// No device, no folder.
fn nothing_left(cx: &Context) -> Result<()> {
    let devices = sh("ls /dev | grep ublk[bc] || :").run()?;
    ensure!(devices.is_empty(), "devices are left: {devices}");
    let exports = cx.run_dir().join("exports");
    let left = fs::read_dir(&exports).map_or(0, Iterator::count);
    ensure!(left == 0, "{} has {left} folders left", exports.display());
    Ok(())
}

fn exercise(cx: &Context, server: Server, exercise: &Exercise) -> Result<()> {
    exercise.run(cx)?;
    all_kinds_came(&cx.stat("disk")?["ublk"])?;
    server.stop()?;
    nothing_left(cx)
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
    let serve = cx.serve().under(without_dev);
    let (status, said) = serve.ublk("yes").arg("mem:1M").launch()?.wait()?;
    ensure!(status.code() == Some(1), "{status}: {said}");
    ensure!(said.contains("modprobe ublk_drv"), "{said}");
    // Left to itself it opens the other door, and says once, not per export, what is missing.
    let serve = cx.serve().under(without_dev);
    let log = serve.arg("a=mem:1M").arg("b=mem:1M").start()?.stop()?;
    ensure!(log.matches("modprobe").count() == 1, "{log}");
    nothing_left(cx)
}

/// The scratch disk is a file behind the page cache: one of the tests needs a disk with something
/// to flush, which memory has not.
fn upgrade_scratch_disk(cx: &Context, way: &str) -> Result<()> {
    let spec = format!("{},cache=buffered", cx.file(64 * MIB)?);
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

fn verified_io_on_a_file_in_tmpfs(cx: &Context) -> Result<()> {
    // No multiple of a page.
    let size_bytes = 96 * MIB + 512;
    let spec = format!("{},cache=buffered", cx.file(size_bytes)?);
    let server = serve(cx, &spec).start()?;
    let disk = server.block_device()?;
    ensure!(Sysfs::of(&disk)?.size_bytes()? == size_bytes);
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
    File::create(&path)?.set_len(96 * MIB)?;
    let server = serve(cx, &format!("file:{},cache=direct", path.display())).start()?;
    let disk = server.block_device()?;
    let mut plan = Exercise::new(&disk, 96 * MIB);
    plan.block_bytes = Sysfs::of(&disk)?.number("queue/logical_block_size")?;
    exercise(cx, server, &plan)
}

fn verified_io_on_a_block_device_with_4_kib_sectors(cx: &Context) -> Result<()> {
    let backing = cx.image(96 * MIB)?;
    let attach = format!(
        "losetup --find --show --sector-size 4096 {}",
        backing.display()
    );
    let device = sh(&attach).run()?.trim().to_owned();
    let result = (|| {
        let server = serve(cx, &format!("file:{device}")).start()?;
        let disk = server.block_device()?;
        ensure!(Sysfs::of(&disk)?.number("queue/logical_block_size")? == 4096);
        let small = open_direct(&disk).and_then(|disk| write_direct(&disk, 512, &[1; 512]));
        ensure!(small.is_err(), "less than a sector was written");
        let mut plan = Exercise::new(&disk, 96 * MIB);
        plan.block_bytes = 4096;
        exercise(cx, server, &plan)
    })();
    sh(&format!("losetup --detach {device}")).run()?;
    result
}

fn verified_io_on_several_queues(cx: &Context) -> Result<()> {
    for queues in 1..=4 {
        let serve = serve(cx, &cx.file(96 * MIB)?);
        let server = serve.args(["--queues", &queues.to_string()]).start()?;
        let disk = server.block_device()?;
        let processors = thread::available_parallelism()?.get();
        ensure!(Sysfs::of(&disk)?.queues()? == queues.min(processors));
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
    ensure!(Sysfs::of(&disk)?.number("ro")? == 1);
    ensure!(
        open_direct(&disk)
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
    let storage = format!("lower={}", cx.file(64 * MIB)?);
    let lower = cx.serve().ublk("yes").arg(storage).start()?;
    let lower_disk = lower.block_device()?;
    let upper = serve(cx, &format!("file:{}", lower_disk.display())).start()?;
    let disk = upper.block_device()?;
    let count = |what: &str| -> Result<u64> {
        let count = &cx.stat("lower")?["ublk"]["counters"][what];
        (count.as_u64()).with_context(|| format!("no count of {what}"))
    };
    let before = count("flushes")?;
    let dd = |how: &str| {
        let disk = disk.display();
        sh(&format!(
            "dd if=/dev/zero of={disk} bs=4k status=none {how}"
        ))
        .run()
    };
    dd("count=1 oflag=direct")?;
    ensure!(count("flushes")? == before, "a plain write flushed");
    ensure!(count("forced_writes")? == 0, "a plain write was forced");
    dd("count=1 oflag=direct conv=fsync")?;
    ensure!(count("flushes")? > before, "fsync flushed nothing");
    // O_DSYNC with O_DIRECT is a forced write (FUA) from the file system's view down to the disk.
    dd("count=8 oflag=direct,dsync")?;
    ensure!(count("forced_writes")? >= 8);
    upper.stop()?;
    lower.stop()?;
    nothing_left(cx)
}
