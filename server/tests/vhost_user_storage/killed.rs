//! Servers that are killed while a client writes: the one in front, and the one behind it.

use std::time::Instant;

use testkit::sandbox::Sandbox;
use testkit::server::Server;

use crate::common::*;
use crate::recorded::Client;
use crate::serve;

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
fn finish(client: &mut Client, mut ended: Vec<u32>) {
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
fn write(client: &mut Client, round: u32) -> Vec<u32> {
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
fn check(client: &mut Client, round: u32) {
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

/// Five times, or as often as `VHOST_USER_KILLS` says.
fn kills() -> u32 {
    std::env::var("VHOST_USER_KILLS").map_or(5, |kills| kills.parse().unwrap())
}

/// The server behind: export `p`, which does not wait for a client that has died.
fn serve_behind(lab: &Sandbox) -> Server {
    let spec = format!("p=file:{}", lab.path("disk.img").display());
    lab.serve(&["--ublk", "no", "--reconnect-grace", "0", &spec])
}

struct Pair {
    behind: Sandbox,
    front: Sandbox,
}

impl Pair {
    fn new() -> Self {
        let behind = sandbox();
        drop(behind.image("disk.img", 16 << 20));
        Self {
            behind,
            front: sandbox(),
        }
    }

    fn serve_front(&self) -> Server {
        serve(
            &self.front,
            &self.behind.path("run/exports/p/vhost-user-blk"),
        )
    }
}

fn tell(pauses: &mut [std::time::Duration]) {
    pauses.sort_unstable();
    let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    eprintln!(
        "{} kills: a pause of {median:?} at the median, {longest:?} at the longest",
        pauses.len()
    );
}

#[test]
fn a_client_loses_nothing_when_the_server_behind_is_killed_again_and_again() {
    let pair = Pair::new();
    let mut behind = serve_behind(&pair.behind);
    let front = pair.serve_front();
    let mut client = Client::connect(pair.front.connect("d"), USUAL);
    assert!(client.start());
    let mut pauses = Vec::new();
    for round in 1..=kills() {
        let ended = write(&mut client, round);
        behind.kill().unwrap();
        let died = Instant::now();
        behind = serve_behind(&pair.behind);
        finish(&mut client, ended);
        pauses.push(died.elapsed());
        check(&mut client, round);
    }
    tell(&mut pauses);
    drop(client);
    front.stop().unwrap();
    behind.stop().unwrap();
    pair.front.is_clean();
    pair.behind.is_clean();
}

#[test]
fn the_server_in_front_hands_over_to_another_one() {
    let pair = Pair::new();
    let behind = serve_behind(&pair.behind);
    let front = pair.serve_front();
    let mut client = Client::connect(pair.front.connect("d"), USUAL);
    assert!(client.start());
    let ended = write(&mut client, 7);
    let socket = pair.behind.path("run/exports/p/vhost-user-blk");
    let spec = format!("d=vhost-user:{}", socket.display());
    let next = pair.front.serve(&["--take-over", "--ublk", "no", &spec]);
    let (status, log) = front.wait().unwrap();
    assert!(status.success(), "{log}");
    client = client.reconnect(|| pair.front.connect("d"));
    assert!(client.start());
    finish(&mut client, ended);
    check(&mut client, 7);
    drop(client);
    next.stop().unwrap();
    behind.stop().unwrap();
    pair.front.is_clean();
    pair.behind.is_clean();
}

#[test]
fn a_client_loses_nothing_when_the_server_in_front_is_killed_again_and_again() {
    let pair = Pair::new();
    let behind = serve_behind(&pair.behind);
    let mut front = pair.serve_front();
    let mut client = Client::connect(pair.front.connect("d"), USUAL);
    assert!(client.start());
    let mut pauses = Vec::new();
    for round in 1..=kills() {
        let ended = write(&mut client, round);
        front.kill().unwrap();
        let died = Instant::now();
        front = pair.serve_front();
        client = client.reconnect(|| pair.front.connect("d"));
        assert!(client.start());
        finish(&mut client, ended);
        pauses.push(died.elapsed());
        check(&mut client, round);
    }
    tell(&mut pauses);
    drop(client);
    front.stop().unwrap();
    behind.stop().unwrap();
    pair.front.is_clean();
    pair.behind.is_clean();
}
