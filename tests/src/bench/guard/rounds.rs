//! A driver of the vhost-user door whose load is the same every time: rounds of requests, each offered to a server
//! that sleeps.
//!
//! All requests of a round are made available before the one kick, and the one notification is asked for with the last
//! of them. Before the next round every thread of the server sleeps again. So nothing depends on which side is faster,
//! nor on what else the machine does.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use testkit::vhost::{
    CONFIG_WCE, DATA, Driver, EVENT_IDX, FLUSH, NEXT, OK, T_FLUSH, T_IN, T_OUT, UNTOUCHED, USUAL,
    WRITE, attempt, readable,
};

/// How long a round may take. Each instruction of the server may be stopped at.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of a read or write.
const BLOCK_BYTES: u32 = 4096;

/// The space of a request in guest memory: header, status, data.
const REQUEST_BYTES: u64 = 8192;

/// Where the status byte is in it.
const STATUS: u64 = 16;

/// What the requests of a round do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Reads of 4 KiB.
    Read,
    /// Writes of 4 KiB.
    Write,
    /// Flushes.
    Flush,
}

/// A connected driver.
pub struct Rounds {
    driver: Driver,
    server: u32,
    depth: u16,
}

impl Rounds {
    /// Connects to the socket of a server; each round has `depth` requests.
    pub fn connect(
        socket: &Path,
        server: u32,
        op: Op,
        depth: u16,
        write_cache: bool,
    ) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        let cache = FLUSH | CONFIG_WCE;
        let features = match write_cache {
            true => USUAL | EVENT_IDX,
            false => (USUAL | EVENT_IDX) & !cache,
        };
        let driver = attempt(|| Driver::running(stream, features)).map_err(|why| anyhow!(why))?;
        let rounds = Self {
            driver,
            server,
            depth,
        };
        rounds.describe(op);
        Ok(rounds)
    }

    /// Writes the descriptors and headers, which stay as they are.
    fn describe(&self, op: Op) {
        let (driver, table) = (&self.driver, self.driver.vrings[0].descriptors);
        for slot in 0..self.depth {
            let head = 3 * slot;
            let at = request(slot);
            let sector = u64::from(slot) * u64::from(BLOCK_BYTES) / 512;
            let status = (at + STATUS, 1, WRITE, 0);
            let (kind, data) = match op {
                Op::Read => (T_IN, WRITE),
                Op::Write => (T_OUT, 0),
                Op::Flush => (T_FLUSH, 0),
            };
            let sector = if op == Op::Flush { 0 } else { sector };
            driver.header(at, kind, sector);
            let memory = &driver.memory;
            memory.descriptor(table, head, (at, 16, NEXT, head + 1));
            if op == Op::Flush {
                memory.descriptor(table, head + 1, status);
            } else {
                let data = (at + 4096, BLOCK_BYTES, data | NEXT, head + 2);
                memory.descriptor(table, head + 1, data);
                memory.descriptor(table, head + 2, status);
            }
        }
    }

    /// So many rounds; every thread of the server sleeps before each, and afterwards.
    pub fn run(&mut self, rounds: u64) -> Result<()> {
        self.settle()?;
        for _ in 0..rounds {
            self.round()?;
            self.settle()?;
        }
        Ok(())
    }

    fn round(&mut self) -> Result<()> {
        // One more may have come after the last request was seen.
        let _none = self.driver.vrings[0].call.read();
        let memory = &self.driver.memory;
        let vring = &mut self.driver.vrings[0];
        let old = vring.next_available;
        let used_event = vring.available + 4 + 2 * u64::from(vring.size);
        let last = vring.next_used.wrapping_add(self.depth - 1);
        memory.word(used_event).store(last, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        for slot in 0..self.depth {
            memory.put(request(slot) + STATUS, &[UNTOUCHED]);
            vring.offer(memory, 3 * slot);
        }
        let kicks = vring.kicks;
        vring.kick_if_wanted(memory, old);
        ensure!(
            vring.kicks == kicks + 1,
            "the server sleeps and asks for no kick"
        );
        // A storage that answers out of order may be told of before the last.
        let all = old.wrapping_add(self.depth);
        while vring.used_index(memory) != all {
            ensure!(
                readable(&vring.call, PATIENCE),
                "no notification of the last of {} requests",
                self.depth
            );
            (vring.call.read()).context("the notification cannot be read")?;
        }
        for _ in 0..self.depth {
            let (head, _) = (vring.reap(memory)).context("a used index without an entry")?;
            let slot = u16::try_from(head / 3).context("a head that was not offered")?;
            let status = memory.byte(request(slot) + STATUS);
            ensure!(status == OK, "a request ended with status {status}");
        }
        Ok(())
    }

    /// Waits until every thread of the server sleeps, and still does when it is asked again.
    fn settle(&self) -> Result<()> {
        let started = Instant::now();
        let mut seen = 0;
        while seen < 2 {
            seen = match all_sleep(self.server)? {
                true => seen + 1,
                false => 0,
            };
            ensure!(
                started.elapsed() < PATIENCE,
                "the server does not come to rest"
            );
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// The address of a request.
fn request(slot: u16) -> u64 {
    DATA + u64::from(slot) * REQUEST_BYTES
}

/// Whether every thread of a process sleeps (proc_pid_stat(5): the state `S` behind the name in parentheses).
fn all_sleep(pid: u32) -> Result<bool> {
    let folder = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    for task in tasks.flatten() {
        // A thread that has ended meanwhile does nothing.
        let Ok(stat) = std::fs::read_to_string(task.path().join("stat")) else {
            continue;
        };
        let behind = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        if !behind.starts_with('S') {
            return Ok(false);
        }
    }
    Ok(true)
}
