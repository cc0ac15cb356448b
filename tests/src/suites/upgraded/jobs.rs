//! What reads the disk, as a program on the block device and as one that upgrades.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::findings::{Bench, Load};
use crate::bench::attach::Client;
use crate::bench::client::{End, Order};
use crate::kit::fio::Fio;
use crate::test::Context;

/// How long a job runs.
pub(super) const JOB_SECONDS: u32 = 8;

/// A fio job: 4 KiB random reads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) disk: PathBuf,
    pub(super) load: Load,
}

pub(super) fn random_reads(cx: &Context, job: &Job) -> Result<Bench> {
    let mut fio = Fio::new(&job.disk)
        .depth(job.load.depth)
        .size("64m")
        .option("time_based", 1)
        .option("runtime", JOB_SECONDS)
        .limit(cx.patience(120));
    if job.load.at_once > 1 {
        fio = fio
            .option("iodepth_batch_submit", job.load.at_once)
            .option("iodepth_batch_complete_min", job.load.at_once)
            .option("registerfiles", 1)
            .option("fixedbufs", 1)
            .option("norandommap", 1);
    }
    let report = fio.run()?;
    let latency = report.read_latency().context("fio told no latency")?;
    Ok(Bench {
        requests: report.reads(),
        iops: report.iops(),
        mean_us: latency.mean_us,
        p99_us: Some(latency.p99_us),
    })
}

/// The same by a program that has opened the block device and connects to what is behind it.
pub(super) fn upgraded_reads(disk: &Path, depth: u32, server: u32) -> Result<Bench> {
    // Client and server share the only processor: who looks at them gets his turns late.
    let window = End::Milliseconds(u64::from(JOB_SECONDS) * 1500);
    let order = Order {
        upgrades: true,
        depth: depth as usize,
        ..Order::reads(disk, server, window)
    };
    let answer = Client::start(&order)?.finish()?;
    Ok(Bench {
        requests: answer.requests,
        iops: answer.iops,
        // Little's law.
        mean_us: f64::from(depth) / answer.iops * 1e6,
        p99_us: None,
    })
}
