//! What one request costs a server, and how that is counted.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use testkit::server::{Serve, Server};

use super::rounds::{Op, Rounds};
use crate::bench::native::steps::Stepper;
use crate::bench::usage::Usage;

/// What is behind the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Nothing.
    Null,
    /// A file on tmpfs, through the page cache.
    File,
}

/// Requests whose cost is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// What is behind the disk.
    pub storage: Storage,
    /// What is asked for.
    pub op: Op,
    /// Requests in each round.
    pub depth: u16,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let storage = match self.storage {
            Storage::Null => "null",
            Storage::File => "file",
        };
        let op = match self.op {
            Op::Read => "reads",
            Op::Write => "writes",
            Op::Flush => "flushes",
        };
        write!(f, "vhost door, {storage}, {op}, depth {}", self.depth)
    }
}

const fn load(storage: Storage, op: Op, depth: u16) -> Load {
    Load { storage, op, depth }
}

/// All of them. Flushes are done by threads of the kernel; of several at once the order is not always the same.
pub const LOADS: [Load; 9] = [
    load(Storage::Null, Op::Read, 1),
    load(Storage::Null, Op::Read, 32),
    load(Storage::Null, Op::Write, 1),
    load(Storage::Null, Op::Write, 32),
    load(Storage::File, Op::Read, 1),
    load(Storage::File, Op::Read, 32),
    load(Storage::File, Op::Write, 1),
    load(Storage::File, Op::Write, 32),
    load(Storage::File, Op::Flush, 1),
];

/// What one request costs; `None` is "cannot be counted here".
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Cost {
    /// Instructions in user mode.
    pub instructions: Option<f64>,
    /// System calls.
    pub system_calls: Option<f64>,
    /// Times that a thread went to sleep.
    pub sleeps: Option<f64>,
    /// Calls of the allocator.
    pub allocations: Option<f64>,
}

impl Cost {
    /// The figures with their names.
    pub fn figures(&self) -> [(&'static str, Option<f64>); 4] {
        [
            ("instructions", self.instructions),
            ("system-calls", self.system_calls),
            ("sleeps", self.sleeps),
            ("allocations", self.allocations),
        ]
    }

    /// Whether everything could be counted.
    pub fn is_whole(&self) -> bool {
        self.figures().iter().all(|(_, figure)| figure.is_some())
    }

    /// The least of each figure.
    fn least(self, other: Self) -> Self {
        let least = |one: Option<f64>, other: Option<f64>| match (one, other) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Self {
            instructions: least(self.instructions, other.instructions),
            system_calls: least(self.system_calls, other.system_calls),
            sleeps: least(self.sleeps, other.sleeps),
            allocations: least(self.allocations, other.allocations),
        }
    }
}

/// Each figure is counted so often; the least is taken, because what else happens in a process is only ever added.
const REPETITIONS: usize = 3;

/// Rounds before the first that counts.
const WARM_UP: u64 = 4;

/// Rounds of one repetition.
fn rounds(load: Load) -> u64 {
    if load.depth == 1 { 12 } else { 3 }
}

/// How long a server may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// Counts what a request costs a server that is started for it.
pub fn of(server: &Path, spec: &str, load: Load, scratch: &Path) -> Result<Cost> {
    let socket = scratch.join("s");
    // A server that polls does as much as there is time for; this one sleeps when there is nothing to do.
    let start = || -> Result<(Server, Rounds)> {
        let server = Serve::new(server, PATIENCE)
            .env("UBLKUP_RUNTIME_DIR", scratch.join("run"))
            .ublk("no")
            .name("guard")
            .vhost_socket(&socket)
            .args(["--queues", "1", "--poll-us", "0"])
            .arg(spec)
            .start()?;
        let write_cache = load.storage == Storage::File;
        let mut rounds = Rounds::connect(&socket, server.pid(), load.op, load.depth, write_cache)?;
        rounds.run(WARM_UP)?;
        Ok((server, rounds))
    };
    let sleeps = sleeps(load, start()?)?;
    let counted = steps(load, start()?)?;
    Ok(Cost {
        sleeps: Some(sleeps),
        ..counted
    })
}

/// Sleeps, while nothing else is counted: a thread that is stopped for it sleeps too.
fn sleeps(load: Load, (server, mut driver): (Server, Rounds)) -> Result<f64> {
    let requests = rounds(load) * u64::from(load.depth);
    let mut least = f64::INFINITY;
    for _ in 0..REPETITIONS {
        let before = Usage::of(server.pid())?;
        driver.run(rounds(load))?;
        let waits = Usage::of(server.pid())?.since(before).waits;
        least = least.min(waits as f64 / requests as f64);
    }
    drop(driver);
    server.stop()?;
    Ok(least)
}

/// Everything else, instruction by instruction. What cannot be counted because this process may trace no other is `None`.
fn steps(load: Load, (server, mut driver): (Server, Rounds)) -> Result<Cost> {
    let requests = rounds(load) * u64::from(load.depth);
    let stepper = match Stepper::start(server.pid()) {
        Ok(stepper) => stepper,
        Err(error) => {
            eprintln!("lab: instructions, system calls and allocations are not counted: {error:#}");
            drop(driver);
            server.stop()?;
            return Ok(Cost::default());
        }
    };
    driver.run(WARM_UP)?;
    let mut least = Cost::default();
    for _ in 0..REPETITIONS {
        let before = stepper.counts();
        driver.run(rounds(load))?;
        let after = stepper.counts();
        let per_request = |after: u64, before: u64| Some((after - before) as f64 / requests as f64);
        let allocations = after.allocations.zip(before.allocations);
        least = least.least(Cost {
            instructions: per_request(after.instructions, before.instructions),
            system_calls: per_request(after.system_calls, before.system_calls),
            sleeps: None,
            allocations: allocations.and_then(|(after, before)| per_request(after, before)),
        });
    }
    drop(driver);
    stepper.stop().context("the server cannot be let go")?;
    server.stop()?;
    Ok(least)
}
