//! Whether the guest uses a disk, as far as that can be seen from outside.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::disk::{Disk, device_of, list};
use super::refusal::refuse;
use crate::command::complain;
use crate::engine::qmp::Qmp;

/// How often the disk's counters are read.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The requests of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Activity {
    counts: [u64; 4],
    /// Time since the last one, if QEMU tells: it does not before the first one.
    idle: Option<Duration>,
}

/// Refuses a disk that had a request within the last `quiet`, or gets one while it is watched.
///
/// What a guest changed on a mounted disk before the watch is written out before the watch ends, if that is longer than
/// dirty pages live: a request. One that changes nothing makes none for hours, and is not found.
pub fn expect_quiet(qmp: &mut Qmp, disk: &Disk, quiet: Duration) -> Result<()> {
    let started = Instant::now();
    let first = activity(qmp, disk)?;
    let mut is_told = false;
    loop {
        let now = activity(qmp, disk)?;
        if now.counts != first.counts {
            return refuse("the guest is using the disk: unmount it in the guest first");
        }
        let never_used = now.counts.iter().all(|&count| count == 0);
        let idle = now.idle.unwrap_or(started.elapsed());
        if never_used || idle >= quiet {
            return Ok(());
        }
        let left = quiet - idle;
        if !is_told && left > POLL_INTERVAL {
            is_told = true;
            complain(&format!(
                "{}: it had a request {} s ago: watching it for {} s more",
                disk.id(),
                idle.as_secs(),
                left.as_secs() + 1
            ));
        }
        std::thread::sleep(left.min(POLL_INTERVAL));
    }
}

fn activity(qmp: &mut Qmp, disk: &Disk) -> Result<Activity> {
    let all = list(qmp, "query-blockstats", json!({}))?;
    let ours = all
        .iter()
        .find(|one| device_of(one).as_deref() == Some(&disk.device))
        .context("query-blockstats: the disk is missing")?;
    let stats = &ours["stats"];
    let counted = ["rd", "wr", "flush", "unmap"].map(|what| format!("{what}_operations"));
    Ok(Activity {
        counts: counted.map(|what| stats[what].as_u64().unwrap_or(0)),
        idle: stats["idle_time_ns"].as_u64().map(Duration::from_nanos),
    })
}
