//! Random reads and writes, 32 at a time and every byte compared, for each way in which queue threads
//! wait and clients' memory is held: what is measured in docs/benchmarks.md must also be right.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;
#[path = "common/elsewhere.rs"]
mod elsewhere;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{
    DATA, Driver, EVENT_IDX, Fixture, OK, PATIENCE, T_IN, T_OUT, UNTOUCHED, USUAL, WRITE,
    file_options, limits,
};
use elsewhere::Elsewhere;
use testkit::random::Random;
use ublkup::engine::Storage;
use ublkup::engine::polling::Polling;
use ublkup::storage::{CacheMode, File, Memory as MemoryDisk};

const SLOTS: u16 = 32;
const REQUESTS: u32 = 6000;
/// The largest request; each slot has so much memory for data, and a page for header and status.
const MOST_BYTES: usize = 32 << 10;
const SLOT_BYTES: u64 = MOST_BYTES as u64 + 4096;
/// Each slot has a part of the disk to itself, so that the order of requests does not matter.
const PART_BYTES: usize = 256 << 10;
const DISK_BYTES: u64 = SLOTS as u64 * PART_BYTES as u64;

/// What a slot has under way.
#[derive(Clone, Copy)]
struct Pending {
    read: bool,
    at: usize,
    len: usize,
}

struct Load {
    driver: Driver,
    random: Random,
    /// What is on the disk.
    model: Vec<u8>,
    pending: [Option<Pending>; SLOTS as usize],
}

impl Load {
    fn memory(slot: u16) -> u64 {
        DATA + u64::from(slot) * SLOT_BYTES
    }

    fn begin(&mut self, slot: u16) {
        let mut below = |bound: usize| usize::try_from(self.random.below(bound as u64)).unwrap();
        let len = 512 * (1 + below(MOST_BYTES / 512));
        let at = 512 * below((PART_BYTES - len) / 512 + 1);
        let read = below(3) == 0;
        let place = usize::from(slot) * PART_BYTES + at;
        let (control, data) = (Self::memory(slot), Self::memory(slot) + 4096);
        let driver = &mut self.driver;
        driver.header(control, if read { T_IN } else { T_OUT }, place as u64 / 512);
        driver.memory.put(control + 16, &[UNTOUCHED]);
        if read {
            driver.memory.put(data, &vec![0xee; len]);
        } else {
            let bytes = &mut self.model[place..][..len];
            let seed = below(1 << 16);
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = ((seed + index) ^ (index >> 8)).to_le_bytes()[0];
            }
            driver.memory.put(data, bytes);
        }
        let flags = if read { WRITE } else { 0 };
        // One buffer, or two that meet anywhere.
        let cut = below(2) * below(len);
        let length = |len: usize| u32::try_from(len).unwrap();
        let mut chain = vec![(control, 16, 0), (data, length(len - cut), flags)];
        if cut > 0 {
            chain.push((data + (len - cut) as u64, length(cut), flags));
        }
        chain.push((control + 16, 1, WRITE));
        self.pending[usize::from(slot)] = Some(Pending {
            read,
            at: place,
            len,
        });
        driver.submit_on(0, 4 * slot, &chain);
    }

    fn end(&mut self, head: u32) -> u16 {
        let slot = u16::try_from(head).unwrap() / 4;
        let Pending { read, at, len } = self.pending[usize::from(slot)].take().unwrap();
        let memory = &self.driver.memory;
        assert_eq!(memory.byte(Self::memory(slot) + 16), OK);
        if read {
            let got = memory.get(Self::memory(slot) + 4096, len);
            let same = got == self.model[at..][..len];
            assert!(same, "{len} bytes at {at} are not what was written");
        }
        slot
    }

    /// Waits for an answer, asleep or looking.
    fn next(&mut self, sleeps: bool) -> u32 {
        let Driver { memory, vrings, .. } = &mut self.driver;
        if sleeps {
            return vrings[0].wait(memory).0;
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some((head, _)) = vrings[0].reap(memory) {
                return head;
            }
            assert!(Instant::now() < deadline, "no answer came");
            std::thread::yield_now();
        }
    }

    fn run(fixture: &Fixture, sleeps: bool) {
        let mut load = Load {
            driver: Driver::running(fixture.connect(), USUAL | EVENT_IDX),
            random: Random(1),
            model: vec![0; usize::try_from(DISK_BYTES).unwrap()],
            pending: [None; SLOTS as usize],
        };
        (0..SLOTS).for_each(|slot| load.begin(slot));
        for ended in 1..=REQUESTS {
            let head = load.next(sleeps);
            let slot = load.end(head);
            if ended + u32::from(SLOTS) <= REQUESTS {
                load.begin(slot);
            }
        }
        assert!(load.pending.iter().all(Option::is_none));
    }
}

fn file(dir: &Path, cache: CacheMode) -> File {
    let path = dir.join("disk.img");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    File::open(file_options(path, cache)).unwrap()
}

/// Every way of waiting, each with a client that sleeps and one that polls.
fn verify<B: Storage>(disk: impl Fn() -> B) {
    let adaptive = Polling::Adaptive(Duration::from_micros(100));
    for polling in [Polling::Never, adaptive, Polling::Always] {
        for sleeps in [true, false] {
            let fixture = Fixture::polling(disk(), 1, polling);
            Load::run(&fixture, sleeps);
            assert_eq!(fixture.counters.totals().errors, 0);
            fixture.wait_empty();
        }
    }
}

#[test]
fn memory_holds_what_was_written_however_threads_wait() {
    verify(|| MemoryDisk::new(limits(DISK_BYTES)).unwrap());
}

#[test]
fn a_file_without_page_cache_holds_what_was_written_however_threads_wait() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    verify(|| file(dir.path(), CacheMode::Auto));
}

#[test]
fn a_file_in_memory_holds_what_was_written_however_threads_wait() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    verify(|| file(dir.path(), CacheMode::Buffered));
}

#[test]
fn a_disk_whose_requests_end_elsewhere_holds_what_was_written_however_threads_wait() {
    verify(|| Elsewhere::new(limits(DISK_BYTES), usize::MAX));
}
