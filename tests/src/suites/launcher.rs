//! The upgrade as users of QEMU have it: the launcher, and the recipes of `qemu-config/`,
//! with a stock QEMU on a `/dev/ublkbN`.

mod common;
mod live;
mod monitor;
mod moves;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;
use rustix::process::Signal;

pub(super) use self::common::{
    boot, child_of, expect, expect_written, launcher, linux, recipe, serve, serve_file,
    write_sector,
};
use self::common::{command, expect_refusal, second_sector};
use crate::kernel::Kernel;
use crate::kit::boot_sector::{self, OPTIONS, SECTOR_BYTES};
use crate::test::{Context, Place, Test};
use crate::{skip, test};
use testkit::images;
use testkit::server::Server;
use testkit::shell::sh;
use testkit::wait::until;
use testkit::{proc, process};

/// The table.
pub const TESTS: &[Test] = &[
    test!(the_raw_recipe_upgrades_an_unmodified_qemu_by_path_alone),
    test!(the_launcher_boots_from_the_disk_and_its_claim_and_cache_are_right),
    test!(the_launcher_goes_by_the_registry_where_the_kernel_knows_nothing),
    test!(qemu_comes_back_to_a_server_that_was_started_again),
    test!(without_a_service_qemu_gets_the_block_device),
    test!(without_a_service_the_raw_recipe_ends_and_the_launcher_goes_on),
    test!(a_mounted_disk_is_refused_by_name_of_the_mount),
    test!(two_disks_are_upgraded_and_the_second_boots),
    test!(the_printed_command_runs_in_a_shell),
    test!(the_recipes_of_a_pc_take_a_kernel_too),
    test!(signals_reach_qemu_and_its_end_is_told),
    test!(a_second_launcher_is_refused),
    test!(live::microvms_upgrade_through_recipe_and_launcher).limit_s(240),
    test!(live::a_running_guest_moves_to_the_service_and_back_to_the_host_without_losing_a_byte)
        .limit_s(240),
    test!(live::a_disk_is_plugged_into_a_running_guest).limit_s(240),
    test!(moves::a_monitor_gets_no_disk_that_its_process_does_not_have),
    test!(moves::a_move_that_is_cut_off_is_undone),
];

/// On a host whose kernel knows nothing of all this. There the block devices are loop devices.
pub const STOCK_KERNEL_TESTS: &[Test] = &[
    test!(the_launcher_goes_by_the_registry_where_the_kernel_knows_nothing),
    test!(qemu_comes_back_to_a_server_that_was_started_again),
    test!(without_a_service_the_raw_recipe_ends_and_the_launcher_goes_on),
    test!(moves::a_monitor_gets_no_disk_that_its_process_does_not_have),
    test!(moves::a_move_that_is_cut_off_is_undone),
    test!(live::a_disk_moves_by_the_registry_and_back).limit_s(480),
];

fn number_of(device: &Path) -> Result<(u32, u32, u64)> {
    let number = fs::metadata(device)?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let sequence = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/diskseq"))?;
    Ok((major, minor, sequence.trim().parse()?))
}

fn the_raw_recipe_upgrades_an_unmodified_qemu_by_path_alone(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.block_device()?;
    let mut raw = recipe(cx, "raw.sh");
    let guest = boot(cx, raw.env("DEVICE", &device).args(OPTIONS))?;
    ensure!(cx.stat("disk")?["access"] == "upgraded");
    guest.write_and_end()?;
    sh(&format!("blockdev --flushbufs {}", device.display())).run()?;
    expect_written(&device)?;
    served.stop().map(drop)
}

fn the_launcher_boots_from_the_disk_and_its_claim_and_cache_are_right(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.block_device()?;
    // What makes the disk bootable is in the page cache only when QEMU comes, and a writer stays, or
    // the kernel itself would write it out.
    let writer = OpenOptions::new().write(true).open(&device)?;
    writer.write_all_at(&[0; SECTOR_BYTES], 0)?;
    writer.sync_all()?;
    writer.write_all_at(&boot_sector::sector(), 0)?;
    let mut launcher = recipe(cx, "launcher-q35.sh");
    let guest = boot(cx, launcher.env("DEVICE", &device).args(OPTIONS))?;
    ensure!(cx.stat("disk")?["access"] == "upgraded");
    // A reader fills the page cache with what the guest will overwrite, and stays: the kernel itself
    // drops the cache when the last one leaves.
    let _reader = File::open(&device)?;
    ensure!(
        second_sector(&device)? == vec![0; SECTOR_BYTES],
        "sector 1 is not empty"
    );
    let claim = OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(OFlags::EXCL.bits())?)
        .open(&device);
    ensure!(
        claim.is_err_and(|error| error.raw_os_error() == Some(16)),
        "the disk is not claimed while QEMU uses it"
    );
    guest.write_and_end()?;
    expect_written(&device)?;
    served.stop().map(drop)
}

/// An image of 8 MiB with the boot sector.
fn image(cx: &Context) -> Result<PathBuf> {
    let image = cx.image(8 << 20)?;
    write_sector(&image)?;
    Ok(image)
}

/// A loop device on `image` and its end.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(cx: &Context, image: &Path) -> Result<Self> {
        if cx.place == Place::Host && !rustix::process::geteuid().is_root() {
            skip!("a loop device needs root");
        }
        let made = sh(&format!("losetup -f --show {}", image.display())).run()?;
        Ok(LoopDevice(made.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = sh(&format!("losetup -d {}", self.0.display())).run();
        if let Err(error) = detached {
            eprintln!("{error:#}");
        }
    }
}

/// A loop device has no service in the kernel, so a client goes on to the registry, where the
/// server of the same image has an entry for it.
fn serve_loop(cx: &Context, image: &Path, disk: &LoopDevice) -> Result<Server> {
    let run = cx.run_dir();
    let server = cx
        .serve()
        .ublk("no")
        .arg(format!("disk=file:{}", image.display()))
        .start()?;
    let (major, minor, sequence) = number_of(&disk.0)?;
    let folder = run.join(format!("fd-upgrade/blk-{major}-{minor}-{sequence}"));
    fs::create_dir_all(&folder)?;
    let entry = folder.join("vhost-user-blk");
    if entry.exists() {
        fs::remove_file(&entry)?;
    }
    fs::hard_link(run.join("exports/disk/vhost-user-blk"), entry)?;
    Ok(server)
}

fn the_launcher_goes_by_the_registry_where_the_kernel_knows_nothing(cx: &Context) -> Result<()> {
    let image = image(cx)?;
    let disk = LoopDevice::new(cx, &image)?;
    let served = serve_loop(cx, &image, &disk)?;
    let path = disk.0.to_string_lossy().into_owned();
    let said = cx.ublkup(&["probe", &path]).finish()?;
    expect(&said, 0, "by the registry route")?;
    let asked = [&format!("{path},bootindex=0"), "--require-upgrade"];
    let guest = boot(cx, &mut launcher(cx, &asked))?;
    ensure!(cx.stat("disk")?["access"] == "upgraded");
    guest.write_and_end()?;
    served.stop()?;
    // The image, not the loop device, which has a cache of the file in between.
    expect_written(&image)
}

/// With a block device that outlives the server, which a loop device does.
fn qemu_comes_back_to_a_server_that_was_started_again(cx: &Context) -> Result<()> {
    let image = image(cx)?;
    let disk = LoopDevice::new(cx, &image)?;
    let served = serve_loop(cx, &image, &disk)?;
    let path = format!("{},bootindex=0", disk.0.display());
    let guest = boot(cx, &mut launcher(cx, &[&path]))?;
    served.kill()?;
    let served = serve_loop(cx, &image, &disk)?;
    cx.expect_access("upgraded")?;
    guest.write_and_end()?;
    served.stop()?;
    expect_written(&image)
}

fn without_a_service_qemu_gets_the_block_device(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &["--vhost", "no"])?;
    let device = served.block_device()?;
    let disk = format!("{},bootindex=0", device.display());
    let mut strict = launcher(cx, &["--require-upgrade", &disk]);
    expect_refusal(&mut strict, 3, "no server offers this service")?;
    let guest = boot(cx, &mut launcher(cx, &[&disk]))?;
    guest.write_and_end()?;
    expect_written(&device)?;
    served.stop().map(drop)
}

/// Whatever kind of "no" the kernel says: it knows no fd addresses, or no service of a loop device.
fn without_a_service_the_raw_recipe_ends_and_the_launcher_goes_on(cx: &Context) -> Result<()> {
    let image = image(cx)?;
    let disk = LoopDevice::new(cx, &image)?;
    let mut raw = recipe(cx, "raw.sh");
    raw.env("DEVICE", &disk.0)
        .env("RECONNECT", "")
        .args(OPTIONS);
    expect_refusal(&mut raw, 1, "Failed to connect to '/dev/self/fd/9/")?;
    let asked = format!("{},bootindex=0", disk.0.display());
    let guest = boot(cx, &mut launcher(cx, &[&asked]))?;
    guest.write_and_end()?;
    expect_written(&disk.0)
}

fn a_mounted_disk_is_refused_by_name_of_the_mount(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.block_device()?;
    sh(&format!("mkfs.ext4 -q -F {}", device.display())).run()?;
    let mounted = images::mount_ext4(&device, &cx.scratch().join("mnt"), false)?;
    let cause = format!("mounted at {}", mounted.dir().display());
    let path = device.to_string_lossy();
    expect_refusal(&mut launcher(cx, &[&path]), 1, &cause)?;
    mounted.unmount()?;
    served.stop().map(drop)
}

fn two_disks_are_upgraded_and_the_second_boots(cx: &Context) -> Result<()> {
    let served = serve(cx, &["data", "system"], &[])?;
    let devices = served.block_devices();
    ensure!(devices.len() == 2, "{devices:?}");
    let mut several = recipe(cx, "several-disks.sh");
    several
        .env("DATA", &devices[0])
        .env("SYSTEM", &devices[1])
        .env("SHARED", cx.scratch())
        .args(OPTIONS);
    let guest = boot(cx, &mut several)?;
    for name in ["data", "system"] {
        let stat = cx.stat(name)?;
        ensure!(stat["vhost"]["sessions"].as_array().map(Vec::len) == Some(1));
    }
    guest.write_and_end()?;
    expect_written(&devices[1])?;
    ensure!(
        second_sector(&devices[0])? != boot_sector::sector(),
        "the guest wrote to the wrong disk"
    );
    served.stop().map(drop)
}

fn the_printed_command_runs_in_a_shell(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.block_device()?;
    let disk = format!("{},bootindex=0", device.display());
    let printed = launcher(cx, &["--print", &disk]).output()?;
    ensure!(printed.status.success(), "{printed:?}");
    let line = String::from_utf8(printed.stdout)?;
    ensure!(
        line.trim_end()
            .ends_with(&format!(" 3<>{}", device.display()))
            && line.contains("path=/dev/self/fd/3/vhost-user-blk"),
        "{line}"
    );
    let guest = boot(cx, command(cx, "sh").args(["-c", &line]))?;
    ensure!(cx.stat("disk")?["access"] == "upgraded");
    guest.write_and_end()?;
    served.stop().map(drop)
}

/// QEMU's `-kernel` has a boot index of its own.
fn the_recipes_of_a_pc_take_a_kernel_too(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let kernel = cx.paths.kernel(Kernel::X86)?;
    for name in ["raw.sh", "launcher-q35.sh"] {
        let socket = cx.scratch().join(format!("{name}.qmp"));
        let mut recipe = recipe(cx, name);
        recipe
            .env("DEVICE", served.block_device()?)
            .args(["-nodefaults", "-display", "none", "-S", "-kernel"])
            .arg(kernel)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()));
        let mut qemu = process::spawn_bound(&mut recipe)?;
        until("QEMU listens", cx.patience(30), || {
            ensure!(qemu.try_wait()?.is_none(), "{name}: QEMU ended");
            proc::is_listened_on(&socket)
        })?;
        let quit = "{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"quit\"}";
        live::monitor_says(cx, &socket, quit).context(name)?;
        let status = process::wait_limited(&mut qemu, cx.patience(30))?;
        ensure!(
            status.is_some_and(|status| status.success()),
            "{name}: {status:?}"
        );
    }
    served.stop().map(drop)
}

fn signals_reach_qemu_and_its_end_is_told(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let disk = format!("{},bootindex=0", served.block_device()?.display());
    let mut guest = boot(cx, &mut launcher(cx, &[&disk]))?;
    process::signal(guest.process(), Signal::TERM)?;
    let status = guest.wait()?;
    // QEMU takes SIGTERM for the power button of its own: it ends in good order.
    ensure!(status.code() == Some(0), "after SIGTERM: {status}");
    drop(guest);

    let mut guest = boot(cx, &mut launcher(cx, &[&disk]))?;
    let launcher = guest.process().id();
    rustix::process::kill_process(child_of(launcher)?, Signal::KILL)?;
    let status = guest.wait()?;
    ensure!(status.code() == Some(137), "after SIGKILL: {status}");
    served.stop().map(drop)
}

fn a_second_launcher_is_refused(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.block_device()?;
    let disk = format!("{},bootindex=0", device.display());
    let guest = boot(cx, &mut launcher(cx, &[&disk]))?;
    expect_refusal(&mut launcher(cx, &[&disk]), 1, "claimed exclusively")?;
    drop(guest);
    let path = device.to_string_lossy();
    expect_refusal(&mut launcher(cx, &[&path, &path]), 2, "given twice")?;
    served.stop()?;

    // The raw recipe takes no claim; there the server turns the second client away.
    let served = serve(cx, &["disk"], &[])?;
    let device = served.block_device()?;
    let mut raw = recipe(cx, "raw.sh");
    let guest = boot(cx, raw.env("DEVICE", &device).args(OPTIONS))?;
    expect_refusal(
        &mut launcher(cx, &[&format!("{},bootindex=0", device.display())]),
        1,
        "another client has the disk",
    )?;
    drop(guest);
    served.stop().map(drop)
}
