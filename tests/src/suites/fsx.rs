//! fsx: random reads, writes, mappings, truncations and holes of one file or disk, each read compared
//! with what was written; on the raw disk and on a file in ext4, through both doors.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use testkit::images;
use testkit::server::Serve;
use testkit::shell::{Shell, sh};

use crate::kernel::Kernel;
use crate::kit::beside::beside;
use crate::machine::{Machine, Qemu};
use crate::report::line;
use crate::test;
use crate::test::{Context, Test};

/// Of the ublk door, inside a guest.
pub const BLOCK_TESTS: &[Test] = &[
    test!(fsx_finds_nothing_behind_the_block_door, |cx| block_door(
        cx, SHORT
    ))
    .limit_s(120),
    test!(fsx_notices_a_disk_that_forgets),
    test!(
        fsx_finds_nothing_behind_the_block_door_for_ten_minutes,
        |cx| { block_door(cx, LONG) }
    )
    .limit_s(600)
    .full(),
];

/// Of the vhost door, on the host.
pub const VHOST_TESTS: &[Test] = &[
    test!(fsx_finds_nothing_behind_the_vhost_door, |cx| vhost_door(
        cx, SHORT
    ))
    .limit_s(300),
    test!(
        fsx_finds_nothing_behind_the_vhost_door_for_ten_minutes,
        |cx| { vhost_door(cx, LONG) }
    )
    .limit_s(1500)
    .full(),
];

/// What a guest runs.
pub const STEPS: &[Test] = &[test!(fsx_disk).limit_s(1200)];

const DISK_BYTES: u64 = 64 << 20;

/// What of the raw disk fsx uses; it keeps a copy of it.
const RAW_BYTES: u64 = 2 << 20;

/// How long each of the raw disk and the file is worked on, at least.
const SHORT: Duration = Duration::from_secs(4);
const LONG: Duration = Duration::from_secs(300);

/// Operations of one run; each run has another seed.
const OPERATIONS: u32 = 1000;

/// What to work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// A file, which grows and shrinks.
    File,
    /// A disk with sectors of 512 bytes.
    Disk,
}

impl Target {
    /// fsx's configuration.
    fn settings(self) -> String {
        let weights = "invalidate = 1\nfsync = 1\nfdatasync = 1\nposix_fadvise = 3\n\
                       punch_hole = 3\nsendfile = 3\nread = 10\nwrite = 10\nmapread = 10\n\
                       mapwrite = 10\n";
        match self {
            Target::File => format!(
                "flen = 1048576\n[opsize]\nmax = 131072\n[weights]\n{weights}close_open = 2\n\
                 truncate = 5\nposix_fallocate = 2\ncopy_file_range = 3\n"
            ),
            Target::Disk => format!(
                "flen = {RAW_BYTES}\nblockmode = true\nnosizechecks = true\n\
                 [opsize]\nmax = 131072\nmin = 512\nalign = 512\n\
                 [weights]\n{weights}close_open = 0\ntruncate = 0\nposix_fallocate = 0\n"
            ),
        }
    }
}

/// Whole runs until the time is over; how many there were. Meanwhile the page cache is dropped again
/// and again: what is read comes from the disk.
fn exercise(cx: &Context, target: Target, path: &Path, for_at_least: Duration) -> Result<u64> {
    let dropping = |over: &AtomicBool| {
        while !over.load(Ordering::Relaxed) {
            fs::write("/proc/sys/vm/drop_caches", "1").context("cannot drop the page cache")?;
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    let ((), runs) = beside(dropping, || run_fsx(cx, target, path, for_at_least))?;
    Ok(runs)
}

fn run_fsx(cx: &Context, target: Target, path: &Path, for_at_least: Duration) -> Result<u64> {
    let program = cx.paths.fsx.as_deref().context("this run has no fsx")?;
    let settings = cx.scratch().join("fsx.toml");
    fs::write(&settings, target.settings())?;
    let started = Instant::now();
    let mut runs = 0;
    while started.elapsed() < for_at_least {
        runs += 1;
        Shell::new(program)
            .arg("-f")
            .arg(&settings)
            .args(["-N", &OPERATIONS.to_string(), "-S", &runs.to_string()])
            .arg("-P")
            .arg(cx.scratch())
            .arg(path)
            .limit(cx.patience(100))
            .run()
            .with_context(|| format!("fsx on {target:?}, seed {runs}"))?;
    }
    Ok(runs)
}

/// The raw disk, then a file in ext4 on it; the file system is whole afterwards.
fn exercise_both(cx: &Context, device: &Path, for_at_least: Duration) -> Result<(u64, u64)> {
    let raw = exercise(cx, Target::Disk, device, for_at_least)?;
    sh(&format!("mkfs.ext4 -q -F {}", device.display())).run()?;
    let mounted = images::mount_ext4(device, &cx.scratch().join("mnt"), false)?;
    let file = mounted.dir().join("file");
    let files = exercise(cx, Target::File, &file, for_at_least)?;
    mounted.unmount()?;
    images::fsck(device)?;
    Ok((raw, files))
}

fn tell(door: &str, (raw, files): (u64, u64)) -> Result<()> {
    line(&format!(
        "{door}: {OPERATIONS} operations {raw} times on the disk and {files} times on a file"
    ));
    ensure!(raw > 0 && files > 0, "fsx did not run");
    Ok(())
}

fn serve(cx: &Context) -> Result<Serve> {
    Ok(cx.serve().name("disk").arg(cx.file(DISK_BYTES)?))
}

fn block_door(cx: &Context, for_at_least: Duration) -> Result<()> {
    let server = serve(cx)?.ublk("yes").start()?;
    tell(
        "ublk door",
        exercise_both(cx, &server.block_device()?, for_at_least)?,
    )?;
    server.stop().map(drop)
}

/// A null disk takes everything and gives nothing back.
fn fsx_notices_a_disk_that_forgets(cx: &Context) -> Result<()> {
    let server = cx.serve().ublk("yes").arg("null:64M").start()?;
    let noticed = exercise(cx, Target::Disk, &server.block_device()?, SHORT);
    let error = noticed.err().context("fsx noticed nothing")?;
    ensure!(
        format!("{error:#}").contains("[ERROR fsx]"),
        "fsx failed, but not for the data: {error:#}"
    );
    server.stop().map(drop)
}

/// For [`fsx_disk`].
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    device: PathBuf,
    for_at_least: Duration,
}

/// The step for guests; replies with the numbers of runs.
fn fsx_disk(cx: &Context) -> Result<()> {
    let order: Order = cx.args()?;
    cx.reply(&exercise_both(cx, &order.device, order.for_at_least)?)
}

fn vhost_door(cx: &Context, for_at_least: Duration) -> Result<()> {
    let socket = cx.scratch().join("disk.sock");
    let server = serve(cx)?.ublk("no").vhost_socket(&socket).start()?;
    let guest = Qemu::client(cx.paths.kernel(Kernel::X86)?, &socket).processors(2);
    let mut machine = Machine::boot(&guest, &cx.paths, "fsx")?;
    let order = Order {
        device: "/dev/vda".into(),
        for_at_least,
    };
    let runs: (u64, u64) = machine.run_step("fsx_disk", &order)?;
    tell("vhost door", runs)?;
    machine.power_off();
    server.stop().map(drop)
}
