//! Disks that come, are refused, go, or are taken away.

use super::{MIB, nothing_left, serve};
use crate::kit::beside::beside;
use crate::suites::io::Exercise;
use crate::test::Context;
use anyhow::{Result, bail, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;
use testkit::images;
use testkit::process;
use testkit::shell::{Shell, sh};
use testkit::wait::until;

pub(super) fn an_id_in_use_is_told(cx: &Context) -> Result<()> {
    let server = serve(cx, "mem:1M").arg("--ublk-id").arg("5").start()?;
    ensure!(
        server.block_device()? == Path::new("/dev/ublkb5"),
        "another id"
    );
    let second = cx
        .ublkup(&["serve", "--ublk-id", "5", "other=mem:1M"])
        .finish()?;
    ensure!(second.code() == 1, "exit code {}", second.code());
    let said = second.tail();
    ensure!(said.contains("id 5 is in use"), "{said}");
    server.stop()?;
    nothing_left(cx)
}

pub(super) fn a_user_without_rights_is_told(cx: &Context) -> Result<()> {
    let run = cx.scratch().join("nobody");
    fs::create_dir(&run)?;
    sh(&format!(
        "chown nobody {}; chmod 755 {}",
        run.display(),
        cx.scratch().display()
    ))
    .run()?;
    let finished = Shell::new("setpriv")
        .args(["--reuid=nobody", "--clear-groups"])
        .arg(&cx.paths.server)
        .args(["serve", "--ublk", "yes", "mem:1M"])
        .env("UBLKUP_RUNTIME_DIR", run.join("run"))
        .finish()?;
    ensure!(
        finished.code() == 1,
        "exit code {}: {}",
        finished.code(),
        finished.tail()
    );
    ensure!(finished.tail().contains("root"), "{}", finished.tail());
    nothing_left(cx)
}

pub(super) fn a_mounted_disk_is_not_served(cx: &Context) -> Result<()> {
    let lower = serve(cx, "mem:64M").start()?;
    let disk = lower.block_device()?;
    sh(&format!("mkfs.ext4 -q {}", disk.display())).run()?;
    let mounted = images::mount_ext4(&disk, &cx.scratch().join("mnt"), false)?;
    let spec = format!("upper=file:{}", disk.display());
    let finished = cx.ublkup(&["serve", &spec]).finish()?;
    ensure!(finished.code() == 1, "a mounted disk was served");
    ensure!(finished.tail().contains("in use"), "{}", finished.tail());
    mounted.unmount()?;
    lower.stop()?;
    nothing_left(cx)
}

pub(super) fn stopping_under_load_ends_the_io_and_leaves_nothing(cx: &Context) -> Result<()> {
    let server = serve(cx, "mem:64M").start()?;
    let device = server.block_device()?.display().to_string();
    let load = thread::spawn(move || {
        Shell::new("fio")
            .args(["--name=load", "--rw=randrw", "--ioengine=io_uring"])
            .args([
                "--direct=1",
                "--iodepth=32",
                "--time_based",
                "--runtime=300",
            ])
            .arg(format!("--filename={device}"))
            .limit(Duration::from_secs(600))
            .finish()
    });
    until("the load has begun", cx.patience(30), || {
        Ok(cx.stat("disk")?["ublk"]["counters"]["writes"].as_u64() > Some(100))
    })?;
    server.stop()?;
    let Ok(load) = load.join() else {
        bail!("the load's thread panicked");
    };
    ensure!(
        load?.code() != 0,
        "fio did not notice that its disk went away"
    );
    nothing_left(cx)
}

pub(super) fn a_killed_server_is_followed_by_one_of_the_same_name(cx: &Context) -> Result<()> {
    for _ in 0..3 {
        let server = serve(cx, "mem:16M").arg("--ublk-id").arg("2").start()?;
        server.kill()?;
        ensure!(
            Path::new("/dev/ublkc2").exists(),
            "the kernel cleaned up by itself"
        );
    }
    let server = serve(cx, "mem:16M").start()?;
    ensure!(server.block_devices().len() == 1, "one device");
    server.kill()?;
    let doctor = cx.ublkup(&["doctor", "--clean"]).run()?;
    ensure!(doctor.contains("disk: /dev/ublkb"), "{doctor}");
    nothing_left(cx)
}

pub(super) fn a_device_removed_behind_our_back_leaves_the_other_door_open(
    cx: &Context,
) -> Result<()> {
    let server = serve(cx, "mem:16M").start()?;
    // What any root program can do; here the doctor's own removal would refuse.
    let name = server.block_device()?;
    let id = name.display().to_string().replace("/dev/ublkb", "");
    testkit::ublk_control::stop_device(id.parse()?)?;
    until("the closed door is noticed", cx.patience(30), || {
        let stat = cx.stat("disk")?;
        let closed = stat["ublk"].is_null();
        ensure!(
            !closed || !stat["vhost"].is_null(),
            "both doors closed: {stat}"
        );
        Ok(closed)
    })?;
    let log = server.log();
    ensure!(log.contains("the ublk door closed"), "{log}");
    cx.ublkup(&["stop", "disk"]).run()?;
    let (status, log) = server.wait()?;
    ensure!(
        status.code() == Some(1),
        "a door that broke is forgotten: {status}, {log}"
    );
    nothing_left(cx)
}

pub(super) fn several_exports_come_and_go_without_each_other(cx: &Context) -> Result<()> {
    let server = cx
        .serve()
        .ublk("yes")
        .arg("a=mem:64M")
        .arg("disk=mem:96M")
        .arg("c=null:1T")
        .start()?;
    ensure!(
        server.block_devices().len() == 3,
        "three devices: {}",
        server.log()
    );
    // They are told in the order of their names.
    let mut plan = Exercise::new(&server.block_devices()[2], 96 * MIB);
    plan.depths = vec![32];
    beside(
        |_| plan.run(cx),
        || {
            cx.ublkup(&["stop", "a"]).run()?;
            cx.ublkup(&["stop", "c"]).run()
        },
    )?;
    server.stop()?;
    nothing_left(cx)
}

/// udev opens each new disk for a moment: a stop that comes then is not refused.
pub(super) fn a_disk_that_is_only_open_is_stopped_when_it_is_closed(cx: &Context) -> Result<()> {
    let server = serve(cx, "mem:16M").start()?;
    let open = fs::File::open(server.block_device()?)?;
    let mut stop = Command::new(&cx.paths.server);
    stop.args(["stop", "disk"])
        .env("UBLKUP_RUNTIME_DIR", cx.run_dir());
    let mut stop = process::spawn_bound(&mut stop)?;
    let early = process::wait_limited(&mut stop, Duration::from_secs(1))?;
    ensure!(early.is_none(), "it did not wait: {early:?}");
    drop(open);
    let ended = process::wait_limited(&mut stop, cx.patience(30))?;
    ensure!(ended.is_some_and(|status| status.success()), "{ended:?}");
    ensure!(server.wait()?.0.success());
    nothing_left(cx)
}
