//! Changes of the queue and of the processors while verified I/O runs.

use super::{DISK_BYTES, serve};
use crate::kit::beside::beside;
use crate::kit::sysfs::Sysfs;
use crate::suites::io::{Load, Sizes};
use crate::test::Context;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use testkit::server::Serve;

/// Verified I/O of four writers, and something else meanwhile, again and again.
fn under_load(
    cx: &Context,
    device: &Path,
    mut something: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let load = |over: &AtomicBool| {
        let mut rounds = 0;
        while !over.load(Ordering::Relaxed) {
            rounds += 1;
            let load = Load {
                sizes: Sizes::One(4096),
                discards: false,
                depth: 16,
                jobs: 4,
                each_mib: 2,
                seed: rounds,
            };
            load.run(cx, device, 512)?;
        }
        Ok(rounds)
    };
    let (rounds, ()) = beside(load, || {
        let started = Instant::now();
        for count in 0.. {
            if count >= 12 && started.elapsed() >= Duration::from_secs(2) {
                break;
            }
            something(count).with_context(|| format!("change {count}"))?;
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })?;
    ensure!(rounds > 0, "there was no load");
    Ok(())
}

pub(super) fn schedulers_change_under_load(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, &cx.file(DISK_BYTES)?)?;
    let (disk, scheduler) = (Sysfs::of(&device)?, "queue/scheduler");
    let all = disk.get(scheduler)?.replace(['[', ']'], "");
    let names: Vec<&str> = all.split_whitespace().collect();
    ensure!(names.len() >= 3, "this kernel has only {names:?}");
    under_load(cx, &device, |count| {
        let name = names[count % names.len()];
        disk.set(scheduler, name)?;
        let chosen = disk.get(scheduler)?;
        ensure!(
            chosen.contains(&format!("[{name}]")),
            "{chosen}, not {name}"
        );
        Ok(())
    })?;
    server.stop().map(drop)
}

pub(super) fn attributes_of_the_queue_change_under_load(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, &cx.file(DISK_BYTES)?)?;
    let disk = Sysfs::of(&device)?;
    let largest = disk.get("queue/max_hw_sectors_kb")?;
    let values: [(&str, &[&str]); 7] = [
        ("nr_requests", &["8", "64", "128"]),
        ("read_ahead_kb", &["0", "128", "4096"]),
        ("nomerges", &["0", "1", "2"]),
        ("rq_affinity", &["0", "1", "2"]),
        ("iostats", &["0", "1"]),
        ("max_sectors_kb", &["4", "64", &largest]),
        ("write_cache", &["write through", "write back"]),
    ];
    under_load(cx, &device, |count| {
        for (name, values) in values {
            let value = values[count % values.len()];
            let path = format!("queue/{name}");
            disk.set(&path, value)?;
            let now = disk.get(&path)?;
            ensure!(now == value, "{name} is {now}, not {value}");
        }
        Ok(())
    })?;
    server.stop().map(drop)
}

/// A processor that comes back when this is dropped.
struct Offline(PathBuf);

impl Drop for Offline {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.0, "1") {
            eprintln!("{error}");
        }
    }
}

fn take_away(cpu: usize) -> Result<Offline> {
    let online = PathBuf::from(format!("/sys/devices/system/cpu/cpu{cpu}/online"));
    fs::write(&online, "0")?;
    Ok(Offline(online))
}

/// Four queues on four processors.
fn a_queue_for_each_processor(cx: &Context) -> Result<Serve> {
    Ok(cx
        .serve()
        .ublk("yes")
        .args(["--queues", "4"])
        .arg(cx.file(DISK_BYTES)?))
}

/// Queues are mapped to processors; the last processor of a queue takes its requests along.
pub(super) fn processors_go_and_come_under_load(cx: &Context) -> Result<()> {
    let server = a_queue_for_each_processor(cx)?
        .args(["--ublk-affinity"])
        .start()?;
    under_load(cx, &server.block_device()?, |count| {
        let _first = take_away(1 + count % 3)?;
        let _second = take_away(1 + (count + 1) % 3)?;
        thread::sleep(Duration::from_millis(50));
        Ok(())
    })?;
    server.stop().map(drop)
}

pub(super) fn queues_whose_processors_are_away_are_served(cx: &Context) -> Result<()> {
    let (one, other) = (take_away(2)?, take_away(3)?);
    let refused = a_queue_for_each_processor(cx)?
        .args(["--ublk-affinity"])
        .start();
    let why = format!("{:#}", refused.err().context("it was served after all")?);
    ensure!(why.contains("cannot run on processor"), "{why}");
    let server = a_queue_for_each_processor(cx)?.start()?;
    let mut away = vec![one, other];
    under_load(cx, &server.block_device()?, |_| {
        thread::sleep(Duration::from_millis(100));
        // They come back one by one.
        away.pop();
        Ok(())
    })?;
    server.stop().map(drop)
}
