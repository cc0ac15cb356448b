//! The load on a vhost-user-blk socket: a process of its own on one processor, with libblkio's
//! core (the crate `blkio`) as the driver.
//!
//! One connection, one queue. Requests of one size, `depth` of them in flight; whatever completed
//! is asked for anew in one batch. The client reads the server's counters itself, with nothing in
//! flight, just before and after the time that counts, so that nobody else has to wake up for it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use serde::{Deserialize, Serialize};

use super::figures::percentiles;
use super::usage::Usage;

/// The hidden subcommand that makes the lab a client.
pub const SUBCOMMAND: &str = "bench-client";

/// What the requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Reads at random places.
    RandRead,
    /// Writes at random places.
    RandWrite,
    /// Reads one after the other.
    Read,
    /// Seven reads at random places to three writes, and a flush after each [`WRITES_TO_A_FLUSH`] writes; how
    /// long each read and write took is noted.
    Mixed,
}

/// Writes between two flushes of [`Op::Mixed`].
pub const WRITES_TO_A_FLUSH: u32 = 32;

/// How the client waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Waiting {
    /// It asks for a notification and sleeps.
    Sleeps,
    /// It looks again and again.
    Polls,
}

/// When the part that counts is over.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// After this time.
    Milliseconds(u64),
    /// After this many requests.
    Requests(u64),
}

/// What the client is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// Where the server listens; or the block device, if the client upgrades.
    pub socket: PathBuf,
    /// Opens the block device and connects to the service at its descriptor, which takes a kernel with
    /// the series.
    pub upgrades: bool,
    /// What to ask for.
    pub op: Op,
    /// How much at a time.
    pub block_bytes: usize,
    /// How many requests are in flight.
    pub depth: usize,
    /// How to wait.
    pub waiting: Waiting,
    /// The processor to run on.
    pub cpu: usize,
    /// Not counted, first.
    pub warm_up: End,
    /// What counts.
    pub window: End,
    /// The server, whose counters are read.
    pub server: u32,
    /// Stays connected, with nothing to do, for this long after it has answered.
    pub hold_ms: u64,
}

impl Order {
    /// Random reads of 4 KiB, one after the other, by a client that sleeps on processor 0, of the server
    /// with this process.
    pub fn reads(socket: &Path, server: u32, window: End) -> Self {
        Order {
            socket: socket.to_owned(),
            upgrades: false,
            op: Op::RandRead,
            block_bytes: 4096,
            depth: 1,
            waiting: Waiting::Sleeps,
            cpu: 0,
            warm_up: End::Requests(1),
            window,
            server,
            hold_ms: 0,
        }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Requests per second.
    pub iops: f64,
    /// Requests whose cost is in `server` and `client`.
    pub requests: u64,
    /// All requests of the connection.
    pub all_requests: u64,
    /// What the server used for `requests`.
    pub server: Usage,
    /// What the client used for `requests`.
    pub client: Usage,
    /// How long reads and writes took, in microseconds; of [`Op::Mixed`] alone.
    #[serde(default)]
    pub latency_us: Option<Percentiles>,
}

/// The times below which so many requests out of a hundred are, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Percentiles {
    /// 50.
    pub p50: f64,
    /// 99.
    pub p99: f64,
    /// 99.9.
    pub p99_9: f64,
}

impl Percentiles {
    /// Of times in microseconds; `None` if there are none.
    pub fn of(times: &[f64]) -> Option<Self> {
        let [p50, p99, p99_9] = percentiles(times, [50.0, 99.0, 99.9])?;
        Some(Self { p50, p99, p99_9 })
    }
}

/// The child's side: order from standard input, answer to standard output.
pub fn child_main() -> Result<ExitCode> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("cannot read the order")?;
    let order: Order = serde_json::from_str(&text).context("cannot understand the order")?;
    pin(order.cpu)?;
    let of = || format!("client of {}", order.socket.display());
    let mut load = Load::connect(&order).with_context(of)?;
    let answer = run(&order, &mut load).with_context(of)?;
    let text = serde_json::to_string(&answer).context("cannot encode the answer")?;
    writeln!(std::io::stdout(), "{text}").context("cannot write the answer")?;
    std::thread::sleep(Duration::from_millis(order.hold_ms));
    Ok(ExitCode::SUCCESS)
}

fn run(order: &Order, load: &mut Load) -> Result<Answer> {
    let warm_up = load.phase(order.warm_up)?;
    load.times_us.clear();
    let me = std::process::id();
    let before = (Usage::of(order.server)?, Usage::of(me)?);
    let counted = load.phase(order.window)?;
    let after = (Usage::of(order.server)?, Usage::of(me)?);
    Ok(Answer {
        iops: counted.in_time as f64 / counted.time.as_secs_f64(),
        requests: counted.all,
        all_requests: warm_up.all + counted.all,
        server: after.0.since(before.0),
        client: after.1.since(before.1),
        latency_us: Percentiles::of(&load.times_us),
    })
}

/// Runs the calling thread on one processor.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
        .with_context(|| format!("cannot run on processor {cpu}"))
}

/// A phase that is over.
struct Phase {
    /// Requests completed within `time`.
    in_time: u64,
    /// Requests completed, those included that were waited for at the end.
    all: u64,
    time: Duration,
}

/// A connected disk and what is asked of it.
struct Load {
    // Dropped before `_blkio`, as its documentation wants it.
    queue: Blkioq,
    completions: Vec<MaybeUninit<Completion>>,
    buffers: *mut u8,
    op: Op,
    block_bytes: usize,
    depth: usize,
    min_completions: usize,
    blocks: u64,
    random: u64,
    next_block: u64,
    /// Of each slot of [`Op::Mixed`]: when its request was sent, unless that is a flush.
    sent: Vec<Option<Instant>>,
    /// How long those that have completed took.
    times_us: Vec<f64>,
    unflushed: u32,
    _blkio: Blkio,
    _claim: Option<File>,
}

/// Opens a block device so that nobody else mounts it meanwhile.
fn claim(device: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.custom_flags(libc::O_EXCL | libc::O_DIRECT);
    (options.open(device)).with_context(|| format!("cannot claim {}", device.display()))
}

/// A polling client gives up on a server that is silent for this long.
const SILENCE: Duration = Duration::from_secs(20);

impl Load {
    fn connect(order: &Order) -> Result<Self> {
        ensure!(order.depth > 0, "a depth of zero does nothing");
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(plain)?;
        let claim = order.upgrades.then(|| claim(&order.socket)).transpose()?;
        let path = match &claim {
            Some(device) => format!("/dev/self/fd/{}/vhost-user-blk", device.as_raw_fd()),
            None => (order.socket.to_str().context("a path that is no text")?).to_owned(),
        };
        blkio.set_str("path", &path).map_err(plain)?;
        blkio.connect().map_err(plain)?;
        blkio.set_i32("num-queues", 1).map_err(plain)?;
        // A request takes three descriptors.
        let size = (order.depth * 3).next_power_of_two().max(256);
        blkio
            .set_i32("queue-size", i32::try_from(size)?)
            .map_err(plain)?;
        let mut started = blkio.start().map_err(plain)?;
        let queue = started.queues.pop().context("the disk has no queue")?;
        let capacity_bytes = blkio.get_u64("capacity").map_err(plain)?;
        let blocks = capacity_bytes / order.block_bytes as u64;
        ensure!(blocks > 0, "the disk is smaller than a request");
        let len_bytes = (order.depth * order.block_bytes).next_multiple_of(2 << 20);
        let region = blkio.alloc_mem_region(len_bytes).map_err(plain)?;
        let buffers = region.addr as *mut u8;
        // SAFETY: the region is `len_bytes` of memory of ours until `_blkio` is dropped, and the
        // server has not been told of it yet.
        unsafe { std::ptr::write_bytes(buffers, 0x5a, len_bytes) };
        blkio.map_mem_region(&region).map_err(plain)?;
        Ok(Load {
            queue,
            completions: (0..order.depth).map(|_| MaybeUninit::uninit()).collect(),
            buffers,
            op: order.op,
            block_bytes: order.block_bytes,
            depth: order.depth,
            min_completions: match order.waiting {
                Waiting::Sleeps => 1,
                Waiting::Polls => 0,
            },
            blocks,
            random: 0x9e37_79b9_7f4a_7c15,
            next_block: 0,
            sent: vec![None; order.depth],
            times_us: Vec::new(),
            unflushed: 0,
            _blkio: blkio,
            _claim: claim,
        })
    }

    /// Keeps `depth` requests in flight until the end, then waits for the last.
    fn phase(&mut self, end: End) -> Result<Phase> {
        let started = Instant::now();
        let over = |done: u64| match end {
            End::Milliseconds(ms) => started.elapsed() >= Duration::from_millis(ms),
            End::Requests(count) => done >= count,
        };
        for slot in 0..self.depth {
            self.submit(slot);
        }
        let mut in_flight = self.depth;
        let mut done = 0;
        let mut in_time = None;
        let mut looks = 0u32;
        let mut heard = started;
        while in_flight > 0 {
            let count = self
                .queue
                .do_io(&mut self.completions, self.min_completions, None, None)
                .map_err(plain)?;
            // The clock costs as much as a request: it is asked now and then.
            looks = looks.wrapping_add(1);
            let ask = looks.is_multiple_of(if count > 0 { 8 } else { 4096 });
            if count == 0 {
                if ask && heard.elapsed() > SILENCE {
                    bail!("no completion for {} s", SILENCE.as_secs());
                }
                continue;
            }
            in_flight -= count;
            done += count as u64;
            if ask {
                heard = Instant::now();
            }
            if in_time.is_none() && (ask || self.min_completions > 0) && over(done) {
                in_time = Some((done, started.elapsed()));
            }
            for index in 0..count {
                // SAFETY: do_io says that it wrote the first `count` entries.
                let completion = unsafe { self.completions[index].assume_init_ref() };
                ensure!(completion.ret == 0, "a request failed: {}", completion.ret);
                let slot = completion.user_data;
                if let Some(sent) = self.sent[slot].take() {
                    self.times_us.push(sent.elapsed().as_nanos() as f64 / 1e3);
                }
                if in_time.is_none() {
                    self.submit(slot);
                    in_flight += 1;
                }
            }
        }
        let (in_time, time) = in_time.context("the load ended before its time")?;
        Ok(Phase {
            in_time,
            all: done,
            time,
        })
    }

    fn submit(&mut self, slot: usize) {
        let block = match self.op {
            Op::Read => {
                self.next_block = (self.next_block + 1) % self.blocks;
                self.next_block
            }
            Op::RandRead | Op::RandWrite | Op::Mixed => self.next_random() % self.blocks,
        };
        let start = block * self.block_bytes as u64;
        // SAFETY: slots are below `depth`, and the region has a block for each.
        let buffer = unsafe { self.buffers.add(slot * self.block_bytes) };
        let (len, none) = (self.block_bytes, ReqFlags::empty());
        match self.op {
            Op::RandRead | Op::Read => self.queue.read(start, buffer, len, slot, none),
            Op::RandWrite => self.queue.write(start, buffer, len, slot, none),
            Op::Mixed if self.unflushed == WRITES_TO_A_FLUSH => {
                self.unflushed = 0;
                self.queue.flush(slot, none);
            }
            Op::Mixed => {
                self.sent[slot] = Some(Instant::now());
                // Other bits than those that chose the place.
                if (self.random >> 32) % 10 < 7 {
                    self.queue.read(start, buffer, len, slot, none);
                } else {
                    self.unflushed += 1;
                    self.queue.write(start, buffer, len, slot, none);
                }
            }
        }
    }

    /// xorshift64
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// libblkio's errors carry no source.
fn plain(error: blkio::Error) -> anyhow::Error {
    anyhow!("{}", error.message())
}
