//! A guest that was upgraded on a kernel with fd addresses, and what it notices when the server, or
//! its launcher, is killed. The servers' exports are files, so their block devices outlive them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{PidfdFlags, Signal, kill_process_group, pidfd_open};
use testkit::process;
use testkit::server::Server;
use testkit::shell::sh;

use super::io::Exercise;
use super::launcher::{self, child_of, expect_written, linux, serve_file, write_sector};
use crate::kit::boot_sector::SECTOR_BYTES;
use crate::machine::{Board, Machine};
use crate::test;
use crate::test::{Context, Test};

/// Inside User Mode Linux.
pub const TESTS: &[Test] = &[
    test!(
        a_guest_of_the_launcher_outlives_servers_that_are_killed,
        |cx| { outlives_servers(cx, "launcher-microvm.sh") }
    )
    .limit_s(400),
    test!(
        a_guest_of_the_raw_recipe_outlives_servers_that_are_killed,
        |cx| { outlives_servers(cx, "raw-microvm.sh") }
    )
    .limit_s(400),
    test!(a_disk_that_moved_while_the_guest_ran_outlives_its_server).limit_s(240),
    test!(a_guest_outlives_its_launcher_and_then_its_server),
];

const DISK_BYTES: u64 = 64 << 20;

/// Kills the server and starts another one, which takes the block device over.
fn replace(cx: &Context, served: Server, image: &Path) -> Result<Server> {
    let device = served.block_device()?;
    served.kill()?;
    let served = serve_file(cx, image)?;
    ensure!(served.block_device()? == device, "another device");
    Ok(served)
}

/// Exercises the guest's disk at these depths while servers are killed and `next` starts others, which
/// take the block device over; at least so many, and the last one.
pub(super) fn exercise_while_servers_die(
    cx: &Context,
    guest: &mut Machine,
    (depths, at_least): (&[u32], u32),
    mut server: Server,
    next: impl Fn() -> Result<Server>,
) -> Result<Server> {
    let device = server.block_device()?;
    let mut plan = Exercise::new(Path::new("/dev/vda"), DISK_BYTES);
    plan.depths = depths.to_vec();
    plan.run_mib = 8;
    let group = guest.process();
    let (kills, server) = std::thread::scope(|scope| {
        let running = scope.spawn(|| guest.run_step::<_, ()>("exercise_disk", &plan));
        let kill = || {
            let mut kills = 0;
            while !running.is_finished() {
                std::thread::sleep(Duration::from_secs(2));
                server.kill()?;
                server = next()?;
                ensure!(server.block_device()? == device, "another device");
                kills += 1;
                // QEMU tries once in a second.
                cx.expect_access("upgraded")?;
            }
            anyhow::Ok((kills, server))
        };
        let killed = kill();
        if killed.is_err() {
            // The guest would wait for its disk for ever.
            let _gone = kill_process_group(group, Signal::KILL);
        }
        let ran = running.join().map_err(|_| anyhow!("the step panicked"))?;
        let killed = killed?;
        ran.map(|()| killed)
    })?;
    ensure!(kills >= at_least, "only {kills} servers were killed");
    Ok(server)
}

/// A guest writes and verifies while servers die; what it wrote last is there when it has gone.
fn outlives_servers(cx: &Context, recipe: &str) -> Result<()> {
    let image = cx.image(DISK_BYTES)?;
    let served = serve_file(cx, &image)?;
    let device = served.block_device()?;
    let qemu = linux(cx, recipe, &device)?.board(Board::Microvm);
    let mut guest = Machine::boot(&qemu, &cx.paths, &format!("restart-{recipe}"))?;
    cx.expect_access("upgraded")?;
    let next = || serve_file(cx, &image);
    let replaced = exercise_while_servers_die(cx, &mut guest, (&[32], 2), served, next)?;
    let written = guest.sh(
        "dd if=/dev/urandom of=/run/data bs=1M count=4 status=none; \
         dd if=/run/data of=/dev/vda bs=1M oflag=direct conv=fsync status=none; \
         sha256sum < /run/data",
    )?;
    let served = replace(cx, replaced, &image)?;
    cx.expect_access("upgraded")?;
    guest.power_off();
    cx.expect_access("block")?;
    expect_sum(&device, 4, &written)?;
    served.stop().map(drop)
}

/// The first MiB of the disk have the sum that the guest has told.
fn expect_sum(device: &Path, mib: u32, told: &str) -> Result<()> {
    let dd = format!("dd if={} bs=1M count={mib}", device.display());
    let found = sh(&format!("{dd} iflag=direct status=none | sha256sum")).run()?;
    ensure!(found == told, "{found:?} instead of {told:?}");
    Ok(())
}

/// `ublkup qemu --live`: the descriptor that QEMU was given leads to the next server too.
fn a_disk_that_moved_while_the_guest_ran_outlives_its_server(cx: &Context) -> Result<()> {
    let image = cx.image(DISK_BYTES)?;
    let served = serve_file(cx, &image)?;
    let device = served.block_device()?;
    let monitor = cx.scratch().join("qmp");
    let qemu = linux(cx, "block-device.sh", &device)?.env("QMP", &monitor);
    let mut guest = Machine::boot(&qemu, &cx.paths, "restart-live")?;
    let moved = launcher::recipe(cx, "live.sh")
        .env("QMP", &monitor)
        .env("DISK", "disk")
        .args(["--unmounted", "--quiet", "2"])
        .output()?;
    ensure!(moved.status.success(), "{moved:?}");
    let name =
        guest.sh("for i in $(seq 100); do ls /sys/block | grep vd && break; sleep 0.1; done")?;
    cx.expect_access("upgraded")?;
    // Half of it before the server dies, half of it after.
    let write = |half: u32| {
        format!(
            "test -e /run/data || dd if=/dev/urandom of=/run/data bs=1M count=2 status=none; \
             dd if=/run/data of=/dev/{} bs=1M count=1 skip={half} seek={half} oflag=direct \
             conv=fsync status=none; sha256sum < /run/data",
            name.trim()
        )
    };
    guest.sh(&write(0))?;
    let served = replace(cx, served, &image)?;
    cx.expect_access("upgraded")?;
    let written = guest.sh(&write(1))?;
    guest.power_off();
    cx.expect_access("block")?;
    expect_sum(&device, 2, &written)?;
    served.stop().map(drop)
}

/// Opens the disk as one who wants it for himself.
fn claim(device: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::EXCL.bits().cast_signed())
        .open(device)
}

/// The launcher is there to tidy up. Killed, it takes nothing along: QEMU has the claim, the way to the
/// service, and the guest.
fn a_guest_outlives_its_launcher_and_then_its_server(cx: &Context) -> Result<()> {
    let image = cx.image(DISK_BYTES)?;
    let served = serve_file(cx, &image)?;
    let device = served.block_device()?;
    write_sector(&device)?;
    let disk = format!("{},bootindex=0", device.display());
    let mut guest = launcher::boot(cx, &mut launcher::launcher(cx, &[&disk]))?;
    let qemu = child_of(guest.process().id())?;
    let ended = pidfd_open(qemu, PidfdFlags::empty()).context("cannot watch QEMU")?;
    process::signal(guest.process(), Signal::KILL)?;
    let status = guest.wait()?;
    ensure!(!status.success(), "the launcher was killed: {status}");

    cx.expect_access("upgraded")?;
    let served = replace(cx, served, &image)?;
    cx.expect_access("upgraded")?;
    let refused = claim(&device).err().and_then(|error| error.raw_os_error());
    ensure!(refused == Some(Errno::BUSY.raw_os_error()));
    guest.tell()?;
    let patience = process::timespec(cx.patience(30));
    let ended = poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&patience))?;
    ensure!(ended > 0, "QEMU does not end");
    cx.expect_access("block")?;

    // Nobody has dropped the page cache; that is left to the user.
    sh(&format!("blockdev --flushbufs {}", device.display())).run()?;
    expect_written(&device)?;
    // The disk is free and whole, for the next guest too.
    let own = claim(&device).context("the claim outlived QEMU")?;
    own.write_all_at(&[0; SECTOR_BYTES], SECTOR_BYTES as u64)?;
    own.sync_all()?;
    drop(own);
    launcher::boot(cx, &mut launcher::launcher(cx, &[&disk]))?.write_and_end()?;
    expect_written(&device)?;
    served.stop().map(drop)
}
