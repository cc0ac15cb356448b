//! The vhost door as two host processes see it: a client on one processor, a server on another,
//! ublkup and qemu-storage-daemon in turn.

pub mod allocator;
pub mod counts;
pub mod servers;
pub mod steps;

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result};

use self::servers::{Backend, DISK_BYTES, Files, Who};
use super::Settings;
use super::attach::Client;
use super::client::{Answer, End, Op, Order, Waiting};
use super::figures::Samples;
use super::record::{Candidate, Document, Row};
use super::usage::Usage;
use crate::kit::fio::Fio;

/// The lane's name.
pub const LANE: &str = "native";

/// A load on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// What is behind the disk.
    pub backend: Backend,
    /// What is asked for.
    pub op: Op,
    /// Requests in flight.
    pub depth: usize,
    /// How the client waits.
    pub waiting: Waiting,
}

impl Load {
    /// The title of its table.
    pub fn title(&self) -> String {
        let op = match self.op {
            Op::RandRead => "4 KiB random reads",
            Op::RandWrite => "4 KiB random writes",
            Op::Read => "128 KiB sequential reads",
            Op::Mixed => "4 KiB random reads and writes, flushes",
        };
        format!("{}: {op}", self.backend.name())
    }

    /// Its words in the table.
    pub fn words(&self) -> String {
        let waiting = match self.waiting {
            Waiting::Sleeps => "sleeps",
            Waiting::Polls => "polls",
        };
        format!("depth {}, client {waiting}", self.depth)
    }

    fn block_bytes(&self) -> usize {
        match self.op {
            Op::RandRead | Op::RandWrite | Op::Mixed => 4 << 10,
            Op::Read => 128 << 10,
        }
    }
}

/// The loads of a run.
pub fn loads(quick: bool) -> Vec<Load> {
    let mut all = Vec::new();
    for backend in Backend::ALL {
        for op in [Op::RandRead, Op::RandWrite, Op::Read] {
            for depth in [1, 32, 128] {
                for waiting in [Waiting::Sleeps, Waiting::Polls] {
                    let load = Load {
                        backend,
                        op,
                        depth,
                        waiting,
                    };
                    // The null disk moves nothing: all its requests are alike.
                    let same = backend == Backend::Null && op != Op::RandRead;
                    let short = op == Op::RandRead && depth != 128;
                    if !same && (!quick || short) {
                        all.push(load);
                    }
                }
            }
        }
    }
    all
}

/// The flags with which ours is measured.
const WAYS: [&[&str]; 3] = [&[], &["--poll-us", "0"], &["--poll-us", "always"]];

/// Who is measured: ours with every set of flags it knows, and the others.
pub fn candidates(settings: &Settings) -> Vec<Who> {
    let mut all = Vec::new();
    for (prefix, binary) in &settings.servers {
        for flags in WAYS {
            let known = flags
                .iter()
                .all(|flag| !flag.starts_with("--") || servers::knows(binary, flag));
            if known {
                let words = std::iter::once(prefix.as_str()).chain(flags.iter().copied());
                all.push(Who::Ublkup {
                    name: words.collect::<Vec<_>>().join(" "),
                    binary: binary.clone(),
                    flags,
                });
            }
        }
    }
    if !settings.no_peers {
        all.push(Who::Qemu);
    }
    all
}

/// fio itself on the file, which no server can beat.
pub const FIO: &str = "fio on the file";

/// Measures.
pub fn run(settings: &Settings, document: &mut Document) -> Result<()> {
    with_files(settings, |files| {
        loads(settings.quick)
            .iter()
            .filter(|load| settings.wants(LANE, &load.title(), &load.words()))
            .try_for_each(|load| {
                let candidates = candidates(settings);
                let measured = measure(settings, files, &candidates, load)
                    .with_context(|| format!("{}, {}", load.title(), load.words()))?;
                document.keep(measured);
                Ok(())
            })
    })
}

/// Does something with files behind disks, and removes them.
pub fn with_files(settings: &Settings, measure: impl FnOnce(&Files) -> Result<()>) -> Result<()> {
    let files = make_files(settings)?;
    let result = measure(&files);
    for file in [&files.direct, &files.tmpfs] {
        fs::remove_file(file).with_context(|| format!("cannot remove {}", file.display()))?;
    }
    result
}

/// Files full of data, so that no read is answered from a hole.
fn make_files(settings: &Settings) -> Result<Files> {
    let files = Files {
        scratch: settings.scratch.path().to_owned(),
        direct: settings.work.join("disk.img"),
        tmpfs: Path::new("/dev/shm").join(format!("ublkup-bench-{}.img", std::process::id())),
    };
    let mut piece = vec![0u8; 1 << 20];
    for (index, byte) in piece.iter_mut().enumerate() {
        *byte = u8::try_from(index % 251)?;
    }
    for path in [&files.direct, &files.tmpfs] {
        let mut file =
            fs::File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        for _ in 0..DISK_BYTES / piece.len() as u64 {
            file.write_all(&piece)
                .with_context(|| format!("cannot fill {}", path.display()))?;
        }
        file.sync_all().context("cannot write a file out")?;
    }
    Ok(files)
}

fn measure(settings: &Settings, files: &Files, candidates: &[Who], load: &Load) -> Result<Row> {
    let is_file = matches!(load.backend, Backend::Direct | Backend::Tmpfs);
    let with_fio = !settings.no_peers && is_file;
    let all = candidates.len() + usize::from(with_fio);
    let found = settings.interleaved(all, |index| match candidates.get(index) {
        Some(who) => once(settings, files, who, load)
            .with_context(|| who.name().to_owned())
            .map(Some),
        None => Ok(Some(Answer {
            iops: fio_on_file(settings, files, load)?.run()?.iops(),
            ..Answer::default()
        })),
    })?;
    let mut row = Row {
        lane: LANE.to_owned(),
        title: load.title(),
        load: load.words(),
        candidates: Vec::new(),
    };
    for (who, found) in candidates.iter().zip(&found) {
        let counts = if settings.no_counts {
            counts::Counts::default()
        } else {
            counts::of(settings, files, who, load)
                .with_context(|| format!("counting for {}", who.name()))?
        };
        let per_io = |of: fn(Usage) -> f64| {
            Samples::of_each(found, |one| of(one.server) / one.requests as f64)
        };
        row.candidates.push(Candidate {
            name: who.name().to_owned(),
            iops: Samples::of_each(found, |one| one.iops).context("no round was measured")?,
            cpu_us_per_io: per_io(|used| used.cpu_ns as f64 / 1e3),
            waits_per_io: per_io(|used| used.waits as f64),
            syscalls_per_io: counts.syscalls,
            instructions_per_io: counts.instructions,
            latency_us: None,
        });
    }
    let fio = found.get(candidates.len());
    let fio = fio.and_then(|found| Samples::of_each(found, |one| one.iops));
    row.candidates.extend(fio.map(|iops| Candidate {
        name: FIO.to_owned(),
        iops,
        ..Candidate::default()
    }));
    Ok(row)
}

/// A server, a connection, a load.
pub fn once(settings: &Settings, files: &Files, who: &Who, load: &Load) -> Result<Answer> {
    let socket = files.scratch.join("bench.sock");
    let server = servers::start(who, load.backend, files, &socket, settings.server_cpu)?;
    let answer = attach(
        settings,
        load,
        &socket,
        server.pid(),
        End::Milliseconds(settings.window_ms),
    )?;
    server.stop()?;
    Ok(answer)
}

/// Runs the client on a socket and waits for what it says.
fn attach(
    settings: &Settings,
    load: &Load,
    socket: &Path,
    server: u32,
    window: End,
) -> Result<Answer> {
    let order = Order {
        op: load.op,
        block_bytes: load.block_bytes(),
        depth: load.depth,
        waiting: load.waiting,
        cpu: settings.client_cpu,
        warm_up: match window {
            End::Milliseconds(ms) => End::Milliseconds((ms / 5).max(50)),
            End::Requests(_) => End::Requests(load.depth as u64),
        },
        ..Order::reads(socket, server, window)
    };
    Client::start(&order)?.finish()
}

/// The same load by fio on the file, with no server between. What [`Op::Mixed`] does is still to be said.
pub fn fio_on_file(settings: &Settings, files: &Files, load: &Load) -> Result<Fio> {
    let (file, direct) = match load.backend {
        Backend::Direct => (&files.direct, 1),
        _ => (&files.tmpfs, 0),
    };
    let rw = match load.op {
        Op::RandRead => "randread",
        Op::RandWrite => "randwrite",
        Op::Read => "read",
        Op::Mixed => "randrw",
    };
    let ms = settings.window_ms;
    let batch = u32::try_from(load.depth)?;
    Ok(Fio::new(file)
        .option("direct", direct)
        .option("rw", rw)
        .option("bs", load.block_bytes())
        .option("iodepth_batch_submit", batch)
        .option("iodepth_batch_complete_max", batch)
        .option("time_based", 1)
        .option("ramp_time", format!("{}ms", (ms / 5).max(50)))
        .option("runtime", format!("{ms}ms"))
        .option("cpus_allowed", settings.client_cpu)
        .depth(batch))
}
