//! A client that works on a disk until it is told to stop, checks all it reads, and knows how long it
//! had to wait.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use testkit::random::Random;

use super::io::{Exercise, read_direct, write_direct};
use crate::kit::beside::beside;
use crate::kit::fio::Fio;
use crate::test;
use crate::test::{Context, Test};

/// What a guest runs.
pub const STEPS: &[Test] = &[test!(hammer_disk).limit_s(1500)];

const MIB: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;

/// The end of the disk belongs to the prober.
const PROBED_BYTES: u64 = MIB;

/// What fio reads of a disk that cannot be written.
const READ_BYTES: u64 = 16 * MIB;

/// The file in the exchange directory that tells a guest to stop.
pub const OVER: &str = "hammer-is-over";

/// The longest waits that are told.
const WAITS: usize = 400;

/// What to do to which disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hammer {
    /// The disk.
    pub device: PathBuf,
    /// At least 64 MiB.
    pub size_bytes: u64,
    /// Only read what [`prepare_image`] has written.
    pub read_only: bool,
}

/// What was done, and how long it took.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hammered {
    /// Runs of fio, each with verification.
    pub rounds: u64,
    /// Requests of the prober, one after the other.
    pub probes: u64,
    /// The longest waits for one request, longest first, in microseconds.
    pub waits_us: Vec<u64>,
}

/// Fills an image with what a client with `read_only` expects.
pub fn prepare_image(image: &Path, size_bytes: u64) -> Result<()> {
    File::create(image)
        .and_then(|file| file.set_len(size_bytes))
        .with_context(|| format!("cannot make {}", image.display()))?;
    Fio::new(image)
        .option("rw", "write")
        .option("ioengine", "psync")
        .option("direct", 0)
        .verify()
        .option("do_verify", 0)
        .size(&READ_BYTES.to_string())
        .run()?;
    let file = File::options().write(true).open(image)?;
    for block in 0..PROBED_BYTES / BLOCK_BYTES {
        let at = size_bytes - PROBED_BYTES + block * BLOCK_BYTES;
        file.write_all_at(&pattern(block, 0)?, at)?;
    }
    file.sync_all().context("cannot write the image")
}

fn pattern(block: u64, generation: u64) -> Result<Vec<u8>> {
    Ok(Random(block << 32 ^ generation).bytes(usize::try_from(BLOCK_BYTES)?))
}

/// The step for guests; it ends when [`OVER`] appears.
fn hammer_disk(cx: &Context) -> Result<()> {
    let hammer: Hammer = cx.args()?;
    let stop = cx.exchange().join(OVER);
    let told = || {
        while !stop.exists() {
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    };
    let (hammered, ()) = beside(|over| hammer.run(cx, over), told)?;
    cx.reply(&hammered)
}

/// Tells the guest of a machine with this exchange directory to stop.
pub fn tell_guest_to_stop(exchange: &Path) -> Result<()> {
    fs::write(exchange.join(OVER), "").context("cannot tell the guest to stop")
}

impl Hammer {
    /// Whole rounds until it is over.
    pub fn run(&self, cx: &Context, over: &AtomicBool) -> Result<Hammered> {
        let load = || {
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                (self.load(cx, rounds)).with_context(|| format!("round {rounds}"))?;
                rounds += 1;
            }
            Ok(rounds)
        };
        let ((probes, mut waits_us), rounds) = beside(|over| self.probe(over), load)?;
        waits_us.sort_unstable_by(|a, b| b.cmp(a));
        waits_us.truncate(WAITS);
        Ok(Hammered {
            rounds,
            probes,
            waits_us,
        })
    }

    fn load(&self, cx: &Context, round: u64) -> Result<()> {
        if !self.read_only {
            let mut plan = Exercise::new(&self.device, self.size_bytes - 2 * PROBED_BYTES);
            // Deep and large, then deep and from several writers, with zeroing and discarding.
            plan.depths = vec![[32, 8][usize::try_from(round % 2)?]];
            plan.jobs = 2;
            plan.run_mib = 8;
            return plan.run(cx);
        }
        let report = Fio::new(&self.device)
            .option("rw", "randread")
            .option("randseed", round)
            .verify()
            .size(&READ_BYTES.to_string())
            .depth(16)
            .limit(cx.patience(120))
            .run()?;
        ensure!(report.reads() > 0, "nothing was read: {report:?}");
        Ok(())
    }

    /// One request after the other, each compared and timed.
    fn probe(&self, over: &AtomicBool) -> Result<(u64, Vec<u64>)> {
        let disk = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(&self.device)
            .with_context(|| format!("cannot open {}", self.device.display()))?;
        let mut random = Random(self.size_bytes);
        let mut waits = Vec::new();
        let mut probes = 0;
        while !over.load(Ordering::Relaxed) {
            let block = random.below(PROBED_BYTES / BLOCK_BYTES);
            let at = self.size_bytes - PROBED_BYTES + block * BLOCK_BYTES;
            let mut generation = 0;
            if !self.read_only {
                generation = probes + 1;
                let started = Instant::now();
                write_direct(&disk, at, &pattern(block, generation)?)?;
                waits.push(started.elapsed());
            }
            let started = Instant::now();
            let got = read_direct(&disk, at, usize::try_from(BLOCK_BYTES)?)
                .with_context(|| format!("cannot read block {block}"))?;
            waits.push(started.elapsed());
            ensure!(
                got == pattern(block, generation)?,
                "block {block} is not what it was, at probe {probes}"
            );
            probes += 1;
            thread::sleep(Duration::from_millis(2));
        }
        let micros = |wait: Duration| u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        Ok((probes, waits.into_iter().map(micros).collect()))
    }
}

impl Hammered {
    /// A line about so many servers that were killed or replaced; each of them made the client wait once.
    pub fn tell(&self, who: &str, servers: usize, became: &str) -> String {
        let waits = &self.waits_us[..self.waits_us.len().min(servers.max(1))];
        let at = |place: usize| waits.get(place).map_or(0.0, |us| *us as f64 / 1000.0);
        format!(
            "{who}: {} rounds of fio and {} probes without an error while {servers} servers {became}; \
             pauses of median {:.0} ms, worst {:.0} ms",
            self.rounds,
            self.probes,
            at(waits.len() / 2),
            at(0)
        )
    }
}
