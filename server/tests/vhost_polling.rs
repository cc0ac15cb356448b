//! Threads that look for work instead of sleeping answer the same, and make fewer system calls.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::*;
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use ublkup::engine::polling::Polling;
use ublkup::storage::Memory as MemoryDisk;
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

const DEPTH: usize = 32;
const BLOCK: usize = 4096;

/// A disk of 64 MiB and what each of its blocks must hold: its number and how often it was written.
struct Blocks(Vec<u64>);

impl Blocks {
    fn pattern(&self, block: usize) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        if self.0[block] > 0 {
            let word = (block as u64) << 32 | self.0[block];
            for at in bytes.chunks_exact_mut(8) {
                at.copy_from_slice(&word.to_le_bytes());
            }
        }
        bytes
    }
}

/// Writes and reads 32 blocks at a time, never notified, and compares what it reads.
fn work(fixture: &Fixture, event_index: bool, rounds: usize) {
    let mut features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_INDIRECT_DESC;
    features.set(VirtioFeatureFlags::RING_EVENT_IDX, event_index);
    let path = fixture.door.path().to_str().unwrap();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(path, features.bits()).unwrap());
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(&mut *transport, 1, 128).unwrap();
    let len = DEPTH * BLOCK;
    let file = File::from(memfd_create("buffers", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len as u64).unwrap();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; it stays to the end.
    let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) };
    let base = base.unwrap().cast::<u8>();
    transport
        .map_mem_region(base as usize, len, file.as_raw_fd(), 0)
        .unwrap();
    // As clients do: what blocks is written by a worker of the kernel.
    let call = transport.get_completion_fd(0);
    fcntl_setfl(&*call, OFlags::NONBLOCK).unwrap();
    let queue = &mut queues[0];
    queue.set_used_notif_enabled(false);
    let mut blocks = Blocks(vec![0; (64 << 20) / BLOCK]);
    let mut random = 1u64;
    for round in 0..rounds {
        let writing = round % 2 == 0;
        let mut chosen = Vec::with_capacity(DEPTH);
        for slot in 0..DEPTH {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Half of them are seen again.
            let block =
                usize::try_from(random >> 40).unwrap() % 512 * DEPTH % blocks.0.len() + slot;
            let at = base.wrapping_add(slot * BLOCK);
            // SAFETY: the slot's part of the mapping, which the device leaves alone until asked.
            let buffer = unsafe { std::slice::from_raw_parts_mut(at, BLOCK) };
            let offset = (block * BLOCK) as u64;
            if writing {
                blocks.0[block] += 1;
                buffer.copy_from_slice(&blocks.pattern(block));
                queue.write(offset, buffer, slot).unwrap();
            } else {
                buffer.fill(0xee);
                queue.read(offset, buffer, slot).unwrap();
            }
            chosen.push(block);
        }
        if queue.avail_notif_needed() {
            transport.get_submission_notifier(0).notify().unwrap();
        }
        let deadline = Instant::now() + PATIENCE;
        let mut left = DEPTH;
        while left > 0 {
            let Some(done) = queue.completions().next() else {
                assert!(
                    Instant::now() < deadline,
                    "{left} requests are not answered"
                );
                std::hint::spin_loop();
                continue;
            };
            left -= 1;
            assert_eq!(done.ret, 0);
            if !writing {
                let at = base.wrapping_add(done.context * BLOCK);
                // SAFETY: the device has answered and is done with it.
                let buffer = unsafe { std::slice::from_raw_parts(at, BLOCK) };
                assert_eq!(buffer, blocks.pattern(chosen[done.context]));
            }
        }
    }
    drop(queues);
    drop(transport);
    fixture.wait_empty();
}

fn fixture(polling: Polling) -> Fixture {
    Fixture::polling(MemoryDisk::new(limits(64 << 20)).unwrap(), 1, polling)
}

#[test]
fn blocks_are_read_back_however_the_thread_waits() {
    let adaptive = |us| Polling::Adaptive(Duration::from_micros(us));
    for polling in [Polling::Never, adaptive(1), adaptive(100), Polling::Always] {
        for event_index in [true, false] {
            let fixture = fixture(polling);
            work(&fixture, event_index, 200);
            let totals = fixture.counters.totals();
            assert_eq!(totals.errors, 0, "{polling}");
            assert_eq!(totals.reads + totals.writes, 200 * DEPTH as u64);
        }
    }
}

#[test]
fn a_thread_that_always_looks_needs_no_system_call_for_a_client_that_looks() {
    let fixture = fixture(Polling::Always);
    work(&fixture, true, 1000);
    let totals = fixture.counters.totals();
    let requests = totals.reads + totals.writes;
    assert_eq!(requests, 1000 * DEPTH as u64);
    // The start, the end, the first notification, and a kick for each turn of the index.
    assert!(totals.enters < 50, "{} for {requests}", totals.enters);
}
