//! Verified I/O on a disk, whichever door it came through.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use testkit::random::Random;
use testkit::shell::Shell;

use crate::kit::beside::beside;
use crate::kit::fio::Fio;
use crate::test::Context;

const MIB: u64 = 1 << 20;

/// What to do to a disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exercise {
    /// The disk; all it holds is destroyed.
    pub device: PathBuf,
    /// Its size, at least 64 MiB.
    pub size_bytes: u64,
    /// The smallest request it takes.
    pub block_bytes: u64,
    /// Queue depths, each a run of its own.
    pub depths: Vec<u32>,
    /// Parallel writers at the largest depth.
    pub jobs: u32,
    /// Data written per run, in MiB.
    pub run_mib: u64,
}

impl Exercise {
    /// A thorough exercise of an ordinary disk.
    pub fn new(device: &Path, size_bytes: u64) -> Self {
        Exercise {
            device: device.to_owned(),
            size_bytes,
            block_bytes: 512,
            depths: vec![1, 8, 32, 128],
            jobs: 4,
            run_mib: 24,
        }
    }

    /// Mixed reads, writes and discards of 512 B to 1 MiB with checksums and flushes among them, at
    /// every depth; meanwhile another thread discards and zeroes the second half of the disk and
    /// checks that it stays away from the first.
    pub fn run(&self, cx: &Context) -> Result<()> {
        let half = self.size_bytes / 2 / MIB * MIB;
        for &depth in &self.depths {
            // Blocks of one sector take their time; fewer of them say as much.
            let run_mib = if (2..=8).contains(&depth) {
                4
            } else {
                self.run_mib
            };
            self.verified(cx, depth, 1, run_mib, half)?;
        }
        let depth = self.depths.iter().copied().max().unwrap_or(1);
        let (block, size) = (self.block_bytes, self.size_bytes);
        beside(
            |_| zeroes_and_discards(&self.device, block, half, size, 0),
            || self.verified(cx, depth, self.jobs, self.run_mib, half),
        )
        .map(drop)
    }

    fn verified(
        &self,
        cx: &Context,
        depth: u32,
        jobs: u32,
        run_mib: u64,
        limit_bytes: u64,
    ) -> Result<()> {
        let block = self.block_bytes;
        let sizes = match depth {
            1 => Sizes::Mixed,
            2..=8 => Sizes::One(block),
            9..=32 => Sizes::One(64 << 10),
            _ if jobs == 1 => Sizes::One(1 << 20),
            _ => Sizes::One(4 << 10),
        };
        let load = Load {
            sizes,
            // At this depth each block is discarded before it is written.
            discards: depth == 8,
            depth,
            jobs,
            each_mib: (run_mib / u64::from(jobs)).max(4),
            seed: u64::from(depth) * 1000 + u64::from(jobs),
        };
        ensure!(
            load.each_mib * u64::from(jobs) * MIB <= limit_bytes,
            "the disk is too small for {jobs} writers"
        );
        load.run(cx, &self.device, block)
    }
}

/// The sizes of a load's requests.
#[derive(Clone, Copy, Debug)]
pub enum Sizes {
    /// One block to 1 MiB, mixed. fio verifies a mix only as long as one request follows the other:
    /// with more under way it loses count of what overlaps, on any disk.
    Mixed,
    /// All of this many bytes.
    One(u64),
}

/// One run of fio: random reads and writes with checksums, and flushes among them.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Of the requests.
    pub sizes: Sizes,
    /// Each block is discarded before it is written, and nothing is read meanwhile.
    pub discards: bool,
    /// Requests under way, per writer.
    pub depth: u32,
    /// Writers, one behind the other on the disk.
    pub jobs: u32,
    /// What each of them has of the disk, in MiB.
    pub each_mib: u64,
    /// Another seed, other places.
    pub seed: u64,
}

impl Load {
    /// Runs it from the beginning of the disk, whose smallest request is `block` bytes.
    pub fn run(&self, cx: &Context, device: &Path, block: u64) -> Result<()> {
        let (what, sizes) = match self.sizes {
            Sizes::Mixed => ("bssplit", format!("{block}/35:4k/35:20k/10:64k/12:1m/8")),
            Sizes::One(bytes) => ("bs", bytes.to_string()),
        };
        let pattern = match self.discards {
            true => "randtrimwrite",
            false => "randrw",
        };
        let report = Fio::new(device)
            .option(what, sizes)
            .option("rw", pattern)
            .option("fsync", 24)
            .option("offset_increment", format!("{}m", self.each_mib))
            .option("randseed", self.seed)
            .size(&format!("{}m", self.each_mib))
            .depth(self.depth)
            .jobs(self.jobs)
            .verify()
            .limit(cx.patience(120))
            .run()
            .with_context(|| format!("{self:?}"))?;
        ensure!(report.writes() > 0, "nothing was written: {report:?}");
        ensure!(
            !self.discards || report.trims() > 0,
            "nothing was discarded: {report:?}"
        );
        ensure!(
            report.reads() > report.writes() / 2,
            "too little was read back: {} reads, {} writes, {self:?}",
            report.reads(),
            report.writes()
        );
        Ok(())
    }
}

/// Requests of all kinds came through a door, as its part of `stat` says, and none failed.
pub fn all_kinds_came(door: &Value) -> Result<()> {
    let counters = &door["counters"];
    for what in ["reads", "writes", "discards", "write_zeroes"] {
        let came = counters[what].as_u64() > Some(0);
        ensure!(came, "no {what} reached the server: {counters}");
    }
    ensure!(counters["errors"] == 0, "requests failed: {counters}");
    Ok(())
}

/// Fills a part of the disk, then zeroes (with and without unmapping) and discards pieces of it
/// at odd places, and compares all of it after each step.
pub fn zeroes_and_discards(device: &Path, block: u64, from: u64, to: u64, seed: u64) -> Result<()> {
    let len = (to - from).min(8 * MIB);
    let disk = open_direct(device)?;
    let mut model = Random(from ^ seed).bytes(usize::try_from(len)?);
    write_direct(&disk, from, &model)?;
    let mut random = Random(len ^ seed);
    for round in 0..12 {
        let first = random.below(len / block) * block;
        let longest = (len - first).min(MIB);
        let count = (random.below(longest / block) + 1) * block;
        // By force: it would want the disk for itself, and meanwhile the kernel refuses fio's
        // discards as busy.
        let mut command = Shell::new("blkdiscard")
            .arg("--force")
            .args(["--offset", &(from + first).to_string()])
            .args(["--length", &count.to_string()]);
        let zeroes = round % 3 != 2;
        if zeroes {
            command = command.arg("--zeroout");
        }
        command.arg(device).run()?;
        let (first, count) = (usize::try_from(first)?, usize::try_from(count)?);
        let got = read_direct(&disk, from, model.len())?;
        let range = &mut model[first..first + count];
        if zeroes {
            range.fill(0);
        } else {
            // What a discarded block reads as is the disk's choice.
            range.copy_from_slice(&got[first..first + count]);
        }
        if let Some(at) = got.iter().zip(&model).position(|(a, b)| a != b) {
            bail!(
                "after {} of {count} bytes at {first}, byte {at} is wrong",
                if zeroes { "zeroing" } else { "discarding" }
            );
        }
    }
    Ok(())
}

/// Opens a disk around the page cache.
pub fn open_direct(device: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::DIRECT.bits())?)
        .open(device)
        .with_context(|| format!("cannot open {}", device.display()))
}

/// A buffer that O_DIRECT takes: page-aligned inside a larger one.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let bytes = vec![0u8; len + 4096];
    let start = bytes.as_ptr().align_offset(4096);
    (bytes, start)
}

/// Writes around the page cache.
pub fn write_direct(disk: &File, at: u64, data: &[u8]) -> Result<()> {
    let (mut bytes, start) = aligned(data.len());
    bytes[start..start + data.len()].copy_from_slice(data);
    disk.write_all_at(&bytes[start..start + data.len()], at)
        .with_context(|| format!("cannot write {} bytes at {at}", data.len()))
}

/// Reads around the page cache.
pub fn read_direct(disk: &File, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let (mut bytes, start) = aligned(len);
    disk.read_exact_at(&mut bytes[start..start + len], at)?;
    Ok(bytes[start..start + len].to_vec())
}
