//! Linux in QEMU: microvms, and guests whose disks come and go while they run.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::images::{self, KnownFiles};
use testkit::server::Server;
use testkit::shell::sh;

use super::super::guest::FilesOnDisk;
use super::common::{expect_refusal, linux, recipe, serve_file};
use super::{LoopDevice, serve_loop};
use crate::kit::beside::beside;
use crate::machine::{Board, Machine};
use crate::test::Context;

fn files(known: KnownFiles, seed: u64, device: &str) -> FilesOnDisk {
    FilesOnDisk {
        device: device.into(),
        known,
        seed,
    }
}

/// An ext4 file system with known files on a block device of 64 MiB.
fn serve_ext4(cx: &Context) -> Result<(Server, KnownFiles)> {
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

pub(super) fn microvms_upgrade_through_recipe_and_launcher(cx: &Context) -> Result<()> {
    let (served, mut known) = serve_ext4(cx)?;
    let device = served.block_device()?;
    for (seed, name) in [(2, "raw-microvm.sh"), (3, "launcher-microvm.sh")] {
        let guest = linux(cx, name, &device)?.board(Board::Microvm);
        let mut machine = Machine::boot(&guest, &cx.paths, &format!("upgrade-{name}"))
            .with_context(|| format!("the server said:\n{}", served.log()))?;
        let stat = cx.stat("disk")?;
        ensure!(stat["access"] == "upgraded", "{name}: {stat}");
        let new: KnownFiles =
            machine.run_step("add_files_to_disk", &files(known.clone(), seed, "/dev/vda"))?;
        known = known.and(new);
        machine.power_off();
    }
    sh(&format!("blockdev --flushbufs {}", device.display())).run()?;
    check_on_host(cx, &device, &known)?;
    served.stop().map(drop)
}

pub(super) fn a_running_guest_moves_to_the_service_and_back_to_the_host_without_losing_a_byte(
    cx: &Context,
) -> Result<()> {
    let (served, known) = serve_ext4(cx)?;
    let device = served.block_device()?;
    let monitor = cx.scratch().join("qmp");
    let guest = linux(cx, "block-device.sh", &device)?.env("QMP", &monitor);
    let mut machine = Machine::boot(&guest, &cx.paths, "upgrade-live")?;
    let live = |disk: &str| {
        let mut live = recipe(cx, "live.sh");
        live.env("QMP", &monitor).env("DISK", disk);
        live.args(["--unmounted", "--quiet", "2"]);
        live
    };
    let new: KnownFiles =
        machine.run_step("add_files_to_disk", &files(known.clone(), 2, "/dev/vda"))?;
    let known = known.and(new);

    // While the guest writes, nothing happens to it.
    expect_refusal(&mut live("no-such-disk"), 3, "it has: disk")?;
    let early = |_: &AtomicBool| {
        std::thread::sleep(Duration::from_secs(3));
        expect_refusal(&mut live("disk"), 3, "unmount it in the guest")
    };
    beside(early, || {
        machine.sh(
            "mkdir -p /run/load; mount /dev/vda /run/load; end=$(($(date +%s) + 10)); \
             while test $(date +%s) -lt $end; do \
             dd if=/dev/urandom of=/run/load/load bs=64k count=4 conv=fsync status=none; done; \
             sha256sum /run/load/load; umount /run/load",
        )
    })?;

    let say = |commands: &str| {
        let lines = format!("{{\"execute\": \"qmp_capabilities\"}}\n{commands}");
        monitor_says(cx, &monitor, &lines)
    };
    say("{\"execute\": \"stop\"}")?;
    expect_refusal(
        &mut live("disk"),
        3,
        "the guest does not run (status 'paused')",
    )?;
    say("{\"execute\": \"cont\"}")?;
    let mut unsaid = recipe(cx, "live.sh");
    unsaid.env("QMP", &monitor).env("DISK", "disk");
    expect_refusal(&mut unsaid, 2, "--unmounted")?;

    let known = move_and_add_files(&mut machine, &mut live("disk"), known, 3)?;
    let stat = cx.stat("disk")?;
    ensure!(
        stat["access"] == "upgraded" && stat["vhost"]["counters"]["writes"].as_u64() > Some(0),
        "{stat}"
    );
    expect_refusal(&mut live("disk"), 3, "upgraded already")?;

    let mut back = live(&device.to_string_lossy());
    let known = move_and_add_files(&mut machine, back.arg("--back"), known, 4)?;
    let stat = cx.stat("disk")?;
    ensure!(
        stat["access"] == "block" && stat["ublk"]["counters"]["writes"].as_u64() > Some(0),
        "{stat}"
    );
    // Nothing is left in QEMU that would be in the way.
    let known = move_and_add_files(&mut machine, &mut live("disk"), known, 5)?;
    ensure!(cx.stat("disk")?["access"] == "upgraded");
    machine.power_off();

    sh(&format!("blockdev --flushbufs {}", device.display())).run()?;
    check_on_host(cx, &device, &known)?;
    served.stop().map(drop)
}

/// Where the kernel has no part in it: a loop device in the place of the block device, and the registry.
pub(super) fn a_disk_moves_by_the_registry_and_back(cx: &Context) -> Result<()> {
    let image = cx.scratch().join("disk.ext4");
    let known = images::ext4_with_known_files(&image, 64 << 20, 1)?;
    let disk = LoopDevice::new(cx, &image)?;
    let served = serve_loop(cx, &image, &disk)?;
    let monitor = cx.scratch().join("qmp");
    let guest = linux(cx, "block-device.sh", &disk.0)?.env("QMP", &monitor);
    let mut machine = Machine::boot(&guest, &cx.paths, "live-registry")?;
    let mut known = known;
    let path = disk.0.to_string_lossy();
    for (seed, access, args) in [(2, "upgraded", vec![]), (3, "free", vec!["--back"])] {
        let mut live = recipe(cx, "live.sh");
        live.env("QMP", &monitor).env("DISK", &*path);
        live.args(["--unmounted", "--quiet", "1"]).args(args);
        known = move_and_add_files(&mut machine, &mut live, known, seed)?;
        cx.expect_access(access)?;
    }
    machine.power_off();
    served.stop()?;
    images::fsck(&image)
}

/// Moves the disk and uses it where the guest finds it then.
fn move_and_add_files(
    machine: &mut Machine,
    live: &mut Command,
    known: KnownFiles,
    seed: u64,
) -> Result<KnownFiles> {
    let moved = live.output()?;
    ensure!(moved.status.success(), "{moved:?}");
    let name = machine
        .sh("for i in $(seq 100); do ls -d /sys/block/vd* 2>/dev/null && break; sleep 0.1; done")?;
    let name = name.trim().rsplit('/').next().unwrap_or_default();
    let added = files(known.clone(), seed, &format!("/dev/{name}"));
    let new: KnownFiles = machine.run_step("add_files_to_disk", &added)?;
    Ok(known.and(new))
}

/// `hotplug.qmp` as it stands: the export has the name and the place that it says.
pub(super) fn a_disk_is_plugged_into_a_running_guest(cx: &Context) -> Result<()> {
    let (served, _known) = serve_ext4(cx)?;
    let hot = cx
        .serve()
        .env("UBLKUP_RUNTIME_DIR", "/run/ublkup")
        .ublk("no")
        .arg("hot=mem:16M")
        .start()?;
    let monitor = cx.scratch().join("qmp");
    let guest = linux(cx, "block-device.sh", &served.block_device()?)?
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
        "for i in $(seq 100); do cat /sys/block/vdb/size 2>/dev/null && break; sleep 0.1; done",
    )?;
    ensure!(seen.trim() == "32768", "the guest sees {seen:?} sectors");
    machine.power_off();
    hot.stop()?;
    served.stop().map(drop)
}

/// Sends lines to a QMP monitor, one answer each, and returns all it said.
pub(super) fn monitor_says(cx: &Context, monitor: &Path, lines: &str) -> Result<String> {
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
