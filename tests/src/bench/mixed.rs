//! How long requests take under a mixed load: seven random reads to three random writes of 4 KiB, depth 8, a flush
//! after each 32 writes; at the vhost-user door as two host processes, and of the block device in User Mode Linux.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::Settings;
use super::client::{Answer, Op, Percentiles, WRITES_TO_A_FLUSH, Waiting};
use super::figures::Samples;
use super::native::servers::{Backend, Files};
use super::native::{self, Load};
use super::record::{Candidate, Document, Latency, Row};
use super::vm;
use crate::kernel::Kernel;
use crate::kit::fio::{Fio, Report};
use crate::machine::{Machine, Uml};

/// The lane's name.
pub const LANE: &str = "mixed";

/// Requests in flight.
pub const DEPTH: usize = 8;

/// The title of the table of the block device.
pub const BLOCK: &str = "block device of a file on tmpfs, in User Mode Linux";

/// What is asked for, in tables.
pub const WORDS: &str = "70/30, depth 8, a flush after 32 writes";

/// fio's job for the same load.
pub fn job(fio: Fio) -> Fio {
    fio.option("rw", "randrw")
        .option("rwmixread", 70)
        .option("fsync", WRITES_TO_A_FLUSH)
        .option("unified_rw_reporting", 1)
        .option("norandommap", 1)
}

/// The percentiles that fio told.
pub fn percentiles(report: &Report) -> Option<Percentiles> {
    let of = |percent| report.mixed_percentile_us(percent);
    Some(Percentiles {
        p50: of("50.000000")?,
        p99: of("99.000000")?,
        p99_9: of("99.900000")?,
    })
}

/// Measures.
pub fn run(settings: &Settings, document: &mut Document) -> Result<()> {
    let loads = [Backend::Direct, Backend::Tmpfs].map(|backend| Load {
        backend,
        op: Op::Mixed,
        depth: DEPTH,
        waiting: Waiting::Sleeps,
    });
    let mut loads = loads.to_vec();
    loads.retain(|load| settings.wants(LANE, &title(load), WORDS));
    if !loads.is_empty() {
        native::with_files(settings, |files| {
            for load in &loads {
                let row = vhost_door(settings, files, load).with_context(|| title(load))?;
                document.keep(row);
            }
            Ok(())
        })?;
    }
    if settings.wants(LANE, BLOCK, WORDS) {
        if settings.servers.len() == 1 {
            block_door(settings, document).context(BLOCK)?;
        } else {
            document.leave_out(format!(
                "{LANE}: {BLOCK}: --compare is for the vhost-user door"
            ));
        }
    }
    Ok(())
}

/// The title of a table of the vhost-user door.
fn title(load: &Load) -> String {
    format!("vhost-user, {}", load.backend.name())
}

/// What one round found.
struct Found {
    iops: f64,
    cpu_us_per_io: Option<f64>,
    latency: Percentiles,
}

fn vhost_door(settings: &Settings, files: &Files, load: &Load) -> Result<Row> {
    let candidates = native::candidates(settings);
    let mut names: Vec<&str> = candidates.iter().map(native::servers::Who::name).collect();
    if !settings.no_peers {
        names.push(native::FIO);
    }
    let found = settings.interleaved(names.len(), |index| {
        let found = match candidates.get(index) {
            Some(who) => native::once(settings, files, who, load).and_then(by_client),
            None => by_fio(settings, files, load),
        };
        found.with_context(|| names[index].to_owned()).map(Some)
    })?;
    row(&title(load), &names, &found)
}

fn by_client(answer: Answer) -> Result<Found> {
    Ok(Found {
        iops: answer.iops,
        cpu_us_per_io: Some(answer.server.cpu_ns as f64 / 1e3 / answer.requests as f64),
        latency: answer.latency_us.context("the client noted no times")?,
    })
}

fn by_fio(settings: &Settings, files: &Files, load: &Load) -> Result<Found> {
    let report = job(native::fio_on_file(settings, files, load)?).run()?;
    Ok(Found {
        iops: report.iops(),
        cpu_us_per_io: None,
        latency: percentiles(&report).context("fio told no percentiles")?,
    })
}

/// The block device, against the kernel's own ublk server and the loop driver.
fn block_door(settings: &Settings, document: &mut Document) -> Result<()> {
    let paths = settings.prepare(&[Kernel::Uml], true)?;
    let kublk = vm::kublk(settings, document, LANE);
    let peers = vm::peers_of_a_file(kublk.as_deref(), !settings.no_peers);
    let kernel: &Path = paths.kernel(Kernel::Uml)?;
    let mut machine = Machine::boot(&Uml::new(kernel), &paths, "bench-mixed")?;
    let names: Vec<&str> = peers.iter().map(|(name, _)| *name).collect();
    let found = settings.interleaved(peers.len(), |index| {
        let found = vm::mixed(&mut machine, &peers[index].1, settings.window_ms * 2);
        let (one, latency) = found.with_context(|| names[index].to_owned())?;
        Ok(Some(Found {
            iops: one.iops,
            cpu_us_per_io: one.cpu_us_per_io,
            latency,
        }))
    })?;
    machine.power_off();
    document.keep(row(BLOCK, &names, &found)?);
    Ok(())
}

fn row(title: &str, names: &[&str], found: &[Vec<Found>]) -> Result<Row> {
    let candidate = |(name, found): (&&str, &Vec<Found>)| -> Result<Candidate> {
        let cpu: Vec<f64> = found.iter().filter_map(|one| one.cpu_us_per_io).collect();
        let latencies: Vec<Percentiles> = found.iter().map(|one| one.latency).collect();
        Ok(Candidate {
            name: (*name).to_owned(),
            iops: Samples::of_each(found, |one| one.iops).context("no round was measured")?,
            cpu_us_per_io: Samples::of(&cpu),
            latency_us: Latency::of(&latencies),
            ..Candidate::default()
        })
    };
    Ok(Row {
        lane: LANE.to_owned(),
        title: title.to_owned(),
        load: WORDS.to_owned(),
        candidates: names
            .iter()
            .zip(found)
            .map(candidate)
            .collect::<Result<_>>()?,
    })
}
