//! The upgrade as users of QEMU have it: the launcher, and the recipes of `qemu-config/`,
//! with a stock QEMU on a `/dev/ublkbN`.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal};
use serde_json::Value;

use super::guest::FilesOnDisk;
use crate::kernel::Kernel;
use crate::kit::boot_sector::{self, Guest, OPTIONS, SECTOR_BYTES};
use crate::kit::images::{self, KnownFiles};
use crate::kit::server::{Serve, Server};
use crate::kit::shell::{Finished, Shell, sh};
use crate::machine::{Board, Machine, Qemu};
use crate::process;
use crate::test::{Context, Place, Test};
use crate::{skip, test};

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
    test!(signals_reach_qemu_and_its_end_is_told),
    test!(a_second_launcher_is_refused),
    test!(microvms_upgrade_through_recipe_and_launcher).limit_s(240),
    test!(a_running_guest_moves_to_the_service_and_back_to_the_host_without_losing_a_byte)
        .limit_s(240),
    test!(a_disk_is_plugged_into_a_running_guest).limit_s(240),
];

/// On a host whose kernel knows nothing of all this. There the block devices are loop devices.
pub const STOCK_KERNEL_TESTS: &[Test] = &[
    test!(the_launcher_goes_by_the_registry_where_the_kernel_knows_nothing),
    test!(qemu_comes_back_to_a_server_that_was_started_again),
    test!(without_a_service_the_raw_recipe_ends_and_the_launcher_goes_on),
];

/// A server with a boot sector on its disk, or on each of them.
pub(super) struct Served {
    pub(super) server: Server,
}

/// Serves `names` as memory disks of 8 MiB with block doors.
pub(super) fn serve(cx: &Context, names: &[&str], more: &[&str]) -> Result<Served> {
    let mut serve = Serve::new(cx)
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .ublk("yes")
        .arg("--queues")
        .arg("1");
    for word in more {
        serve = serve.arg(word);
    }
    for name in names {
        serve = serve.arg(format!("{name}=mem:8M"));
    }
    let server = serve.start()?;
    for device in server.block_devices() {
        write_sector(&device)?;
    }
    Ok(Served { server })
}

impl Served {
    pub(super) fn device(&self) -> Result<PathBuf> {
        self.server.block_device()
    }

    pub(super) fn stat(&self, cx: &Context, name: &str) -> Result<Value> {
        let stat = ublkup(cx, &["stat", name, "--json"]).run()?;
        serde_json::from_str(&stat).context("stat is no JSON")
    }

    pub(super) fn stop(self) -> Result<()> {
        let log = self.server.stop()?;
        ensure!(!log.contains("panicked"), "{log}");
        Ok(())
    }
}

pub(super) fn write_sector(device: &Path) -> Result<()> {
    let disk = OpenOptions::new().write(true).open(device)?;
    disk.write_all_at(&boot_sector::sector(), 0)
        .and_then(|()| disk.sync_all())
        .with_context(|| format!("cannot write {}", device.display()))
}

/// Sector 1 through the page cache: what a program on the host sees.
fn second_sector(device: &Path) -> Result<Vec<u8>> {
    let mut sector = vec![0; SECTOR_BYTES];
    File::open(device)
        .and_then(|disk| disk.read_exact_at(&mut sector, SECTOR_BYTES as u64))
        .with_context(|| format!("cannot read {}", device.display()))?;
    Ok(sector)
}

pub(super) fn expect_written(device: &Path) -> Result<()> {
    ensure!(
        second_sector(device)? == boot_sector::sector(),
        "what the guest wrote is not on {}",
        device.display()
    );
    Ok(())
}

pub(super) fn ublkup(cx: &Context, args: &[&str]) -> Shell {
    Shell::new(&cx.paths.server)
        .args(args)
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .limit(cx.patience(30))
}

/// A command that finds `ublkup` and the test's runtime directory.
fn command(cx: &Context, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut path = OsString::from(cx.paths.server.parent().unwrap_or(Path::new(".")));
    path.push(":/usr/sbin:/sbin:");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command
        .env("PATH", path)
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .env("MEMORY", "64M");
    command
}

pub(super) fn recipe(cx: &Context, name: &str) -> Command {
    command(cx, cx.paths.repo.join("qemu-config").join(name))
}

/// `ublkup qemu`, on a PC without much.
pub(super) fn launcher(cx: &Context, args: &[&str]) -> Command {
    let mut launcher = command(cx, &cx.paths.server);
    launcher
        .arg("qemu")
        .args(args)
        .args(["--", "qemu-system-x86_64", "-m", "64"])
        .args(OPTIONS);
    launcher
}

pub(super) fn boot(cx: &Context, command: &mut Command) -> Result<Guest> {
    Guest::boot(command, cx.patience(45))
}

fn number_of(device: &Path) -> Result<(u32, u32, u64)> {
    let number = fs::metadata(device)?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let sequence = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/diskseq"))?;
    Ok((major, minor, sequence.trim().parse()?))
}

pub(super) fn expect(finished: &Finished, code: i32, says: &str) -> Result<()> {
    let said = finished.tail();
    ensure!(
        finished.code() == code && said.contains(says),
        "code {} and {said:?} instead of {code} and {says:?}",
        finished.code()
    );
    Ok(())
}

fn the_raw_recipe_upgrades_an_unmodified_qemu_by_path_alone(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.device()?;
    let mut raw = recipe(cx, "raw.sh");
    let guest = boot(cx, raw.env("DEVICE", &device).args(OPTIONS))?;
    ensure!(
        served.stat(cx, "disk")?["access"] == "upgraded",
        "{}",
        served.stat(cx, "disk")?
    );
    guest.write_and_end()?;
    sh(&format!("blockdev --flushbufs {}", device.display())).run()?;
    expect_written(&device)?;
    served.stop()
}

fn the_launcher_boots_from_the_disk_and_its_claim_and_cache_are_right(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.device()?;
    // What makes the disk bootable is in the page cache only when QEMU comes, and a writer stays, or
    // the kernel itself would write it out.
    let writer = OpenOptions::new().write(true).open(&device)?;
    writer.write_all_at(&[0; SECTOR_BYTES], 0)?;
    writer.sync_all()?;
    writer.write_all_at(&boot_sector::sector(), 0)?;
    let mut launcher = recipe(cx, "launcher-q35.sh");
    let guest = boot(cx, launcher.env("DEVICE", &device).args(OPTIONS))?;
    let stat = served.stat(cx, "disk")?;
    ensure!(stat["access"] == "upgraded", "{stat}");
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
    served.stop()
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

fn image(cx: &Context) -> Result<PathBuf> {
    let image = cx.scratch().join("disk.img");
    File::create(&image)?.set_len(8 << 20)?;
    write_sector(&image)?;
    Ok(image)
}

/// A loop device has no service in the kernel, so a client goes on to the registry, where the
/// server of the same image has an entry for it.
fn serve_loop(cx: &Context, image: &Path, disk: &LoopDevice) -> Result<Served> {
    let run = cx.scratch().join("run");
    let server = Serve::new(cx)
        .env("UBLKUP_RUNTIME_DIR", &run)
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
    Ok(Served { server })
}

fn the_launcher_goes_by_the_registry_where_the_kernel_knows_nothing(cx: &Context) -> Result<()> {
    let image = image(cx)?;
    let disk = LoopDevice::new(cx, &image)?;
    let served = serve_loop(cx, &image, &disk)?;
    let path = disk.0.to_string_lossy().into_owned();
    let said = ublkup(cx, &["probe", &path]).finish()?;
    expect(&said, 0, "by the registry's way")?;
    let asked = [&format!("{path},bootindex=0"), "--require-upgrade"];
    let guest = boot(cx, &mut launcher(cx, &asked))?;
    let stat = served.stat(cx, "disk")?;
    ensure!(stat["access"] == "upgraded", "{stat}");
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
    served.server.kill()?;
    let served = serve_loop(cx, &image, &disk)?;
    let deadline = Instant::now() + cx.patience(20);
    while served.stat(cx, "disk")?["access"] != "upgraded" {
        ensure!(Instant::now() < deadline, "QEMU did not come back");
        std::thread::sleep(Duration::from_millis(50));
    }
    guest.write_and_end()?;
    served.stop()?;
    expect_written(&image)
}

fn without_a_service_qemu_gets_the_block_device(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &["--vhost", "no"])?;
    let device = served.device()?;
    let disk = format!("{},bootindex=0", device.display());
    let mut strict = launcher(cx, &["--require-upgrade", &disk]);
    let refused = strict.output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(3) && said.contains("nobody offers this service"),
        "{refused:?}"
    );
    let guest = boot(cx, &mut launcher(cx, &[&disk]))?;
    guest.write_and_end()?;
    expect_written(&device)?;
    served.stop()
}

/// Whatever kind of "no" the kernel says: it knows no fd addresses, or no service of a loop device.
fn without_a_service_the_raw_recipe_ends_and_the_launcher_goes_on(cx: &Context) -> Result<()> {
    let image = image(cx)?;
    let disk = LoopDevice::new(cx, &image)?;
    let mut raw = recipe(cx, "raw.sh");
    raw.env("DEVICE", &disk.0)
        .env("RECONNECT", "")
        .args(OPTIONS);
    let ended = raw.output()?;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(
        ended.status.code() == Some(1) && said.contains("Failed to connect to '/dev/self/fd/9/"),
        "{ended:?}"
    );
    let asked = format!("{},bootindex=0", disk.0.display());
    let guest = boot(cx, &mut launcher(cx, &[&asked]))?;
    guest.write_and_end()?;
    expect_written(&disk.0)
}

fn a_mounted_disk_is_refused_by_name_of_the_mount(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.device()?;
    sh(&format!("mkfs.ext4 -q -F {}", device.display())).run()?;
    let mounted = images::mount_ext4(&device, &cx.scratch().join("mnt"), false)?;
    let refused = launcher(cx, &[&device.to_string_lossy()]).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    let cause = format!("mounted at {}", mounted.dir().display());
    ensure!(
        refused.status.code() == Some(1) && said.contains(&cause),
        "{refused:?}"
    );
    mounted.unmount()?;
    served.stop()
}

fn two_disks_are_upgraded_and_the_second_boots(cx: &Context) -> Result<()> {
    let served = serve(cx, &["data", "system"], &[])?;
    let devices = served.server.block_devices();
    ensure!(devices.len() == 2, "{devices:?}");
    let mut several = recipe(cx, "several-disks.sh");
    several
        .env("DATA", &devices[0])
        .env("SYSTEM", &devices[1])
        .env("SHARED", cx.scratch())
        .args(OPTIONS);
    let guest = boot(cx, &mut several)?;
    for name in ["data", "system"] {
        let stat = served.stat(cx, name)?;
        ensure!(
            stat["vhost"]["sessions"].as_array().map(Vec::len) == Some(1),
            "{stat}"
        );
    }
    guest.write_and_end()?;
    expect_written(&devices[1])?;
    ensure!(
        second_sector(&devices[0])? != boot_sector::sector(),
        "the guest wrote to the wrong disk"
    );
    served.stop()
}

fn the_printed_command_runs_in_a_shell(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.device()?;
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
    let stat = served.stat(cx, "disk")?;
    ensure!(stat["access"] == "upgraded", "{stat}");
    guest.write_and_end()?;
    served.stop()
}

/// The only child of a process.
pub(super) fn child_of(parent: u32) -> Result<Pid> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        // Others come and go meanwhile.
        let (Some(Ok(pid)), Ok(status)) = (
            name.to_str().map(str::parse::<i32>),
            fs::read_to_string(entry.path().join("status")),
        ) else {
            continue;
        };
        let mut lines = status.lines();
        if lines.any(|line| line.strip_prefix("PPid:").map(str::trim) == Some(&parent.to_string()))
        {
            children.push(pid);
        }
    }
    let [child] = children[..] else {
        bail!("process {parent} has the children {children:?}");
    };
    Pid::from_raw(child).context("no process id")
}

fn signals_reach_qemu_and_its_end_is_told(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let disk = format!("{},bootindex=0", served.device()?.display());
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
    served.stop()
}

fn a_second_launcher_is_refused(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.device()?;
    let disk = format!("{},bootindex=0", device.display());
    let guest = boot(cx, &mut launcher(cx, &[&disk]))?;
    let second = launcher(cx, &[&disk]).output()?;
    let said = String::from_utf8_lossy(&second.stderr);
    ensure!(
        second.status.code() == Some(1) && said.contains("claimed exclusively"),
        "{second:?}"
    );
    drop(guest);
    served.stop()?;

    // The raw recipe takes no claim; there the server turns the second client away.
    let served = serve(cx, &["disk"], &[])?;
    let device = served.device()?;
    let mut raw = recipe(cx, "raw.sh");
    let guest = boot(cx, raw.env("DEVICE", &device).args(OPTIONS))?;
    let second = launcher(cx, &[&format!("{},bootindex=0", device.display())]).output()?;
    let said = String::from_utf8_lossy(&second.stderr);
    ensure!(
        second.status.code() == Some(1) && said.contains("another client has the disk"),
        "{second:?}"
    );
    drop(guest);
    served.stop()
}

/// Linux in QEMU, started by a recipe.
pub(super) fn linux(cx: &Context, name: &str, device: &Path) -> Result<Qemu> {
    let kernel = cx.paths.kernel(Kernel::X86)?;
    let script = cx.paths.repo.join("qemu-config").join(name);
    let settings = recipe(cx, name);
    let mut guest = Qemu::new(kernel)
        .processors(1)
        .memory_mib(384)
        .recipe(&script)
        .env("DEVICE", device);
    for (variable, value) in settings.get_envs() {
        if let Some(value) = value.filter(|_| variable != "MEMORY") {
            guest = guest.env(variable, value);
        }
    }
    Ok(guest)
}

fn files(known: KnownFiles, seed: u64, device: &str) -> FilesOnDisk {
    FilesOnDisk {
        device: device.into(),
        known,
        seed,
    }
}

/// Serves a file as the export `disk` with a block device, which outlives its server.
pub(super) fn serve_file(cx: &Context, image: &Path) -> Result<Served> {
    let server = Serve::new(cx)
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .ublk("yes")
        .args(["--queues", "1", "--reconnect-grace", "120"])
        .arg(format!("disk=file:{}", image.display()))
        .start()?;
    Ok(Served { server })
}

/// An ext4 file system with known files on a block device of 64 MiB.
fn serve_ext4(cx: &Context) -> Result<(Served, KnownFiles)> {
    let image = cx.scratch().join("disk.ext4");
    let known = images::ext4_with_known_files(&image, 64 << 20, 1)?;
    Ok((serve_file(cx, &image)?, known))
}

/// The block device has all the files, as the host sees it.
fn check_on_host(cx: &Context, device: &Path, known: &KnownFiles) -> Result<()> {
    images::fsck(device)?;
    let mounted = images::mount_ext4(device, &cx.scratch().join("host"), true)?;
    known.verify(mounted.dir())?;
    mounted.unmount()
}

fn microvms_upgrade_through_recipe_and_launcher(cx: &Context) -> Result<()> {
    let (served, mut known) = serve_ext4(cx)?;
    let device = served.device()?;
    for (seed, name) in [(2, "raw-microvm.sh"), (3, "launcher-microvm.sh")] {
        let guest = linux(cx, name, &device)?.board(Board::Microvm);
        let mut machine = Machine::boot(&guest, &cx.paths, &format!("upgrade-{name}"))
            .with_context(|| format!("the server said:\n{}", served.server.log()))?;
        let stat = served.stat(cx, "disk")?;
        ensure!(stat["access"] == "upgraded", "{name}: {stat}");
        let new: KnownFiles = machine.run_step(
            &cx.paths,
            "add_files_to_disk",
            &files(known.clone(), seed, "/dev/vda"),
        )?;
        known = known.and(new);
        machine.power_off();
    }
    sh(&format!("blockdev --flushbufs {}", device.display())).run()?;
    check_on_host(cx, &device, &known)?;
    served.stop()
}

fn a_running_guest_moves_to_the_service_and_back_to_the_host_without_losing_a_byte(
    cx: &Context,
) -> Result<()> {
    let (served, known) = serve_ext4(cx)?;
    let device = served.device()?;
    let monitor = cx.scratch().join("qmp");
    let guest = linux(cx, "block-device.sh", &device)?.env("QMP", &monitor);
    let mut machine = Machine::boot(&guest, &cx.paths, "upgrade-live")?;
    let live = |disk: &str| {
        let mut live = recipe(cx, "live.sh");
        live.env("QMP", &monitor).env("DISK", disk);
        live
    };
    let new: KnownFiles = machine.run_step(
        &cx.paths,
        "add_files_to_disk",
        &files(known.clone(), 2, "/dev/vda"),
    )?;
    let known = known.and(new);

    // While the guest writes, nothing happens to it.
    let unknown = live("no-such-disk").output()?;
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure!(
        unknown.status.code() == Some(3) && said.contains("it has: disk"),
        "{unknown:?}"
    );
    let refused = std::thread::scope(|scope| {
        let early = scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(3));
            live("disk").output()
        });
        machine.sh(
            &cx.paths,
            "mkdir -p /run/load; mount /dev/vda /run/load; end=$(($(date +%s) + 10)); \
             while test $(date +%s) -lt $end; do \
             dd if=/dev/urandom of=/run/load/load bs=64k count=4 conv=fsync status=none; done; \
             sha256sum /run/load/load; umount /run/load",
        )?;
        early
            .join()
            .map_err(|_| anyhow::anyhow!("live panicked"))?
            .context("live")
    })?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        refused.status.code() == Some(3) && said.contains("unmount it in the guest"),
        "{refused:?}"
    );

    let moved = live("disk").output()?;
    ensure!(moved.status.success(), "{moved:?}");
    let stat = served.stat(cx, "disk")?;
    ensure!(
        stat["vhost"]["sessions"].as_array().map(Vec::len) == Some(1),
        "{stat}"
    );
    let name = machine.sh(
        &cx.paths,
        "for i in $(seq 100); do ls -d /sys/block/vd* 2>/dev/null && break; sleep 0.1; done",
    )?;
    let name = name
        .trim()
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .to_owned();
    let new: KnownFiles = machine.run_step(
        &cx.paths,
        "add_files_to_disk",
        &files(known.clone(), 3, &format!("/dev/{name}")),
    )?;
    let known = known.and(new);
    let stat = served.stat(cx, "disk")?;
    ensure!(
        stat["access"] == "upgraded" && stat["vhost"]["counters"]["writes"].as_u64() > Some(0),
        "{stat}"
    );
    let again = live("disk").output()?;
    ensure!(again.status.code() == Some(3), "{again:?}");
    machine.power_off();

    sh(&format!("blockdev --flushbufs {}", device.display())).run()?;
    check_on_host(cx, &device, &known)?;
    served.stop()
}

/// `hotplug.qmp` as it stands: the export has the name and the place that it says.
fn a_disk_is_plugged_into_a_running_guest(cx: &Context) -> Result<()> {
    let (served, _known) = serve_ext4(cx)?;
    let hot = Serve::new(cx)
        .env("UBLKUP_RUNTIME_DIR", "/run/ublkup")
        .ublk("no")
        .arg("hot=mem:16M")
        .start()?;
    let monitor = cx.scratch().join("qmp");
    let guest = linux(cx, "block-device.sh", &served.device()?)?
        .env("QMP", &monitor)
        .argument("-device")
        .argument("pcie-root-port,id=port1,chassis=2");
    let mut machine = Machine::boot(&guest, &cx.paths, "upgrade-hotplug")?;
    let commands = fs::read_to_string(cx.paths.repo.join("qemu-config/hotplug.qmp"))?;
    let answers = monitor_says(cx, &monitor, &commands)?;
    ensure!(
        answers
            .lines()
            .filter(|line| line.starts_with("{\"return\""))
            .count()
            == 3,
        "{answers}"
    );
    let seen = machine.sh(
        &cx.paths,
        "for i in $(seq 100); do cat /sys/block/vdb/size 2>/dev/null && break; sleep 0.1; done",
    )?;
    ensure!(seen.trim() == "32768", "the guest sees {seen:?} sectors");
    machine.power_off();
    hot.stop()?;
    served.stop()
}

/// Sends lines to a QMP monitor, one answer each, and returns all it said.
fn monitor_says(cx: &Context, monitor: &Path, lines: &str) -> Result<String> {
    let stream = UnixStream::connect(monitor)?;
    stream.set_read_timeout(Some(cx.patience(20)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut said = String::new();
    reader.read_line(&mut said)?;
    for line in lines.lines() {
        writeln!(&stream, "{line}")?;
        loop {
            let start = said.len();
            ensure!(
                reader.read_line(&mut said)? > 0,
                "the monitor closed: {said}"
            );
            let answer = &said[start..];
            if answer.starts_with("{\"return\"") || answer.starts_with("{\"error\"") {
                break;
            }
        }
    }
    Ok(said)
}
