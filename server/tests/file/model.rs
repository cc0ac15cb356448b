//! Random requests against a copy in memory.

use std::path::Path;

use testkit::random::Random;
use ublkup::engine::StorageControl;
use ublkup::request::Op;
use ublkup::storage::{CacheMode, File};

use crate::client::{Client, Shape};
use crate::common::file_options;
use crate::{UNMAP, ZERO};

/// Random requests of all kinds, several at once, against a disk of which a copy is kept.
pub fn model(path: &Path, cache: CacheMode, seed: u64) {
    let disk = File::open(file_options(path, cache)).unwrap();
    let name = format!("{}, {cache:?}, seed {seed}", path.display());
    let mut client = Client::new(&disk, 16);
    let block = u64::from(disk.limits().block_bytes);
    let blocks = disk.limits().capacity.bytes() / block;
    let mut copy = vec![0; usize::try_from(disk.limits().capacity.bytes()).unwrap()];
    // It may hold anything.
    client.write(0, &copy, Shape::Aligned).unwrap();
    let mut random = Random(seed);
    for round in 0..60 {
        // Neighbours share no block: each gets a range of its own.
        let share = blocks / 16;
        let mut expected = Vec::new();
        for slot in 0..16u64 {
            let first = slot * share + random.below(share);
            let count = 1 + random.below((slot + 1) * share - first).min(300);
            let (at, len) = (first * block, count * block);
            let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
            let shape = Shape::any(&mut random);
            let op = match random.below(10) {
                0..4 => Op::Read,
                4..7 => Op::Write {
                    fua: random.below(4) == 0,
                },
                7 => Op::Flush,
                8 => ZERO,
                _ => UNMAP,
            };
            let mut data = vec![0; range.len()];
            match op {
                Op::Write { .. } => {
                    random.fill(&mut data);
                    copy[range.clone()].copy_from_slice(&data);
                }
                Op::Read => expected.push((slot, range)),
                Op::Flush | Op::Discard => {}
                Op::WriteZeroes { .. } => copy[range].fill(0),
            }
            client.submit(slot, op, at, len, &data, shape);
        }
        let mut ended = client.finish_all();
        for (slot, outcome) in ended.iter().map(|end| (end.slot, end.outcome)) {
            assert_eq!(outcome, Ok(()), "{name}, round {round}, slot {slot}");
        }
        for (slot, range) in expected {
            let end = ended
                .iter_mut()
                .find(|end| u64::from(end.slot) == slot)
                .unwrap();
            assert!(
                *end.data() == copy[range],
                "{name}, round {round}, slot {slot} read wrong"
            );
        }
    }
    let all = client.read(0, copy.len(), Shape::Odd);
    assert!(all == copy, "{name}: the disk is not what it should be");
}
