//! The two processes on a pipe: one at each end, or two that throw a record to and fro.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fd_ring::{Consumer, Options, Producer, Transport};
use serde::{Deserialize, Serialize};

use super::super::client::pin;
use super::super::figures::percentile;
use super::super::usage::Usage;

/// The hidden subcommand that makes the lab such a process.
pub const SUBCOMMAND: &str = "bench-ring-peer";

/// How long the ends may take to meet.
const MEETING: Duration = Duration::from_secs(20);

/// Records between two looks at the clock, which may be a system call.
const RECORDS_PER_LOOK: u64 = 1024;

/// By which way records go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Through {
    /// read(2) and write(2), one of each for a record.
    Pipe,
    /// The kernel's ring, mapped by both ends.
    KernelRing,
    /// A ring in shared memory, after an upgrade over the pipe's service.
    SharedRing,
}

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Writes records to standard output.
    Produce,
    /// Reads records from standard input, to the end.
    Consume,
    /// Writes a record, waits for it to come back.
    Ping,
    /// Sends every record back.
    Pong,
}

/// The whole order, as one argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// What to do.
    pub role: Role,
    /// By which way.
    pub through: Through,
    /// Bytes of a record, at least 8.
    pub record_bytes: usize,
    /// How long.
    pub milliseconds: u64,
    /// On which processor, if it matters.
    pub cpu: Option<usize>,
    /// Where the ends of a shared ring meet.
    pub runtime_dir: PathBuf,
    /// Where the answer goes.
    pub answer: PathBuf,
}

/// What a process found.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was the way that was ordered. False: this kernel or its peer has no such ring.
    pub upgraded: bool,
    /// Records, or round trips.
    pub records: u64,
    /// From the first to the last of them.
    pub nanoseconds: u64,
    /// System calls for data, waiting and waking.
    pub system_calls: u64,
    /// Wake-ups that were sent.
    pub wakes: u64,
    /// What the process used meanwhile.
    pub usage: Usage,
    /// Half of the round trips took no longer, in microseconds.
    pub p50_us: f64,
}

/// The writing end.
enum Out {
    Pipe { pipe: fs::File, calls: u64 },
    Ring(Box<Producer>),
}

impl Out {
    fn open(pipe: OwnedFd, order: &Order) -> Result<Self> {
        match options(order) {
            None => Ok(Self::Pipe {
                pipe: pipe.into(),
                calls: 0,
            }),
            Some(options) => {
                let producer = Producer::new(pipe, &options).context("cannot make a producer")?;
                Ok(Self::Ring(Box::new(producer)))
            }
        }
    }

    fn meet(&mut self, order: &Order) -> Result<bool> {
        match self {
            Self::Pipe { .. } => Ok(true),
            Self::Ring(ring) => Ok(ring.upgrade(MEETING)? == wanted(order)),
        }
    }

    fn put(&mut self, record: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Pipe { pipe, calls } => {
                *calls += 1;
                pipe.write_all(record)
            }
            Self::Ring(ring) => {
                let mut room = ring.reserve(record.len())?;
                room.copy_from_slice(record);
                room.commit(record.len())
            }
        }
    }

    fn counts(&self) -> Counts {
        match self {
            Self::Pipe { calls, .. } => (*calls, 0),
            Self::Ring(ring) => (ring.counters().system_calls, ring.counters().wakes),
        }
    }
}

/// The reading end.
enum In {
    Pipe { pipe: fs::File, calls: u64 },
    Ring(Box<Consumer>),
}

impl In {
    fn open(pipe: OwnedFd, order: &Order) -> Result<Self> {
        match options(order) {
            None => Ok(Self::Pipe {
                pipe: pipe.into(),
                calls: 0,
            }),
            Some(options) => {
                let consumer = Consumer::new(pipe, &options).context("cannot make a consumer")?;
                Ok(Self::Ring(Box::new(consumer)))
            }
        }
    }

    fn meet(&mut self, order: &Order) -> Result<bool> {
        match self {
            Self::Pipe { .. } => Ok(true),
            Self::Ring(ring) => Ok(ring.upgrade(MEETING)? == wanted(order)),
        }
    }

    /// The next record; false at the end.
    fn get(&mut self, record: &mut [u8]) -> std::io::Result<bool> {
        match self {
            Self::Pipe { pipe, calls } => {
                let mut got = 0;
                while got < record.len() {
                    *calls += 1;
                    match pipe.read(&mut record[got..])? {
                        0 if got == 0 => return Ok(false),
                        0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                        count => got += count,
                    }
                }
                Ok(true)
            }
            Self::Ring(ring) => match ring.peek(record.len())?.copy_to(record) {
                0 => Ok(false),
                count if count == record.len() => {
                    ring.consume(count);
                    Ok(true)
                }
                _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
            },
        }
    }

    fn counts(&self) -> Counts {
        match self {
            Self::Pipe { calls, .. } => (*calls, 0),
            Self::Ring(ring) => (ring.counters().system_calls, ring.counters().wakes),
        }
    }
}

fn wanted(order: &Order) -> Transport {
    match order.through {
        Through::Pipe => Transport::Plain,
        Through::KernelRing => Transport::Kernel,
        Through::SharedRing => Transport::Shared,
    }
}

fn options(order: &Order) -> Option<Options> {
    let (kernel, shared) = match order.through {
        Through::Pipe => return None,
        Through::KernelRing => (true, false),
        Through::SharedRing => (false, true),
    };
    let mut options = Options {
        kernel,
        shared,
        ..Options::default()
    };
    options.offer.runtime_dir = Some(order.runtime_dir.clone());
    options.lookup.runtime_dirs = vec![order.runtime_dir.clone()];
    Some(options)
}

/// System calls and wake-ups so far.
type Counts = (u64, u64);

/// From the first record on.
struct Work {
    begun: Instant,
    usage: Usage,
    counts: Counts,
}

impl Work {
    fn begin(counts: Counts) -> Result<Self> {
        let usage = Usage::of(std::process::id())?;
        Ok(Self {
            begun: Instant::now(),
            usage,
            counts,
        })
    }

    fn end(self, records: u64, counts: Counts) -> Result<Answer> {
        Ok(Answer {
            upgraded: true,
            records,
            nanoseconds: u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX),
            system_calls: counts.0 - self.counts.0,
            wakes: counts.1 - self.counts.1,
            usage: Usage::of(std::process::id())?.since(self.usage),
            p50_us: 0.0,
        })
    }
}

/// Of an end that writes and one that reads.
fn sum(one: Counts, other: Counts) -> Counts {
    (one.0 + other.0, one.1 + other.1)
}

/// The process's whole life.
pub fn child_main(order: &str) -> Result<ExitCode> {
    let order: Order = serde_json::from_str(order).context("cannot understand the order")?;
    ensure!(order.record_bytes >= 8, "a record holds its number");
    if let Some(cpu) = order.cpu {
        pin(cpu)?;
    }
    let answer = match order.role {
        Role::Produce => produce(&order)?,
        Role::Consume => consume(&order)?,
        Role::Ping => ping(&order)?,
        Role::Pong => pong(&order)?,
    };
    let text = serde_json::to_string(&answer).context("cannot encode the answer")?;
    fs::write(&order.answer, text).context("cannot write the answer")?;
    Ok(ExitCode::SUCCESS)
}

fn stdout() -> Result<OwnedFd> {
    let own = std::io::stdout().as_fd().try_clone_to_owned();
    let own = own.context("cannot copy standard output")?;
    // The pipe must end with the copy that is handed on.
    let null = fs::File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null).context("cannot give standard output away")?;
    Ok(own)
}

fn stdin() -> Result<OwnedFd> {
    let own = std::io::stdin().as_fd().try_clone_to_owned();
    let own = own.context("cannot copy standard input")?;
    let null = fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("cannot give standard input away")?;
    Ok(own)
}

fn record(order: &Order) -> Vec<u8> {
    vec![0x5a; order.record_bytes]
}

fn number(record: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(*record.first_chunk()?))
}

fn produce(order: &Order) -> Result<Answer> {
    let mut out = Out::open(stdout()?, order)?;
    if !out.meet(order)? {
        return Ok(Answer::default());
    }
    let mut record = record(order);
    let work = Work::begin(out.counts())?;
    let limit = Duration::from_millis(order.milliseconds);
    let mut records = 0;
    while records % RECORDS_PER_LOOK != 0 || records == 0 || work.begun.elapsed() < limit {
        record[..8].copy_from_slice(&u64::to_le_bytes(records));
        out.put(&record).context("cannot write a record")?;
        records += 1;
    }
    work.end(records, out.counts())
}

fn consume(order: &Order) -> Result<Answer> {
    let mut input = In::open(stdin()?, order)?;
    if !input.meet(order)? {
        return Ok(Answer::default());
    }
    let mut record = record(order);
    if !input
        .get(&mut record)
        .context("cannot read the first record")?
    {
        return Ok(Answer::default());
    }
    let work = Work::begin(input.counts())?;
    let mut records = 1;
    while input.get(&mut record).context("cannot read a record")? {
        if number(&record) != Some(records) {
            bail!("record {records} is another one: {:?}", number(&record));
        }
        records += 1;
    }
    work.end(records, input.counts())
}

fn ping(order: &Order) -> Result<Answer> {
    let (mut out, mut input) = (Out::open(stdout()?, order)?, In::open(stdin()?, order)?);
    if !out.meet(order)? || !input.meet(order)? {
        return Ok(Answer::default());
    }
    let (mut record, mut back) = (record(order), record(order));
    let mut trips = Vec::with_capacity(1 << 20);
    let work = Work::begin(sum(out.counts(), input.counts()))?;
    let limit = Duration::from_millis(order.milliseconds);
    let mut last = work.begun;
    while last.duration_since(work.begun) < limit && trips.len() < trips.capacity() {
        let sent = trips.len() as u64;
        record[..8].copy_from_slice(&sent.to_le_bytes());
        out.put(&record).context("cannot write a record")?;
        ensure!(input.get(&mut back)?, "the other end left");
        ensure!(number(&back) == Some(sent), "another record came back");
        let now = Instant::now();
        trips.push(now.duration_since(last).as_secs_f64() * 1e6);
        last = now;
    }
    let answer = work.end(trips.len() as u64, sum(out.counts(), input.counts()))?;
    Ok(Answer {
        p50_us: percentile(&trips, 50.0).context("no round trip")?,
        ..answer
    })
}

fn pong(order: &Order) -> Result<Answer> {
    let (mut out, mut input) = (Out::open(stdout()?, order)?, In::open(stdin()?, order)?);
    if !input.meet(order)? || !out.meet(order)? {
        return Ok(Answer::default());
    }
    let mut record = record(order);
    let work = Work::begin(sum(out.counts(), input.counts()))?;
    let mut records = 0;
    while input.get(&mut record).context("cannot read a record")? {
        out.put(&record).context("cannot write a record")?;
        records += 1;
    }
    work.end(records, sum(out.counts(), input.counts()))
}
