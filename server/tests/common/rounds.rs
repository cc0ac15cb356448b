//! Rounds of writes to the same blocks, all at once, in which servers are killed.

use std::time::Duration;

use crate::common::*;
use crate::recorded::Client;

/// Blocks that are written in each round, all at once.
const BLOCKS: u16 = 40;
const LEN: usize = 4096;

/// Where the memory of a block's request begins: header, status, data.
fn memory_of(block: u16) -> u64 {
    DATA + 0x2000 * u64::from(block)
}

/// What a block holds after a round.
fn pattern(round: u32, block: u16) -> Vec<u8> {
    let seed = u64::from(round) << 32 | u64::from(block) << 16;
    let words = (0..LEN as u64 / 8).map(|at| (seed | at).to_le_bytes());
    words.flatten().collect()
}

fn offer(client: &mut Client, kind: u32) {
    let flags = if kind == T_IN { WRITE } else { 0 };
    for block in 0..BLOCKS {
        let at = memory_of(block);
        let driver = &mut client.driver;
        driver.header(at, kind, u64::from(block) * LEN as u64 / 512);
        driver.memory.put(at + 16, &[UNTOUCHED]);
        let data = (at + 4096, u32::try_from(LEN).unwrap(), flags);
        driver.submit_on(0, 3 * block, &[(at, 16, 0), data, (at + 16, 1, WRITE)]);
    }
}

/// Waits until all requests have ended, each once and well.
pub fn finish(client: &mut Client, mut ended: Vec<u32>) {
    let driver = &mut client.driver;
    while ended.len() < usize::from(BLOCKS) {
        ended.push(driver.vrings[0].wait(&driver.memory).0);
    }
    ended.sort_unstable();
    let all: Vec<u32> = (0..BLOCKS).map(|block| u32::from(3 * block)).collect();
    assert_eq!(ended, all);
    for block in 0..BLOCKS {
        assert_eq!(driver.memory.byte(memory_of(block) + 16), OK, "{block}");
    }
}

/// Offers the writes of a round and waits for some of them.
pub fn write(client: &mut Client, round: u32) -> Vec<u32> {
    for block in 0..BLOCKS {
        let memory = &client.driver.memory;
        memory.put(memory_of(block) + 4096, &pattern(round, block));
    }
    offer(client, T_OUT);
    let mut ended = Vec::new();
    while ended.len() < usize::try_from(round).unwrap() % 16 {
        let driver = &mut client.driver;
        ended.push(driver.vrings[0].wait(&driver.memory).0);
    }
    ended
}

/// Reads all blocks, which are those of the round.
pub fn check(client: &mut Client, round: u32) {
    for block in 0..BLOCKS {
        let memory = &client.driver.memory;
        memory.put(memory_of(block) + 4096, &[0; LEN]);
    }
    offer(client, T_IN);
    finish(client, Vec::new());
    for block in 0..BLOCKS {
        let found = client.driver.memory.get(memory_of(block) + 4096, LEN);
        assert!(found == pattern(round, block), "block {block} of {round}");
    }
}

/// Five, or as many as the variable says.
pub fn kills(variable: &str) -> u32 {
    std::env::var(variable).map_or(5, |kills| kills.parse().unwrap())
}

/// Says how long the client had to wait.
pub fn tell(pauses: &mut [Duration]) {
    pauses.sort_unstable();
    let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    eprintln!(
        "{} kills: a pause of {median:?} at the median, {longest:?} at the longest",
        pauses.len()
    );
}
