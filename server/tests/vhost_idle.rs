//! What a connected client costs while it asks for nothing. A program of its own: it counts what every
//! vhost thread of its process does.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::fs::{self, DirEntry};
use std::time::Duration;

use common::*;
use ublkup::storage::Memory as MemoryDisk;

/// Threads of the door's sessions, and how often they were scheduled, of their own will or not.
fn switches() -> (usize, u64) {
    let of = |task: DirEntry| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        let counts = lines.filter_map(|line| line.rsplit_once('\t')?.1.parse::<u64>().ok());
        name.starts_with("vhost").then(|| counts.sum::<u64>())
    };
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let counts: Vec<u64> = tasks.filter_map(of).collect();
    (counts.len(), counts.iter().sum())
}

#[test]
fn a_connected_client_with_a_started_queue_wakes_nobody_while_idle() {
    let fixture = Fixture::new(MemoryDisk::new(limits(64 << 20)).unwrap(), 4);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    // The threads still have to lie down.
    let mut before = switches();
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(200));
        let now = switches();
        if now == before {
            break;
        }
        before = now;
    }
    assert!(before.0 >= 2, "session and queue: {} threads", before.0);
    // The time something periodic would need to show itself.
    std::thread::sleep(Duration::from_secs(10));
    assert_eq!(switches(), before, "an idle session woke up");
    assert_eq!(driver.write(1, &[8; 512]), OK);
    assert!(
        switches().1 > before.1,
        "the switches of these threads are not counted"
    );
}
