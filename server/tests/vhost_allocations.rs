//! In steady state nothing is allocated: counted for the whole process, driver included.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use common::*;
use ublkup::storage::{Memory as MemoryDisk, Null};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `count` reads of 4 KiB, eight at a time, without allocating on the driver's side.
fn reads(driver: &mut Driver, count: u32) {
    for _ in 0..count / 8 {
        let vring = &mut driver.vrings[0];
        let old = vring.next_available;
        for n in 0..8 {
            vring.offer(&driver.memory, 3 * n);
        }
        vring.kick_if_wanted(&driver.memory, old);
        for done in 0..8 {
            let index = old.wrapping_add(done + 1);
            while vring.used_index(&driver.memory).wrapping_sub(index) > 8 {
                assert!(readable(&vring.call, PATIENCE), "no notification came");
                vring.call.read().unwrap();
            }
        }
    }
}

/// The first and only test here: the count is for the whole process.
#[test]
fn requests_in_steady_state_allocate_nothing() {
    let fixtures = [
        Fixture::new(Null::new(limits(1 << 20)), 1),
        Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 1),
    ];
    for fixture in &fixtures {
        let mut driver = Driver::running(fixture.connect(), USUAL);
        driver.header(DATA, T_IN, 8);
        for n in 0..8 {
            let table = driver.vrings[0].descriptors;
            let data = DATA + 8192 * (1 + u64::from(n));
            driver
                .memory
                .descriptor(table, 3 * n, (DATA, 16, NEXT, 3 * n + 1));
            driver
                .memory
                .descriptor(table, 3 * n + 1, (data, 4096, NEXT | WRITE, 3 * n + 2));
            driver
                .memory
                .descriptor(table, 3 * n + 2, (DATA + 16, 1, WRITE, 0));
        }
        reads(&mut driver, 800);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        reads(&mut driver, 16_000);
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
        assert_eq!(fixture.counters.totals().reads, 16_800);
    }
}
