//! The ublk door against the kernel's own ublk server, rublk and the loop driver: fio on the block
//! device, all in one emulated PC, in turn.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use testkit::process;
use testkit::server::Server;
use testkit::shell::{Shell, last_lines};
use testkit::wait::until;

use super::Settings;
use super::client::Percentiles;
use super::figures::Samples;
use super::record::{Candidate, Document, Row};
use super::usage::Usage;
use crate::kernel::Kernel;
use crate::kernel::build::{self, Product};
use crate::kit::fio::Fio;
use crate::machine::{Machine, Qemu};
use crate::packages::crates;
use crate::test;
use crate::test::{Context, Test};

/// The lane's name.
pub const LANE: &str = "vm";

/// What runs in the machine.
pub const STEPS: &[Test] = &[test!(bench_block_device).limit_s(120)];

/// Ours, in tables.
pub const OURS: &str = "ublkup";
/// Ours, without looking for work.
const OURS_SLEEPING: &str = "ublkup --poll-us 0";
/// Ours, with a copy where the others have none.
const OURS_COPYING: &str = "ublkup --ublk-data copy";
/// The kernel's own.
pub const KUBLK: &str = "kublk";
/// The kernel's own, with commands in batches (`UBLK_F_BATCH_IO`).
const KUBLK_BATCH: &str = "kublk -b";
/// The kernel's own, with buffers it registers itself.
pub const KUBLK_ZERO_COPY: &str = "kublk -z";
/// The kernel's own, with buffers that the driver registers.
pub const KUBLK_AUTO: &str = "kublk --auto_zc";
/// rublk.
pub const RUBLK: &str = "rublk";
/// rublk with buffers that the driver registers.
const RUBLK_ZERO_COPY: &str = "rublk -z";
/// The kernel's loop driver.
const LOOP: &str = "loop driver";

/// The tables.
pub const NULL: &str = "null: 4 KiB random reads of the block device";
/// Where copying would show.
pub const LARGE: &str = "null: 64 KiB random reads of the block device";
const FILE: &str = "file on tmpfs: 4 KiB random reads of the block device";

/// Who serves a block device in the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Peer {
    /// Ours.
    Ublkup {
        /// What it is told beyond the usual.
        args: Vec<String>,
    },
    /// kublk or rublk.
    Ublk {
        /// The program.
        binary: PathBuf,
        /// What it is told beyond the usual; the file comes last.
        args: Vec<String>,
    },
    /// The loop driver.
    Loop,
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    peer: Peer,
    file: bool,
    queues: u32,
    depth: u32,
    block_bytes: u32,
    milliseconds: u64,
    /// Reads, writes and flushes, as [`mixed`](super::mixed) says.
    mixed: bool,
}

/// What it found.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Found {
    /// Requests per second.
    pub iops: f64,
    /// Microseconds of processor time of the server for a request.
    pub cpu_us_per_io: Option<f64>,
    latency: Option<Percentiles>,
}

/// A table's row before it is measured.
struct Load {
    title: &'static str,
    words: String,
    queues: u32,
    depth: u32,
    block_bytes: u32,
    peers: Vec<(&'static str, Peer)>,
}

/// Measures; what cannot be built is left out.
pub fn run(settings: &Settings, document: &mut Document) -> Result<()> {
    let paths = settings.prepare(&[Kernel::X86], true)?;
    let kublk = kublk(settings, document, LANE);
    let rublk = match settings.no_peers {
        true => None,
        false => peer_program(document, LANE, "rublk", crates::RUBLK.program()),
    };
    let mut loads = loads(settings, kublk.as_deref(), rublk.as_deref());
    loads.retain(|load| settings.wants(LANE, load.title, &load.words));
    if loads.is_empty() {
        return Ok(());
    }
    let processors = u32::try_from(std::thread::available_parallelism()?.get())?.clamp(2, 4);
    let kernel = paths.kernel(Kernel::X86)?;
    let machine = Qemu::new(kernel).processors(processors).memory_mib(4096);
    let mut machine = Machine::boot(&machine, &paths, "bench-vm")?;
    eprintln!(
        "lab: vm: Linux {}, {processors} processors",
        machine.kernel()
    );
    for load in loads {
        let row = measure(settings, &mut machine, &load);
        document.keep(row.with_context(|| format!("{}, {}", load.title, load.words))?);
    }
    machine.power_off();
    Ok(())
}

/// What was built of a peer; the document says why it is left out.
fn peer_program(
    document: &mut Document,
    lane: &str,
    name: &str,
    built: Result<PathBuf>,
) -> Option<PathBuf> {
    built
        .map_err(|error| {
            document.leave_out(format!("{lane}: {name}: {error:#}").replace('\n', "; "));
        })
        .ok()
}

/// The kernel's own ublk server, of the same source as the kernel, if it is wanted and can be built.
pub fn kublk(settings: &Settings, document: &mut Document, lane: &str) -> Option<PathBuf> {
    if settings.no_peers {
        return None;
    }
    let made = build::ensure(&settings.repo, &[Product::Kublk], settings.yes)
        .and_then(|made| made.into_iter().next().context("nothing was built"));
    peer_program(document, lane, KUBLK, made)
}

/// Who serves a file as a block device, ours first.
pub fn peers_of_a_file(kublk: Option<&Path>, others: bool) -> Vec<(&'static str, Peer)> {
    let ours = |name, args: &[&str]| {
        let args = args.iter().map(ToString::to_string).collect();
        (name, Peer::Ublkup { args })
    };
    let mut peers = vec![ours(OURS, &[]), ours(OURS_SLEEPING, &["--poll-us", "0"])];
    peers.extend(kublk.map(|binary| {
        let args = ["-t", "loop"].map(str::to_owned).to_vec();
        let binary = binary.to_owned();
        (KUBLK, Peer::Ublk { binary, args })
    }));
    peers.extend(others.then_some((LOOP, Peer::Loop)));
    peers
}

/// A mixed load on a file that a peer serves in a machine.
pub fn mixed(
    machine: &mut Machine,
    peer: &Peer,
    milliseconds: u64,
) -> Result<(Found, Percentiles)> {
    let job = Job {
        peer: peer.clone(),
        file: true,
        queues: 1,
        depth: u32::try_from(super::mixed::DEPTH)?,
        block_bytes: 4096,
        milliseconds,
        mixed: true,
    };
    let found: Found = machine.run_step("bench_block_device", &job)?;
    let latency = found.latency.context("fio told no percentiles")?;
    Ok((found, latency))
}

fn loads(settings: &Settings, kublk: Option<&Path>, rublk: Option<&Path>) -> Vec<Load> {
    let ublk = |name, binary: Option<&Path>, args: &[&str]| {
        let binary = binary?.to_owned();
        let args = args.iter().map(|&word| word.to_owned()).collect();
        Some((name, Peer::Ublk { binary, args }))
    };
    let ours = |name, args: &[&str]| {
        let args = args.iter().map(ToString::to_string).collect();
        Some((name, Peer::Ublkup { args }))
    };
    let null = [
        ours(OURS, &[]),
        ours(OURS_SLEEPING, &["--poll-us", "0"]),
        ublk(KUBLK, kublk, &["-t", "null"]),
        ublk(KUBLK_BATCH, kublk, &["-t", "null", "-b"]),
        ublk(RUBLK, rublk, &["null"]),
    ];
    let large = [
        ours(OURS, &["--ublk-data", "zero-copy"]),
        ours(OURS_COPYING, &["--ublk-data", "copy"]),
        ublk(KUBLK_ZERO_COPY, kublk, &["-t", "null", "-z"]),
        ublk(KUBLK_AUTO, kublk, &["-t", "null", "--auto_zc"]),
        ublk(RUBLK_ZERO_COPY, rublk, &["null", "-z"]),
    ];
    let file = [ours(OURS, &[]), Some((LOOP, Peer::Loop))];
    let load = |title, queues: u32, depth, block_bytes, peers: &[Option<(_, Peer)>]| Load {
        title,
        words: match queues {
            1 => format!("1 queue, depth {depth}"),
            _ => format!("{queues} queues, depth {depth}"),
        },
        queues,
        depth,
        block_bytes,
        peers: peers.iter().flatten().cloned().collect(),
    };
    let mut all = vec![load(NULL, 1, 32, 4096, &null)];
    if !settings.quick {
        all.push(load(NULL, 1, 1, 4096, &null));
        all.push(load(NULL, 2, 32, 4096, &null));
        all.push(load(NULL, 2, 1, 4096, &null));
    }
    all.push(load(LARGE, 1, 32, 65536, &large));
    all.push(load(FILE, 1, 32, 4096, &file));
    all
}

fn measure(settings: &Settings, machine: &mut Machine, load: &Load) -> Result<Row> {
    let found = settings.interleaved(load.peers.len(), |index| {
        let (name, peer) = &load.peers[index];
        let job = Job {
            peer: peer.clone(),
            file: load.title == FILE,
            queues: load.queues,
            depth: load.depth,
            block_bytes: load.block_bytes,
            milliseconds: settings.window_ms * 2,
            mixed: false,
        };
        let one = machine.run_step("bench_block_device", &job);
        one.with_context(|| (*name).to_owned()).map(Some)
    })?;
    let mut candidates = Vec::new();
    for ((name, _), found) in load.peers.iter().zip(found) {
        let found: Vec<Found> = found;
        let cpu: Vec<f64> = found.iter().filter_map(|one| one.cpu_us_per_io).collect();
        candidates.push(Candidate {
            name: (*name).to_owned(),
            iops: Samples::of_each(&found, |one| one.iops).context("no round was measured")?,
            cpu_us_per_io: Samples::of(&cpu),
            ..Candidate::default()
        });
    }
    Ok(Row {
        lane: LANE.to_owned(),
        title: load.title.to_owned(),
        load: load.words.clone(),
        candidates,
    })
}

/// A served block device in the machine.
struct Device {
    path: PathBuf,
    /// Its server; the loop driver has none.
    pid: Option<u32>,
    how: How,
}

enum How {
    Ublkup(Server),
    Ublk { child: Child, binary: PathBuf },
    Loop,
}

/// The number of the device that kublk and rublk make.
const NUMBER: &str = "7";

fn bench_block_device(cx: &Context) -> Result<()> {
    let job: Job = cx.args()?;
    let device = start(cx, &job)?;
    let used = || device.pid.map(Usage::of).transpose();
    let before = used()?;
    let mut fio = Fio::new(&device.path);
    if job.mixed {
        fio = super::mixed::job(fio);
    }
    let report = fio
        .option("bs", job.block_bytes)
        .option("numjobs", job.queues)
        .option("time_based", 1)
        .option("runtime", format!("{}ms", job.milliseconds))
        .size("256m")
        .depth(job.depth)
        .limit(cx.patience(60))
        .run()?;
    let cpu_us_per_io = used()?
        .zip(before)
        .map(|(after, before)| after.since(before).cpu_ns as f64 / 1e3 / report.requests() as f64);
    stop(cx, device)?;
    cx.reply(&Found {
        iops: report.iops(),
        cpu_us_per_io,
        latency: super::mixed::percentiles(&report),
    })
}

fn start(cx: &Context, job: &Job) -> Result<Device> {
    let image = cx.scratch().join("disk.img");
    if job.file {
        let fill = format!("of={}", image.display());
        Shell::new("dd")
            .args(["if=/dev/zero", &fill, "bs=1M", "count=256", "status=none"])
            .run()?;
    }
    let queues = job.queues.to_string();
    match &job.peer {
        Peer::Ublkup { args } => {
            let spec = if job.file {
                format!("file:{},cache=buffered", image.display())
            } else {
                "null:1G".to_owned()
            };
            let server = cx
                .serve()
                .ublk("yes")
                .args(["--vhost", "no", "--name", "bench", "--queues", &queues])
                .args(args)
                .arg(spec)
                .start()?;
            Ok(Device {
                path: server.block_device()?,
                pid: Some(server.pid()),
                how: How::Ublkup(server),
            })
        }
        Peer::Ublk { binary, args } => {
            let log = cx.scratch().join("peer.log");
            let output = File::create(&log).context("cannot create a log")?;
            let file = job.file.then_some(&image);
            let mut child = process::spawn_bound(
                Command::new(binary)
                    .arg("add")
                    .args(args)
                    .args(["-n", NUMBER, "-q", &queues, "-d", "128", "--foreground"])
                    .args(file)
                    .stdin(Stdio::null())
                    .stdout(output.try_clone().context("cannot share a log")?)
                    .stderr(output),
            )?;
            let path = PathBuf::from(format!("/dev/ublkb{NUMBER}"));
            until("there is a device", cx.patience(20), || {
                let ended = child.try_wait().context("cannot look at a server")?;
                ensure!(ended.is_none(), "the server ended with {ended:?}");
                Ok(path.exists())
            })
            .with_context(|| {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                format!(
                    "{}; it said:
{}",
                    binary.display(),
                    last_lines(&said, 10)
                )
            })?;
            Ok(Device {
                path,
                pid: Some(child.id()),
                how: How::Ublk {
                    child,
                    binary: binary.clone(),
                },
            })
        }
        Peer::Loop => {
            let losetup = Shell::new("losetup").args(["--find", "--show"]).arg(&image);
            Ok(Device {
                path: losetup.run()?.trim().into(),
                pid: None,
                how: How::Loop,
            })
        }
    }
}

fn stop(cx: &Context, device: Device) -> Result<()> {
    match device.how {
        How::Ublkup(server) => server.stop().map(drop),
        How::Ublk { mut child, binary } => {
            Shell::new(binary).args(["del", "-n", NUMBER]).run()?;
            let ended = process::wait_limited(&mut child, cx.patience(10))?;
            ensure!(ended.is_some(), "the server of a deleted device lives on");
            until("the device is gone", cx.patience(10), || {
                Ok(!device.path.exists())
            })
        }
        How::Loop => {
            let detach = Shell::new("losetup").arg("--detach").arg(&device.path);
            detach.run().map(drop)
        }
    }
}
