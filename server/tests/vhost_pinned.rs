//! Clients whose memory is pinned: the same data, whatever happens to the memory table. What is pinned
//! is read from the kernel, so the tests of this program run one at a time.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{DATA, Driver, Fixture, MEMORY_BYTES, NEXT, OK, T_IN, T_OUT, USUAL, WRITE, limits};
use ublkup::request::Serial;
use ublkup::storage::{CacheMode, File, FileOptions, Memory as MemoryDisk};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // The kernel takes its time to undo a ring.
    common::eventually("nothing of the test before is pinned", || pinned_kib() == 0);
    alone
}

/// A file of 4 MiB on a file system with `O_DIRECT`.
fn disk(dir: &Path) -> File {
    let path = dir.join("disk.img");
    fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    File::open(FileOptions {
        path,
        cache: CacheMode::Auto,
        read_only: false,
        block_bytes: None,
        serial: Serial::new("test").unwrap(),
        claim_later: false,
    })
    .unwrap()
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Memory of this process that the kernel holds for I/O, in KiB.
fn pinned_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPin:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

fn pattern(seed: u8) -> Vec<u8> {
    (0..8192u32).map(|at| seed ^ (at % 251) as u8).collect()
}

#[test]
fn data_of_pinned_memory_arrives_and_the_pins_go_with_the_session() {
    let _alone = alone();
    let dir = scratch();
    let fixture = Fixture::pinning(disk(dir.path()), 1);
    assert_eq!(pinned_kib(), 0);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(pinned_kib(), MEMORY_BYTES / 1024);
    for (sector, seed) in [(0, 1), (1000, 2), (8176, 3)] {
        assert_eq!(driver.write(sector, &pattern(seed)), OK);
    }
    for (sector, seed) in [(8176, 3), (0, 1), (1000, 2)] {
        assert_eq!(driver.read(sector, 8192), (OK, pattern(seed)));
    }
    // In two pieces, one of them not as O_DIRECT wants it: the other ways to the data.
    driver.memory.put(DATA + 4096, &pattern(4));
    let written = driver.request(T_OUT, 16, &[(4096, 0), (4096, 0)]);
    assert_eq!(written.0, OK);
    let pieces = [(512 - 3, WRITE), (8192 - 512 + 3, WRITE)];
    assert_eq!(driver.request(T_IN, 16, &pieces), (OK, 8193));
    assert_eq!(driver.memory.get(DATA + 4096, 8192), pattern(4));
    drop(driver);
    fixture.wait_empty();
    common::eventually("nothing is pinned any more", || pinned_kib() == 0);
    drop(fixture);
    let file = fs::read(dir.path().join("disk.img")).unwrap();
    assert_eq!(file[1000 * 512..][..8192], pattern(2));
}

#[test]
fn what_is_pinned_follows_the_memory_table() {
    let _alone = alone();
    let dir = scratch();
    let fixture = Fixture::pinning(disk(dir.path()), 2);
    let mut driver = Driver::connect(fixture.connect(), USUAL);
    let half = MEMORY_BYTES / 2;
    let low = driver.memory.part(0, half);
    driver.frontend.set_mem_table(&[low]).unwrap();
    driver.add_vring(128);
    assert_eq!(pinned_kib(), half / 1024);
    assert_eq!(driver.write(0, &pattern(7)), OK);
    let high = driver.memory.part(half, half);
    driver.frontend.add_mem_region(&high).unwrap();
    assert_eq!(pinned_kib(), MEMORY_BYTES / 1024);
    // A read across the border of the two regions, which are two pieces for the server.
    let read = |driver: &mut Driver| {
        driver.header(DATA, T_IN, 0);
        let chain = [
            (DATA, 16, NEXT),
            (half - 4096, 8192, WRITE),
            (DATA + 16, 1, WRITE),
        ];
        driver.submit_on(0, 0, &chain);
        driver.vrings[0].wait(&driver.memory);
        driver.memory.byte(DATA + 16)
    };
    assert_eq!(read(&mut driver), OK);
    assert_eq!(driver.memory.get(half - 4096, 8192), pattern(7));
    driver.frontend.remove_mem_region(&high).unwrap();
    assert_eq!(pinned_kib(), half / 1024);
    assert_eq!(read(&mut driver), common::IOERR);
    assert_eq!(driver.read(0, 8192), (OK, pattern(7)));
    // The same memory at another place here.
    driver
        .frontend
        .set_mem_table(&[driver.memory.region()])
        .unwrap();
    assert_eq!(pinned_kib(), MEMORY_BYTES / 1024);
    assert_eq!(read(&mut driver), OK);
    // A second thread pins for itself.
    driver.add_vring(128);
    assert_eq!(pinned_kib(), 2 * MEMORY_BYTES / 1024);
}

#[test]
fn a_disk_in_memory_has_no_use_for_pins() {
    let _alone = alone();
    let fixture = Fixture::pinning(MemoryDisk::new(limits(1 << 20)).unwrap(), 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(driver.write(0, &pattern(5)), OK);
    assert_eq!(driver.read(0, 8192), (OK, pattern(5)));
    assert_eq!(pinned_kib(), 0);
}
