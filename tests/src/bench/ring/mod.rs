//! Records through a pipe and through the rings that can take its place: two processes of the lab, on
//! this machine, in User Mode Linux and in an emulated PC, by each way in turn.

pub mod peer;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use testkit::process;
use testkit::shell::last_lines;

use self::peer::{Answer, Order, Role, SUBCOMMAND, Through};
use super::Settings;
use super::figures::{Samples, percentile};
use super::record::{Candidate, Document, Row};
use crate::kernel::Kernel;
use crate::machine::{Machine, Qemu, Uml};
use crate::test;
use crate::test::{Context, Test};

/// The lane's name.
pub const LANE: &str = "ring";

/// What runs in the machines.
pub const STEPS: &[Test] = &[test!(bench_ring).limit_s(120)];

/// The candidates, in tables.
pub const PIPE: &str = "read and write";
/// The kernel's ring.
pub const KERNEL: &str = "kernel ring";
/// The ring of the two processes.
pub const SHARED: &str = "shared ring";

const WAYS: [(&str, Through); 3] = [
    (PIPE, Through::Pipe),
    (KERNEL, Through::KernelRing),
    (SHARED, Through::SharedRing),
];

/// Where a pair runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// On this machine.
    Here,
    /// In User Mode Linux, which has one processor.
    Uml,
    /// In an emulated PC.
    Pc,
}

impl Where {
    /// All of them.
    pub const ALL: [Where; 3] = [Where::Here, Where::Uml, Where::Pc];

    /// Its words in a title.
    pub fn words(self) -> &'static str {
        match self {
            Where::Here => "natively",
            Where::Uml => "in User Mode Linux",
            Where::Pc => "in an emulated PC",
        }
    }

    /// The title of the table of records.
    pub fn records(self) -> String {
        format!("records, {}", self.words())
    }

    /// The title of the table of round trips.
    pub fn ping_pong(self) -> String {
        format!("ping-pong, {}", self.words())
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Job {
    through: Through,
    record_bytes: usize,
    ping_pong: bool,
    milliseconds: u64,
    /// Of the writer and of the reader.
    cpus: Option<(usize, usize)>,
}

/// What the two processes found; nothing if there was no such ring.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Found {
    per_second: f64,
    system_calls: f64,
    wakes: f64,
    sleeps: f64,
    cpu_us: f64,
    p50_us: f64,
}

/// Measures; a ring that a kernel does not have is left out.
pub fn run(settings: &Settings, document: &mut Document) -> Result<()> {
    for place in Where::ALL {
        let mut loads = loads(settings.quick);
        loads.retain(|(size, ping_pong)| {
            settings.wants(LANE, &title(place, *ping_pong), &words(*size))
        });
        if loads.is_empty() {
            continue;
        }
        let mut bench = Bench::start(settings, place)?;
        for (size, ping_pong) in loads {
            let measured = bench.measure(settings, size, ping_pong, document);
            measured.with_context(|| title(place, ping_pong))?;
        }
        if let Some(machine) = bench.machine {
            machine.power_off();
        }
    }
    Ok(())
}

/// Sizes of records, and whether they are thrown to and fro.
pub fn loads(quick: bool) -> Vec<(usize, bool)> {
    let sizes: &[usize] = if quick {
        &[16, 4096]
    } else {
        &[16, 64, 512, 4096]
    };
    let records = sizes.iter().map(|size| (*size, false));
    records.chain([(16, true)]).collect()
}

fn title(place: Where, ping_pong: bool) -> String {
    match ping_pong {
        true => place.ping_pong(),
        false => place.records(),
    }
}

/// The words of a load.
pub fn words(size: usize) -> String {
    format!("{size} bytes")
}

struct Bench {
    place: Where,
    machine: Option<Machine>,
}

impl Bench {
    fn start(settings: &Settings, place: Where) -> Result<Self> {
        let machine = match place {
            Where::Here => None,
            Where::Uml => {
                let paths = settings.prepare(&[Kernel::Uml], false)?;
                let uml = Uml::new(paths.kernel(Kernel::Uml)?);
                Some(Machine::boot(&uml, &paths, "bench-ring-uml")?)
            }
            Where::Pc => {
                let paths = settings.prepare(&[Kernel::X86], false)?;
                let pc = Qemu::new(paths.kernel(Kernel::X86)?).processors(2);
                Some(Machine::boot(&pc, &paths, "bench-ring-pc")?)
            }
        };
        if let Some(machine) = &machine {
            eprintln!("lab: ring: Linux {} {}", machine.kernel(), place.words());
        }
        Ok(Self { place, machine })
    }

    fn one(&mut self, settings: &Settings, job: &Job) -> Result<Option<Found>> {
        match &mut self.machine {
            Some(machine) => machine.run_step("bench_ring", job),
            None => pair(settings.scratch.path(), job),
        }
    }

    fn measure(
        &mut self,
        settings: &Settings,
        size: usize,
        ping_pong: bool,
        document: &mut Document,
    ) -> Result<()> {
        let cpus = match self.place {
            Where::Here => Some((settings.server_cpu, settings.client_cpu)),
            Where::Uml => None,
            Where::Pc => Some((1, 0)),
        };
        // This machine's kernel may use the numbers of those system calls for something else.
        let has_kernel_ring = self.machine.is_some();
        let found = settings.interleaved(WAYS.len(), |index| {
            let (name, through) = WAYS[index];
            let job = Job {
                through,
                record_bytes: size,
                ping_pong,
                milliseconds: settings.window_ms,
                cpus,
            };
            match name {
                KERNEL if !has_kernel_ring => Ok(None),
                _ => self.one(settings, &job).with_context(|| name.to_owned()),
            }
        })?;
        let place = self.place.words();
        let mut row = Row {
            lane: LANE.to_owned(),
            title: title(self.place, ping_pong),
            load: words(size),
            candidates: Vec::new(),
        };
        for ((name, _), found) in WAYS.iter().zip(&found) {
            let Some(iops) = Samples::of_each(found, |one| one.per_second) else {
                document.leave_out(format!("ring: {name} {place}: this kernel has none"));
                continue;
            };
            let series = |of: fn(&Found) -> f64| found.iter().map(of).collect::<Vec<_>>();
            row.candidates.push(Candidate {
                name: (*name).to_owned(),
                iops,
                cpu_us_per_io: Samples::of(&series(|one| one.cpu_us)),
                waits_per_io: Samples::of(&series(|one| one.sleeps)),
                syscalls_per_io: percentile(&series(|one| one.system_calls), 50.0),
                ..Candidate::default()
            });
            if ping_pong {
                let what = format!("{place}: {name}: half of the round trips took no longer than");
                document.measure(LANE, &what, "µs", &series(|one| one.p50_us));
            }
            if *name != PIPE {
                let way = if ping_pong { ", to and fro" } else { "" };
                let load = words(size);
                let what = format!("{place}: {name}: wake-ups for 1000 of {load}{way}");
                document.measure(LANE, &what, "", &series(|one| one.wakes * 1000.0));
            }
        }
        document.keep(row);
        Ok(())
    }
}

fn bench_ring(cx: &Context) -> Result<()> {
    let job: Job = cx.args()?;
    cx.reply(&pair(cx.scratch(), &job)?)
}

/// Two processes with a pipe between them, or with two.
fn pair(folder: &Path, job: &Job) -> Result<Option<Found>> {
    let (near, far) = match job.ping_pong {
        true => (Role::Ping, Role::Pong),
        false => (Role::Produce, Role::Consume),
    };
    let (there_out, there_in) = std::io::pipe().context("cannot make a pipe")?;
    let (back_out, back_in) = std::io::pipe().context("cannot make a pipe")?;
    let order = |role, name: &str, cpu| Order {
        role,
        through: job.through,
        record_bytes: job.record_bytes,
        milliseconds: job.milliseconds,
        cpu,
        runtime_dir: folder.join("ring-run"),
        answer: folder.join(name),
    };
    let orders = [
        order(near, "near.json", job.cpus.map(|cpus| cpus.0)),
        order(far, "far.json", job.cpus.map(|cpus| cpus.1)),
    ];
    let log = folder.join("peers.log");
    let output = fs::File::create(&log).context("cannot create a log")?;
    let mut children = Vec::new();
    let ends: [(Stdio, Stdio); 2] = match job.ping_pong {
        true => [
            (back_out.into(), there_in.into()),
            (there_out.into(), back_in.into()),
        ],
        false => {
            drop((back_out, back_in));
            [
                (Stdio::null(), there_in.into()),
                (there_out.into(), Stdio::null()),
            ]
        }
    };
    for (order, (stdin, stdout)) in orders.iter().zip(ends) {
        let text = serde_json::to_string(order).context("cannot encode an order")?;
        let _old = fs::remove_file(&order.answer);
        let mut command = Command::new("/proc/self/exe");
        command
            .args([SUBCOMMAND, &text])
            .stdin(stdin)
            .stdout(stdout);
        command.stderr(output.try_clone().context("cannot share a log")?);
        // The command holds descriptors of the pipe; it must not outlive this round.
        children.push(process::spawn_bound(&mut command)?);
    }
    let mut answers = Vec::new();
    for (mut child, order) in children.into_iter().zip(&orders) {
        let limit = Duration::from_millis(job.milliseconds * 3 + 60_000);
        let ended = process::wait_limited(&mut child, limit)?;
        if ended.is_none() {
            child.kill().context("cannot kill a process")?;
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let well = ended.is_some_and(|status| status.success());
        ensure!(
            well,
            "{:?} ended with {ended:?}: {}",
            order.role,
            last_lines(&said, 10)
        );
        let text = fs::read_to_string(&order.answer).context("no answer")?;
        answers.push(serde_json::from_str::<Answer>(&text).context("cannot read an answer")?);
    }
    let [near, far] = answers[..] else {
        return Ok(None);
    };
    if !near.upgraded || !far.upgraded {
        return Ok(None);
    }
    ensure!(
        near.records == far.records,
        "{} records were sent, {} came",
        near.records,
        far.records
    );
    let records = near.records as f64;
    // The reader's clock: the last record counts when it has come. Round trips: the one who waits for them.
    let clock = if job.ping_pong { near } else { far };
    Ok(Some(Found {
        per_second: records / (clock.nanoseconds.max(1) as f64 / 1e9),
        system_calls: (near.system_calls + far.system_calls) as f64 / records,
        wakes: (near.wakes + far.wakes) as f64 / records,
        sleeps: (near.usage.waits + far.usage.waits) as f64 / records,
        cpu_us: (near.usage.cpu_ns + far.usage.cpu_ns) as f64 / 1e3 / records,
        p50_us: near.p50_us,
    }))
}
