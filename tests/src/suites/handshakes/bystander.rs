//! A well-behaved client of another export: it reads one block after the other, and its longest wait is
//! what other clients can do to it.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use testkit::vhost::{Driver, INDIRECT, OK, PROTOCOL, VERSION_1};

const BLOCK_BYTES: usize = 4096;

/// Blocks that are read in turn.
const BLOCKS: u64 = 1024;

/// A thread that reads until it is stopped.
pub struct Bystander {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, Duration)>>,
}

impl Bystander {
    /// Connects and begins.
    pub fn start(socket: &Path) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        // What every export offers, also one without a write cache.
        let features = VERSION_1 | INDIRECT | PROTOCOL;
        let driver = Driver::running(UnixStream::connect(socket)?, features);
        let thread = thread::spawn({
            let over = Arc::clone(&over);
            move || read_until(driver, &over)
        });
        Ok(Self { over, thread })
    }

    /// How many requests it had done, and how long the longest took.
    pub fn stop(self) -> Result<(u64, Duration)> {
        self.over.store(true, Ordering::Relaxed);
        (self.thread.join()).map_err(|_| anyhow!("the other export's client panicked"))?
    }
}

fn read_until(mut driver: Driver, over: &AtomicBool) -> Result<(u64, Duration)> {
    let (mut done, mut worst) = (0, Duration::ZERO);
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let (status, _) = driver.read((done % BLOCKS) * 8, BLOCK_BYTES);
        ensure!(
            status == OK,
            "request {done} of the other export: status {status}"
        );
        worst = worst.max(begun.elapsed());
        done += 1;
        // Asleep most of the time: a busy one would be in the way of others itself.
        thread::sleep(Duration::from_micros(200));
    }
    Ok((done, worst))
}
