//! Minutes of verified I/O with everything in the mix, for `--full`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use testkit::server::Serve;

use super::io::{Load, Sizes, all_kinds_came, zeroes_and_discards};
use crate::kernel::Kernel;
use crate::kit::beside::beside;
use crate::machine::{Machine, Qemu};
use crate::test;
use crate::test::{Context, Test};

/// Of the ublk door, inside a guest.
pub const BLOCK_TESTS: &[Test] = &[
    test!(memory_behind_the_block_door_for_minutes, |cx| block_door(
        cx, "mem:128M"
    ))
    .limit_s(400)
    .full(),
    test!(a_file_behind_the_block_door_for_minutes, |cx| block_door(
        cx,
        &cx.file(DISK_BYTES)?
    ))
    .limit_s(400)
    .full(),
];

/// Of the vhost door, on the host.
pub const VHOST_TESTS: &[Test] = &[
    test!(memory_behind_the_vhost_door_for_minutes, |cx| vhost_door(
        cx, "mem:128M"
    ))
    .limit_s(2400)
    .full(),
    test!(a_file_behind_the_vhost_door_for_minutes, |cx| vhost_door(
        cx,
        &cx.file(DISK_BYTES)?
    ))
    .limit_s(2400)
    .full(),
];

/// What a guest runs.
pub const STEPS: &[Test] = &[test!(soak_disk).limit_s(500)];

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 128 * MIB;
const BLOCK_BYTES: u64 = 512;

/// How long one disk is worked on at least: two of them make five minutes of a door.
const SOAK: Duration = Duration::from_secs(150);

/// Sizes of requests in the runs with one size; each round takes another of them to each depth.
const SIZES: [u64; 6] = [BLOCK_BYTES, 4 << 10, 16 << 10, 64 << 10, 256 << 10, MIB];

/// Depths and writers of the loads of a round.
const LOADS: [(u32, u32); 6] = [(1, 1), (1, 4), (32, 1), (32, 4), (128, 1), (128, 4)];

/// What to do to a disk.
#[derive(Debug, Serialize, Deserialize)]
struct Soak {
    device: PathBuf,
    for_at_least: Duration,
}

/// What was done to it.
#[derive(Debug, Serialize, Deserialize)]
struct Soaked {
    /// Every load once, with other sizes and places each time.
    rounds: u64,
    /// Series of zeroing and discarding, meanwhile.
    zeroings: u64,
}

impl Soak {
    /// Whole rounds until the time is over.
    fn run(&self, cx: &Context) -> Result<Soaked> {
        let half = DISK_BYTES / 2;
        let zeroing = |over: &AtomicBool| {
            let mut count = 0;
            while !over.load(Ordering::Relaxed) {
                zeroes_and_discards(&self.device, BLOCK_BYTES, half, DISK_BYTES, count)?;
                count += 1;
            }
            Ok(count)
        };
        let (zeroings, rounds) = beside(zeroing, || self.loads(cx, half))?;
        Ok(Soaked { rounds, zeroings })
    }

    fn loads(&self, cx: &Context, room_bytes: u64) -> Result<u64> {
        let started = Instant::now();
        let mut rounds = 0;
        while started.elapsed() < self.for_at_least {
            for (place, (depth, jobs)) in (0u64..).zip(LOADS) {
                let size = SIZES[usize::try_from((rounds + place) % SIZES.len() as u64)?];
                let each_mib = each_mib(depth, jobs, size);
                // fio crashes when several writers have fewer blocks than they may have under way.
                let largest = match jobs {
                    1 => MIB,
                    _ => each_mib * MIB / u64::from(depth),
                };
                let load = Load {
                    sizes: match depth {
                        1 => Sizes::Mixed,
                        _ => Sizes::One(size.min(largest)),
                    },
                    discards: false,
                    depth,
                    jobs,
                    each_mib,
                    seed: rounds * 100 + place + 1,
                };
                ensure!(load.each_mib * u64::from(jobs) * MIB <= room_bytes);
                load.run(cx, &self.device, BLOCK_BYTES)?;
            }
            // fio has no discards among reads and writes, but it has them before each write.
            let load = Load {
                sizes: Sizes::One(SIZES[usize::try_from(rounds % 2)?]),
                discards: true,
                depth: 8,
                jobs: 1,
                each_mib: 2,
                seed: rounds + 1,
            };
            load.run(cx, &self.device, BLOCK_BYTES)?;
            rounds += 1;
        }
        Ok(rounds)
    }
}

/// What each writer has of the disk. Small requests take their time; fewer of them say as much.
fn each_mib(depth: u32, jobs: u32, size: u64) -> u64 {
    match (depth, jobs, size) {
        (1, ..) => 8,
        (_, _, ..=512) => 1,
        (_, _, ..=4096) => 4,
        (_, 1, MIB) => 64,
        _ => 16,
    }
}

/// The step for guests; replies with what was done.
fn soak_disk(cx: &Context) -> Result<()> {
    let soak: Soak = cx.args()?;
    cx.reply(&soak.run(cx)?)
}

fn serve(cx: &Context, spec: &str) -> Serve {
    cx.serve().name("disk").arg(spec)
}

/// What came through a door, and that none of it failed.
fn check(cx: &Context, door: &str, soaked: &Soaked) -> Result<()> {
    let stat = cx.stat("disk")?;
    let counters = &stat[door]["counters"];
    println!("{soaked:?}: {counters}");
    all_kinds_came(&stat[door])?;
    // Memory has no cache, and the kernel then asks for no flush.
    let flushed = counters["flushes"].as_u64() > Some(0);
    ensure!(stat["write_cache"] == flushed);
    ensure!(
        soaked.rounds > 0 && soaked.zeroings > 0,
        "too little was done: {soaked:?}"
    );
    Ok(())
}

fn block_door(cx: &Context, spec: &str) -> Result<()> {
    let server = serve(cx, spec).ublk("yes").start()?;
    let soak = Soak {
        device: server.block_device()?,
        for_at_least: SOAK,
    };
    let soaked = soak.run(cx)?;
    check(cx, "ublk", &soaked)?;
    server.stop().map(drop)
}

/// The guest has four processors and therefore four queues; the server has two threads for them.
fn vhost_door(cx: &Context, spec: &str) -> Result<()> {
    let socket = cx.scratch().join("disk.sock");
    let server = serve(cx, spec)
        .ublk("no")
        .vhost_socket(&socket)
        .args(["--queues", "2"])
        .start()?;
    let guest = Qemu::client(cx.paths.kernel(Kernel::X86)?, &socket).processors(4);
    let mut machine = Machine::boot(&guest, &cx.paths, "soak")?;
    let soak = Soak {
        device: Path::new("/dev/vda").into(),
        for_at_least: SOAK,
    };
    let soaked: Soaked = machine.run_step("soak_disk", &soak)?;
    check(cx, "vhost", &soaked)?;
    machine.power_off();
    server.stop().map(drop)
}
