//! The disk changes hands under load: from the ublk door to a guest and back, in order and not.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use testkit::random::Random;
use testkit::server::Server;
use testkit::wait::until;

use super::io::{open_direct, read_direct, write_direct};
use super::restart::exercise_while_servers_die;
use super::upgraded::boot_upgraded;
use crate::kit::fio::Fio;
use crate::machine::Machine;
use crate::test;
use crate::test::{Context, Test};

/// Inside User Mode Linux.
pub const TESTS: &[Test] = &[
    test!(no_write_is_lost_when_a_guest_takes_the_disk_and_gives_it_back).limit_s(500),
    test!(no_acknowledged_write_is_missing_after_qemu_was_killed).limit_s(400),
    test!(a_guest_and_its_path_outlive_servers_that_are_killed).limit_s(500),
];

/// What the guests do.
pub const STEPS: &[Test] = &[
    test!(write_and_tell).limit_s(200),
    test!(check_written).limit_s(200),
    test!(write_verified).limit_s(200),
];

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

/// Blocks of this size are written one after the other, and told.
const BLOCK_BYTES: usize = 8192;

/// A part of a disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Part {
    disk: PathBuf,
    offset_bytes: u64,
    len_bytes: u64,
}

impl Part {
    /// The part of a guest's disk that is this part of ours.
    fn in_guest(&self) -> Self {
        Self {
            disk: "/dev/vda".into(),
            ..self.clone()
        }
    }

    fn blocks(&self) -> u64 {
        self.len_bytes / BLOCK_BYTES as u64
    }

    fn fio(&self, cx: &Context) -> Fio {
        Fio::new(&self.disk)
            .option("rw", "randwrite")
            .option("bs", "16k")
            .option("offset", self.offset_bytes)
            .option("size", self.len_bytes)
            .depth(8)
            .verify()
            .limit(cx.patience(120))
    }
}

/// Where a writer tells how many blocks it was told are written.
const TOLD: &str = "acknowledged";

/// Writes blocks until it is refused, or the machine dies, or `limit` is over; and notes after each how
/// many were acknowledged.
fn write_counting(part: &Part, told: &Path, limit: Duration) -> Result<()> {
    let disk = open_direct(&part.disk)?;
    let told = fs::File::create(told).context("cannot tell")?;
    let deadline = Instant::now() + limit;
    for number in 0.. {
        if Instant::now() > deadline {
            break;
        }
        let at = part.offset_bytes + number % part.blocks() * BLOCK_BYTES as u64;
        write_direct(&disk, at, &block(number))?;
        told.write_all_at(&(number + 1).to_le_bytes(), 0)?;
    }
    Ok(())
}

/// What [`write_counting`] writes for the `number`th time.
fn block(number: u64) -> Vec<u8> {
    Random(number + 1).bytes(BLOCK_BYTES)
}

fn acknowledged(told: &Path) -> u64 {
    let bytes = fs::read(told).unwrap_or_default();
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// Compares a part with what [`write_counting`] was told. The block after the last acknowledged one may
/// be old, new or neither: its write may have been under way.
fn compare(part: &Part, acknowledged: u64) -> Result<()> {
    let disk = open_direct(&part.disk)?;
    let newest = acknowledged.saturating_sub(part.blocks());
    for number in newest..acknowledged {
        if acknowledged >= part.blocks() && number == newest {
            continue;
        }
        let at = part.offset_bytes + number % part.blocks() * BLOCK_BYTES as u64;
        let found = read_direct(&disk, at, BLOCK_BYTES)?;
        ensure!(
            found == block(number),
            "write {number} of {acknowledged} acknowledged ones, at {at}, is not on the disk"
        );
    }
    Ok(())
}

fn serve(cx: &Context, grace_s: u32) -> Result<Server> {
    serve_spec(cx, grace_s, &format!("mem:{DISK_BYTES}"))
}

fn serve_spec(cx: &Context, grace_s: u32, spec: &str) -> Result<Server> {
    cx.serve()
        .ublk("yes")
        .args(["--name", "disk", "--reconnect-grace"])
        .arg(grace_s.to_string())
        .arg(spec)
        .start()
}

/// The argument names a [`Part`]; the count goes to the exchange directory.
fn write_and_tell(cx: &Context) -> Result<()> {
    write_counting(&cx.args()?, &cx.exchange().join(TOLD), cx.patience(60))
}

/// The argument is a [`Part`] and the number of acknowledged writes.
fn check_written(cx: &Context) -> Result<()> {
    let (part, count): (Part, u64) = cx.args()?;
    compare(&part, count)
}

/// Verifies what another writer's fio left in the first part, writes the second and verifies it.
fn write_verified(cx: &Context) -> Result<()> {
    let (old, new): (Part, Part) = cx.args()?;
    old.fio(cx).option("verify_only", 1).run()?;
    new.fio(cx).run()?;
    Ok(())
}

fn no_write_is_lost_when_a_guest_takes_the_disk_and_gives_it_back(cx: &Context) -> Result<()> {
    let server = serve(cx, 60)?;
    let disk = server.block_device()?;
    let part = |number: u64| Part {
        disk: disk.clone(),
        offset_bytes: number * 16 * MIB,
        len_bytes: 16 * MIB,
    };
    let (ours, theirs, counted) = (part(0), part(1), part(2));
    ours.fio(cx).option("do_verify", 0).run()?;

    // A writer at the block device goes on until the guest has the disk.
    let told = cx.scratch().join(TOLD);
    let (mut guest, error) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| write_counting(&counted, &told, cx.patience(60)));
        let guest = boot_upgraded(cx, &disk, "hand-over").map(|(guest, _)| guest);
        // Whatever happened: the writer must end, and it ends when the disk is gone or the server is.
        if guest.is_err() {
            server_dies(&server);
        }
        let ended = writer.join().map_err(|_| anyhow!("the writer panicked"))?;
        anyhow::Ok((guest?, ended.err().context("the writer was never refused")?))
    })?;
    cx.expect_access("upgraded")?;
    let refused = error.downcast_ref::<std::io::Error>();
    ensure!(
        refused.and_then(std::io::Error::raw_os_error) == Some(Errno::BADE.raw_os_error()),
        "the writer met another end: {error:#}"
    );
    let count = acknowledged(&told);
    ensure!(count > 100, "the writer was too slow: {count} writes");
    let () = guest.run_step("check_written", &(counted.in_guest(), count))?;
    let parts = (ours.in_guest(), theirs.in_guest());
    let () = guest.run_step("write_verified", &parts)?;

    // And back, in the middle of the guest's writes: QEMU ends in order.
    let count = interrupt(cx, guest, &counted, Signal::TERM)?;
    cx.expect_access("block")?;
    compare(&counted, count)?;
    ours.fio(cx).option("verify_only", 1).run()?;
    theirs.fio(cx).option("verify_only", 1).run()?;
    theirs.fio(cx).run()?;
    let log = server.stop()?;
    ensure!(log.contains("the client left"), "it did not leave:\n{log}");
    Ok(())
}

fn no_acknowledged_write_is_missing_after_qemu_was_killed(cx: &Context) -> Result<()> {
    let server = serve(cx, 3)?;
    let disk = server.block_device()?;
    let part = Part {
        disk: disk.clone(),
        offset_bytes: 0,
        len_bytes: 32 * MIB,
    };
    let (guest, _) = boot_upgraded(cx, &disk, "killed")?;
    let count = interrupt(cx, guest, &part, Signal::KILL)?;
    cx.expect_access("waiting")?;
    let refused = write_direct(&open_direct(&disk)?, 0, &block(0));
    ensure!(refused.is_err(), "the ublk door writes during the grace");
    cx.expect_access("block")?;
    compare(&part, count)?;
    part.fio(cx).run()?;
    let log = server.stop()?;
    ensure!(
        log.contains("disconnected without stopping"),
        "it did not die:\n{log}"
    );
    Ok(())
}

/// QEMU has the block device's descriptor and a path, nothing else. Servers die; the next one takes the
/// device over, and QEMU finds it by the same path.
fn a_guest_and_its_path_outlive_servers_that_are_killed(cx: &Context) -> Result<()> {
    let spec = format!("{},cache=buffered", cx.file(DISK_BYTES)?);
    let server = serve_spec(cx, 120, &spec)?;
    let disk = server.block_device()?;
    let (mut guest, _) = boot_upgraded(cx, &disk, "outlives")?;
    let next = || serve_spec(cx, 120, &spec);
    let server = exercise_while_servers_die(cx, &mut guest, (&[1, 32], 3), server, next)?;
    guest.power_off();
    cx.expect_access("block")?;
    let part = Part {
        disk,
        offset_bytes: 0,
        len_bytes: 16 * MIB,
    };
    part.fio(cx).run()?;
    server.stop().map(drop)
}

/// Lets a guest write, and ends its QEMU in the middle of that; how many writes were acknowledged.
fn interrupt(cx: &Context, mut guest: Machine, part: &Part, signal: Signal) -> Result<u64> {
    let told = guest.exchange().join(TOLD);
    let kept = cx.scratch().join("kept");
    let pid = guest.process();
    std::thread::scope(|scope| {
        let in_guest = part.in_guest();
        let writer = scope.spawn(move || {
            let ended: Result<()> = guest.run_step("write_and_tell", &in_guest);
            // The exchange directory goes with the machine.
            let count = fs::copy(guest.exchange().join(TOLD), &kept).map(|_| acknowledged(&kept));
            (ended, count)
        });
        let waited = until("the guest has written for a while", cx.patience(60), || {
            Ok(acknowledged(&told) > 200)
        });
        kill_process(pid, signal).context("cannot signal QEMU")?;
        let (ended, count) = writer.join().map_err(|_| anyhow!("the writer panicked"))?;
        waited?;
        ensure!(ended.is_err(), "the guest outlived its QEMU");
        Ok(count?)
    })
}

/// Kills a server whose disk a thread still writes to.
fn server_dies(server: &Server) {
    let pid = i32::try_from(server.pid()).ok().and_then(Pid::from_raw);
    // The test fails anyway; this only ends its threads.
    let _ended = pid.map(|pid| kill_process(pid, Signal::KILL));
}
