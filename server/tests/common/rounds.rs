//! Rounds of writes to the same blocks, all at once, in which servers are killed.

#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::time::{Duration, Instant};

use testkit::sandbox::Sandbox;
use testkit::server::Server;

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
pub fn pattern(round: u32, block: u16) -> Vec<u8> {
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

/// Kills the server of export `d` in each round, while its client writes, and starts the next. The last server, and the client.
pub fn kill_servers(
    (lab, variable): (&Sandbox, &str),
    (mut server, mut client): (Server, Client),
    serve: impl Fn() -> Server,
) -> (Server, Client) {
    let mut pauses = Vec::new();
    for round in 1..=kills(variable) {
        let ended = write(&mut client, round);
        server.kill().unwrap();
        let died = Instant::now();
        server = serve();
        client = client.reconnect(|| lab.connect("d"));
        assert!(client.start());
        finish(&mut client, ended);
        pauses.push(died.elapsed());
        check(&mut client, round);
    }
    tell(&mut pauses);
    (server, client)
}

/// Has another server take export `d` over while its client writes. That server, and the client.
pub fn hand_over(
    lab: &Sandbox,
    (server, mut client): (Server, Client),
    take_over: impl FnOnce() -> Server,
) -> (Server, Client) {
    let ended = write(&mut client, 7);
    let next = take_over();
    let (status, log) = server.wait().unwrap();
    assert!(status.success(), "{log}");
    client = client.reconnect(|| lab.connect("d"));
    assert!(client.start());
    finish(&mut client, ended);
    check(&mut client, 7);
    (next, client)
}

/// A client that has the disk of export `d`.
pub fn client(lab: &Sandbox, features: u64) -> Client {
    let mut client = Client::connect(lab.connect("d"), features);
    assert!(client.start());
    client
}
