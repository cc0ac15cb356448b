//! A guest that does nothing but write to its first disk and read back: the lab as first and only
//! process, on an image of its own as root (the second disk), so that nothing of the host ties the guest
//! to it.
//!
//! What was read stays in memory for a whole round before it is compared: a migration must also move
//! the pages that the disk wrote.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};

use testkit::images;
use testkit::random::Random;
use testkit::shell::Shell;

/// Set by the kernel's command line: the disk to load.
const VARIABLE: &str = "LAB_LOAD";

/// Bytes of one write.
const BLOCK_BYTES: usize = 16 << 10;

/// Blocks of one thread.
const BLOCKS: usize = 192;

/// Threads, each with a part of the disk.
const THREADS: usize = 4;

/// Bytes of the disk that are used.
pub const DISK_BYTES: u64 = (THREADS * BLOCKS * BLOCK_BYTES) as u64;

/// What each thread says after each round, with its number and the round's.
pub const ROUND: &str = "round";

/// What it says when something is not what it was.
pub const FAILED: &str = "LOAD FAILED";

/// Words for the kernel's command line.
pub fn kernel_arguments() -> [String; 4] {
    [
        "root=/dev/vdb".into(),
        "ro".into(),
        "init=/lab".into(),
        format!("{VARIABLE}=/dev/vda"),
    ]
}

/// Whether this process is the first of such a guest.
pub fn is_init() -> bool {
    std::process::id() == 1 && std::env::var_os(VARIABLE).is_some()
}

/// The life of such a guest: it ends with the machine.
pub fn init_main() -> ExitCode {
    if let Err(error) = load() {
        say(&format!("{FAILED}: {error:#}"));
    }
    loop {
        thread::sleep(Duration::from_secs(60));
    }
}

/// Writes a whole line on the console.
fn say(line: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/ttyS0") {
        // There is no other place for it.
        let _ = console.write_all(format!("{line}\n").as_bytes());
    }
}

fn load() -> Result<()> {
    mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None).context("cannot mount /dev")?;
    let disk = PathBuf::from(std::env::var_os(VARIABLE).context("no disk is named")?);
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(&disk)
        .with_context(|| format!("cannot open {}", disk.display()))?;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                scope.spawn({
                    let disk = &disk;
                    move || rounds(disk, number)
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))
        })
    })
}

/// Memory at a page's beginning.
struct Pages {
    bytes: Vec<u8>,
    start: usize,
}

impl Pages {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start }
    }

    fn part(&mut self, at: usize, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start + at..self.start + at + len]
    }
}

fn fill(block: &mut [u8], number: usize, index: usize, round: u64) {
    let mut random = Random((number as u64) << 48 | (index as u64) << 32 | round);
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next_u64().to_le_bytes());
    }
}

fn rounds(disk: &File, number: usize) -> Result<()> {
    let mut written = Pages::new(BLOCK_BYTES);
    let mut read = Pages::new(BLOCKS * BLOCK_BYTES);
    let mut wanted = vec![0; BLOCK_BYTES];
    for round in 1.. {
        for index in 0..BLOCKS {
            let slot = read.part(index * BLOCK_BYTES, BLOCK_BYTES);
            // Of the round before, and untouched since.
            if round > 1 {
                fill(&mut wanted, number, index, round - 1);
                ensure!(
                    slot == wanted,
                    "thread {number}, block {index}: what was read in round {} has changed",
                    round - 1
                );
            }
            let at = ((number * BLOCKS + index) * BLOCK_BYTES) as u64;
            let block = written.part(0, BLOCK_BYTES);
            fill(block, number, index, round);
            disk.write_all_at(block, at)
                .with_context(|| format!("cannot write block {index} in round {round}"))?;
            disk.read_exact_at(slot, at)
                .with_context(|| format!("cannot read block {index} in round {round}"))?;
        }
        say(&format!("{ROUND} {number} {round}"));
    }
    Ok(())
}

/// Makes the image that such a guest has as root.
pub fn make_root(image: &Path, scratch: &Path) -> Result<()> {
    let tree = scratch.join("root");
    for dir in ["dev", "proc", "sys"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    let own = std::env::current_exe().context("the lab has no file")?;
    Shell::new("strip")
        .args(["--strip-debug", "-o"])
        .arg(tree.join("lab"))
        .arg(&own)
        .run()?;
    let needed = Shell::new("ldd").arg(&own).run()?;
    for library in needed
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let to = tree.join(&library[1..]);
        fs::create_dir_all(to.parent().context("a library has no directory")?)?;
        fs::copy(library, &to).with_context(|| format!("cannot copy {library}"))?;
    }
    images::make_ext4(image, 64 << 20, Some(&tree))?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}
