//! `--live` at a monitor that is not QEMU's: what it hands out, to whom, and what a move that is cut off leaves.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;
use rustix::process::Signal;
use testkit::process;

use super::common::{command, expect_refusal};
use super::monitor::Monitor;
use super::{LoopDevice, image, serve_loop};
use crate::test::Context;

fn live(cx: &Context, monitor: &Monitor, disk: &str) -> Command {
    let mut live = command(cx, &cx.paths.server);
    live.args(["qemu", "--live"])
        .arg(&monitor.socket)
        .args([disk, "--unmounted"]);
    live
}

/// An open file of the device, which makes this process one that may have the disk or not.
fn open(device: &Path, write: bool, flags: OFlags) -> Result<std::fs::File> {
    let mut options = OpenOptions::new();
    options.read(true).write(write);
    Ok((options.custom_flags(flags.bits().cast_signed())).open(device)?)
}

/// A monitor belongs to any user, and names any device. The disk goes only to a process that could write to it before.
pub(super) fn a_monitor_gets_no_disk_that_its_process_does_not_have(cx: &Context) -> Result<()> {
    let image = image(cx)?;
    let disk = LoopDevice::new(cx, &image)?;
    let served = serve_loop(cx, &image, &disk)?;
    let path = disk.0.to_string_lossy().into_owned();
    let other_image = cx.scratch().join("other");
    std::fs::write(&other_image, vec![0; 1 << 20])?;
    let other = LoopDevice::new(cx, &other_image)?;

    // It names the other tenant's disk as what has the asked name: the path of its own.
    let own = open(&other.0, true, OFlags::empty())?;
    let monitor = Monitor::start(
        &cx.scratch().join("qmp-path"),
        &path,
        &other.0.to_string_lossy(),
        false,
    )?;
    let asked = other.0.to_string_lossy();
    expect_refusal(&mut live(cx, &monitor, &asked), 3, "no such disk")?;
    ensure!(monitor.descriptors_sent() == 0);
    drop(own);

    let monitor = Monitor::start(&cx.scratch().join("qmp"), &path, "node", false)?;
    let refused = "open for reading itself, and is not given it; nothing was changed";
    for name in ["disk", path.as_str()] {
        expect_refusal(&mut live(cx, &monitor, name), 3, refused)?;
        // Anybody can have this of a device that he may not open.
        let seen = open(&disk.0, false, OFlags::PATH)?;
        expect_refusal(&mut live(cx, &monitor, name), 3, refused)?;
        drop(seen);
        let reader = open(&disk.0, false, OFlags::empty())?;
        let for_writing = "open for writing itself, and is not given it; nothing was changed";
        expect_refusal(&mut live(cx, &monitor, name), 3, for_writing)?;
        drop(reader);
    }
    ensure!(monitor.descriptors_sent() == 0, "a descriptor was sent");

    // With the disk in use it goes as far as the guest, which is gone.
    let _writer = open(&disk.0, true, OFlags::empty())?;
    let mut asked = begin(cx, &monitor)?;
    monitor.expect("device_del", cx.patience(30))?;
    ensure!(monitor.descriptors_sent() == 1);
    process::signal(&asked, Signal::KILL)?;
    asked.wait()?;
    served.stop().map(drop)
}

/// Begins to move the disk.
fn begin(cx: &Context, monitor: &Monitor) -> Result<Child> {
    monitor.forget_heard();
    let mut live = live(cx, monitor, "disk");
    process::spawn_bound(live.stderr(Stdio::piped()))
}

/// Waits until the command has said something.
fn expect_line(child: &mut Child, says: &str) -> Result<()> {
    let stderr = child.stderr.as_mut().context("it has no standard error")?;
    let mut said = String::new();
    for line in BufReader::new(stderr).lines() {
        let line = line?;
        if line.contains(says) {
            return Ok(());
        }
        said.push_str(&line);
    }
    anyhow::bail!("it did not say {says:?} but {said:?}")
}

/// Whether somebody has the disk for himself.
fn is_claimed(device: &Path) -> bool {
    open(device, true, OFlags::EXCL).is_err()
}

/// SIGINT is undone at once, SIGKILL by the next `--live`, and a move by `--back`.
pub(super) fn a_move_that_is_cut_off_is_undone(cx: &Context) -> Result<()> {
    let image = image(cx)?;
    let disk = LoopDevice::new(cx, &image)?;
    let served = serve_loop(cx, &image, &disk)?;
    let path = disk.0.to_string_lossy().into_owned();
    let _qemu = open(&disk.0, true, OFlags::empty())?;
    let monitor = Monitor::start(&cx.scratch().join("qmp"), &path, "node", false)?;
    let limit = cx.patience(30);

    // The guest lets go after the signal: it gets the block device back.
    let mut asked = begin(cx, &monitor)?;
    monitor.expect("device_del", limit)?;
    ensure!(monitor.descriptors() == 1 && is_claimed(&disk.0));
    process::signal(&asked, Signal::INT)?;
    expect_line(&mut asked, "waiting for its answer")?;
    monitor.let_go_now()?;
    let status = process::wait_limited(&mut asked, limit)?.context("it does not end")?;
    ensure!(status.code() == Some(1), "{status}");
    ensure!(monitor.device().as_deref() == Some("virtio-blk-pci"));
    ensure!(monitor.descriptors() == 0 && !is_claimed(&disk.0));

    // Killed while the guest has the disk: the next one takes the claim back.
    let mut asked = begin(cx, &monitor)?;
    monitor.expect("device_del", limit)?;
    process::signal(&asked, Signal::KILL)?;
    asked.wait()?;
    ensure!(monitor.descriptors() == 1 && is_claimed(&disk.0));
    monitor.set_lets_go(true);
    let moved = live(cx, &monitor, "disk").output()?;
    let said = String::from_utf8_lossy(&moved.stderr);
    ensure!(
        moved.status.success() && said.contains("took back the claim"),
        "{moved:?}"
    );
    ensure!(monitor.device().as_deref() == Some("vhost-user-blk-pci"));
    ensure!(monitor.descriptors() == 1 && is_claimed(&disk.0));

    expect_refusal(&mut live(cx, &monitor, "disk"), 3, "upgraded already")?;
    for name in ["disk", path.as_str()] {
        let back = live(cx, &monitor, name).arg("--back").output()?;
        ensure!(back.status.success(), "{back:?}");
        ensure!(monitor.device().as_deref() == Some("virtio-blk-pci"));
        ensure!(monitor.descriptors() == 0 && !is_claimed(&disk.0));
        let again = live(cx, &monitor, name).output()?;
        ensure!(again.status.success(), "{again:?}");
    }

    // Killed before the guest let go, which it did then: --live says what to do, and --back does it.
    let back = live(cx, &monitor, "disk").arg("--back").output()?;
    ensure!(back.status.success(), "{back:?}");
    monitor.set_lets_go(false);
    let mut asked = begin(cx, &monitor)?;
    monitor.expect("device_del", limit)?;
    process::signal(&asked, Signal::KILL)?;
    asked.wait()?;
    monitor.lose_disk();
    expect_refusal(
        &mut live(cx, &monitor, "disk"),
        3,
        "--back gives it the block device",
    )?;
    let back = live(cx, &monitor, "disk").arg("--back").output()?;
    ensure!(back.status.success(), "{back:?}");
    ensure!(monitor.device().as_deref() == Some("virtio-blk-pci"));
    ensure!(monitor.descriptors() == 0 && !is_claimed(&disk.0));
    served.stop().map(drop)
}
