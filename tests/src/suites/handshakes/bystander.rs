//! A client of good manners on another export: it reads one block after the other, and its longest wait
//! is what others can do to it.

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use blkio::{Blkio, Blkioq, Completion, ReqFlags};

const BLOCK_BYTES: usize = 4096;

/// A thread that reads until it is stopped.
pub struct Bystander {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, Duration)>>,
}

impl Bystander {
    /// Connects and begins. No request may take longer than `patience`.
    pub fn start(socket: &Path, patience: Duration) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let disk = Disk::connect(socket)?;
        let thread = thread::spawn({
            let over = Arc::clone(&over);
            move || read_until(disk, &over, patience)
        });
        Ok(Self { over, thread })
    }

    /// How many requests it had done, and how long the longest took.
    pub fn stop(self) -> Result<(u64, Duration)> {
        self.over.store(true, Ordering::Relaxed);
        (self.thread.join()).map_err(|_| anyhow!("the other export's client panicked"))?
    }
}

struct Disk {
    // Dropped before `_blkio`, as its documentation wants it.
    queue: Blkioq,
    buffer: *mut u8,
    blocks: u64,
    _blkio: Blkio,
}

// SAFETY: the buffer belongs to the value, which moves to its thread as a whole.
unsafe impl Send for Disk {}

impl Disk {
    fn connect(socket: &Path) -> Result<Self> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(plain)?;
        let path = socket.to_str().context("a path that is no text")?;
        blkio.set_str("path", path).map_err(plain)?;
        blkio.connect().map_err(plain)?;
        blkio.set_i32("num-queues", 1).map_err(plain)?;
        let mut started = blkio.start().map_err(plain)?;
        let queue = started.queues.pop().context("the disk has no queue")?;
        let blocks = blkio.get_u64("capacity").map_err(plain)? / BLOCK_BYTES as u64;
        let region = blkio.alloc_mem_region(1 << 16).map_err(plain)?;
        blkio.map_mem_region(&region).map_err(plain)?;
        Ok(Self {
            queue,
            buffer: region.addr as *mut u8,
            blocks,
            _blkio: blkio,
        })
    }
}

fn read_until(mut disk: Disk, over: &AtomicBool, patience: Duration) -> Result<(u64, Duration)> {
    let (mut done, mut worst) = (0, Duration::ZERO);
    let mut completions = [MaybeUninit::<Completion>::uninit()];
    while !over.load(Ordering::Relaxed) {
        let start = (done % disk.blocks) * BLOCK_BYTES as u64;
        let begun = Instant::now();
        (disk.queue).read(start, disk.buffer, BLOCK_BYTES, 0, ReqFlags::empty());
        let mut limit = patience;
        let count = (disk.queue)
            .do_io(&mut completions, 1, Some(&mut limit), None)
            .map_err(plain)
            .with_context(|| format!("request {done} of the other export"))?;
        worst = worst.max(begun.elapsed());
        ensure!(count == 1, "{count} requests of one completed");
        // SAFETY: do_io says that it wrote the first entry.
        let completion = unsafe { completions[0].assume_init_ref() };
        ensure!(completion.ret == 0, "a request failed: {}", completion.ret);
        done += 1;
        // Asleep most of the time: a busy one would be in the way of others itself.
        thread::sleep(Duration::from_micros(200));
    }
    Ok((done, worst))
}

/// libblkio's errors carry no source.
fn plain(error: blkio::Error) -> anyhow::Error {
    anyhow!("{}", error.message())
}
