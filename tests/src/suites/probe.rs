//! `ublkup probe`: what it says, and whom it disturbs.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;
use serde_json::Value;
use testkit::images;
use testkit::shell::{Shell, sh};

use super::launcher::{expect, serve};
use crate::test;
use crate::test::{Context, Test};

/// Inside User Mode Linux.
pub const TESTS: &[Test] = &[
    test!(probe_tells_what_can_be_upgraded_and_why_not),
    test!(probe_claims_the_disk_no_longer_than_it_takes_to_open_it),
];

fn probe_tells_what_can_be_upgraded_and_why_not(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let device = served.block_device()?;
    let path = device.to_string_lossy().into_owned();
    let probe = |path: &str| cx.ublkup(&["probe", path]).finish();

    expect(&probe(&path)?, 0, "by the kernel route")?;
    let json: Value = serde_json::from_str(&cx.ublkup(&["probe", &path, "--json"]).run()?)?;
    ensure!(
        json["way"] == "kernel"
            && json["server_pid"] == served.pid()
            && json["size_bytes"] == 8 << 20
            && json["read_only"] == false,
        "{json}"
    );
    ensure!(cx.stat("disk")?["access"] == "block", "a probe takes it");

    let claim = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(i32::try_from(OFlags::EXCL.bits())?)
        .open(&device)?;
    expect(&probe(&path)?, 3, "claimed exclusively")?;
    drop(claim);

    sh(&format!("mkfs.ext4 -q -F {path}")).run()?;
    let mounted = images::mount_ext4(&device, &cx.scratch().join("mnt"), false)?;
    expect(
        &probe(&path)?,
        3,
        &format!("mounted at {}", mounted.dir().display()),
    )?;
    fs::write(mounted.dir().join("file"), "still writable").context("the mount was disturbed")?;
    mounted.unmount()?;

    expect(&probe("/dev/null")?, 3, "not a block device")?;
    expect(&probe("/dev/no-such-disk")?, 1, "no-such-disk")?;
    expect(&cx.ublkup(&["probe"]).finish()?, 2, "Usage")?;
    served.stop()?;

    let served = serve(cx, &["disk"], &["--vhost", "no"])?;
    let path = served.block_device()?.to_string_lossy().into_owned();
    expect(&probe(&path)?, 3, "no server offers this service")?;
    served.stop().map(drop)
}

/// In its system calls, since no clock could tell.
fn probe_claims_the_disk_no_longer_than_it_takes_to_open_it(cx: &Context) -> Result<()> {
    let served = serve(cx, &["disk"], &[])?;
    let trace = cx.scratch().join("trace");
    Shell::new("strace")
        .args([
            "-f",
            "-e",
            "trace=open,openat,close,connect,ioctl,fsync",
            "-o",
        ])
        .arg(&trace)
        .arg(&cx.paths.server)
        .arg("probe")
        .arg(served.block_device()?)
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .limit(cx.patience(30))
        .run()?;
    let trace = fs::read_to_string(&trace)?;
    let calls: Vec<&str> = trace.lines().collect();
    let at = |start: usize, what: &str| {
        let found = calls[start..].iter().position(|call| call.contains(what));
        found.with_context(|| format!("no {what} in:\n{trace}"))
    };
    let claimed = at(0, "O_EXCL")?;
    let fd = calls[claimed].rsplit("= ").next().unwrap_or_default();
    let held_for = at(claimed, &format!("close({})", fd.trim()))?;
    let asked_after = at(claimed, "/vhost-user-blk")?;
    ensure!(
        held_for < asked_after,
        "the claim is held while the server is asked:\n{trace}"
    );
    ensure!(
        !trace.contains("fsync(") && !trace.contains("BLKFLSBUF"),
        "a probe touches the page cache:\n{trace}"
    );
    served.stop().map(drop)
}
