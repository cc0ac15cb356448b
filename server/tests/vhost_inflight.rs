//! A server that is killed between any two steps on the way of a request: the next one returns every
//! request that the client waits for, once, in the order in which they were taken, and the client is
//! notified.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use common::{Sandbox, sandbox};
use testkit::server::Server;
use ublkup::engine::crash::{REQUEST_POINTS, VARIABLE};
use ublkup::storage::Memory as MemoryDisk;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

const CHAINS: u16 = 12;
const LEN: usize = 4096;
const DISK_BYTES: usize = 1 << 20;

/// A disk whose requests end in the order in which they begin: a file in memory.
const FAST: &str = "";
/// One that has them all under way at once, and does reads before writes.
const SLOW: &str = "fault:write=delay60;any=delay30;";

/// Bytes that tell one place of the disk from another, and what was there from what is written.
fn pattern(number: u16, seed: u8) -> Vec<u8> {
    let tell = |at: usize| (at % 253).to_le_bytes()[0];
    (0..LEN)
        .map(|at| tell(at) ^ seed ^ number.to_le_bytes()[0].wrapping_mul(17))
        .collect()
}

const OLD: u8 = 0x31;
const NEW: u8 = 0xc5;

/// The disk and the servers of it.
struct Place {
    lab: Sandbox,
    _memory: tempfile::TempDir,
    image: PathBuf,
}

impl Place {
    fn new() -> Self {
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let image = memory.path().join("disk.img");
        let mut bytes = vec![0; DISK_BYTES];
        for number in 0..CHAINS {
            bytes[usize::from(number) * LEN..][..LEN].copy_from_slice(&pattern(number, OLD));
        }
        fs::write(&image, bytes).unwrap();
        Self {
            lab: sandbox(),
            _memory: memory,
            image,
        }
    }

    /// A server that dies at `point`, and a connection.
    fn serve(&self, how: &str, point: Option<&str>) -> (Server, UnixStream) {
        let image = self.image.display();
        let spec = format!("disk={how}file:{image},cache=buffered");
        let args = ["--ublk", "no", "--queues", "1", &spec];
        let env: Vec<_> = point.iter().map(|point| (VARIABLE, *point)).collect();
        let server = self.lab.serve_with(&args, &env);
        let socket = self.lab.path("run/exports/disk/vhost-user-blk");
        (server, UnixStream::connect(socket).unwrap())
    }
}

/// Whether chain `number` writes; the others read.
fn writes(number: u16) -> bool {
    number % 2 == 1
}

/// The first descriptor of chain `number`: another order than that of the chains.
fn head(number: u16) -> u16 {
    3 * (number * 5 % CHAINS)
}

fn memory_of(number: u16) -> u64 {
    DATA + 0x4000 * u64::from(number)
}

/// A driver that looks at its ring when it was notified and not before.
struct Guest {
    driver: Driver,
    told: VhostUserInflight,
    record: File,
    chains: u16,
    /// Heads that came back.
    back: Vec<u32>,
}

impl Guest {
    /// Connects, starts a vring with a record, and sends all chains at once. The server may die of it.
    fn start(stream: UnixStream, chains: u16) -> Self {
        let mut driver = Driver::connect(stream, USUAL);
        let wanted = VhostUserInflight::new(0, 0, 1, 128);
        let (told, record) = driver.frontend.get_inflight_fd(&wanted).unwrap();
        let mut vring = Vring::new(0, 128);
        for number in 0..chains {
            let (at, first) = (memory_of(number), head(number));
            let kind = if writes(number) { T_OUT } else { T_IN };
            driver.header(at, kind, u64::from(number) * LEN as u64 / 512);
            driver.memory.put(at + 16, &[UNTOUCHED]);
            driver.memory.put(at + 4096, &pattern(number, NEW));
            let flags = if writes(number) { 0 } else { WRITE };
            let len = u32::try_from(LEN).unwrap();
            let chain = [
                (at, 16, NEXT, first + 1),
                (at + 4096, len, flags | NEXT, first + 2),
                (at + 16, 1, WRITE, 0),
            ];
            for (index, descriptor) in (first..).zip(chain) {
                let table = vring.descriptors;
                driver.memory.descriptor(table, index, descriptor);
            }
            vring.offer(&driver.memory, first);
        }
        driver.vrings.push(vring);
        let mut guest = Self {
            driver,
            told,
            record,
            chains,
            back: Vec::new(),
        };
        guest.start_vring();
        guest
    }

    fn start_vring(&mut self) {
        let Self { driver, told, .. } = self;
        let fd = self.record.as_raw_fd();
        driver.frontend.set_inflight_fd(told, fd).unwrap();
        let base = driver.vrings[0].used_index(&driver.memory);
        // Its answer may not come any more.
        let _ = attempt(|| driver.start(0, base));
    }

    fn reconnect(self, connect: impl FnOnce() -> UnixStream) -> Self {
        let mut guest = Self {
            driver: self.driver.reconnect(connect),
            ..self
        };
        guest.start_vring();
        guest
    }

    /// All that the ring holds, seen by the driver or not.
    fn on_the_ring(&self) -> Vec<u32> {
        let (vring, memory) = (&self.driver.vrings[0], &self.driver.memory);
        (0..vring.used_index(memory))
            .map(|at| {
                let entry = memory.get(vring.used + 4 + 8 * u64::from(at % vring.size), 4);
                u32::from_le_bytes(entry.try_into().unwrap())
            })
            .collect()
    }

    /// Looks at the ring if there was a notification.
    fn look_if_notified(&mut self, limit: Duration) -> bool {
        let Driver { memory, vrings, .. } = &mut self.driver;
        if !readable(&vrings[0].call, limit) {
            return false;
        }
        vrings[0].call.read().unwrap();
        while let Some((head, _)) = vrings[0].reap(memory) {
            self.back.push(head);
        }
        true
    }

    fn wait_for_all(&mut self) {
        while self.back.len() < self.chains.into() {
            let notified = self.look_if_notified(PATIENCE);
            assert!(notified, "nobody said so, but back are {:?}", self.back);
        }
    }

    /// Every chain came back once, with the right data; and the ring goes on.
    fn check(&mut self, place: &Place) {
        let mut back = self.back.clone();
        back.sort_unstable();
        let mut all: Vec<u32> = (0..self.chains).map(|number| head(number).into()).collect();
        all.sort_unstable();
        assert_eq!(back, all);
        let disk = fs::read(&place.image).unwrap();
        for number in 0..self.chains {
            let at = memory_of(number);
            assert_eq!(self.driver.memory.byte(at + 16), OK, "chain {number}");
            if writes(number) {
                let there = &disk[usize::from(number) * LEN..][..LEN];
                assert!(there == pattern(number, NEW), "chain {number} was written");
            } else {
                let read = self.driver.memory.get(at + 4096, LEN);
                assert!(read == pattern(number, OLD), "chain {number} was read");
            }
        }
        assert_eq!(self.driver.read(0, LEN), (OK, pattern(0, OLD)));
        assert_eq!(self.on_the_ring().len(), usize::from(self.chains) + 1);
        eventually("nothing is on record any more", || {
            let mut record = vec![0; 16 + 16 * 128];
            self.record.read_exact_at(&mut record, 0).unwrap();
            record[14..16] == (self.chains + 1).to_le_bytes()
                && record[16..].iter().step_by(16).all(|flag| *flag == 0)
        });
    }
}

/// Sends requests to a server that dies at the first of `points`; each further one goes on until it dies
/// at the next, and the last one does the rest.
fn die(chains: u16, how: &str, points: &[&str]) {
    let place = Place::new();
    let order: Vec<u32> = (0..chains).map(|number| head(number).into()).collect();
    let mut guest: Option<Guest> = None;
    let mut returned = 0;
    for (died, point) in points.iter().enumerate() {
        let (server, stream) = place.serve(if died == 0 { how } else { FAST }, Some(point));
        let mut new = match guest.take() {
            None => Guest::start(stream, chains),
            Some(old) => old.reconnect(|| stream),
        };
        assert_eq!(server.exit_code().unwrap(), None, "killed at {point}");
        new.look_if_notified(Duration::ZERO);
        if died == 0 {
            returned = new.on_the_ring().len();
        }
        guest = Some(new);
    }
    let mut guest = guest.unwrap();
    let done = guest.on_the_ring()[..returned].to_vec();
    let (server, stream) = place.serve(FAST, None);
    guest = guest.reconnect(|| stream);
    guest.wait_for_all();
    // Those that the first one had not returned, as they were taken.
    let left: Vec<u32> = (order.iter().copied())
        .filter(|head| !done.contains(head))
        .collect();
    assert_eq!(guest.on_the_ring()[returned..], left, "after {points:?}");
    guest.check(&place);
    drop(guest);
    server.stop().unwrap();
}

fn at(point: &str, times: u32) -> String {
    format!("{point}:{times}")
}

/// The points that a server passes which was started with an empty record.
fn first_points() -> &'static [&'static str] {
    &REQUEST_POINTS[..8]
}

/// How often a point is passed by a server that has all requests to do: once for each, or for each
/// batch, of which there are three at least.
fn passes(point: &str) -> [u32; 3] {
    match point {
        "answers-published" | "batch-noted" => [1, 2, 3],
        _ => [1, 6, CHAINS.into()],
    }
}

#[test]
fn a_single_request_survives_a_server_killed_at_any_step() {
    for point in first_points() {
        die(1, FAST, &[&at(point, 1)]);
    }
}

#[test]
fn many_requests_survive_a_server_killed_at_any_step_of_any_of_them() {
    for point in first_points() {
        for times in passes(point) {
            die(CHAINS, SLOW, &[&at(point, times)]);
        }
    }
}

#[test]
fn requests_survive_servers_that_are_killed_while_they_do_them_again() {
    // Seven are under way, and then five more are taken.
    for point in first_points() {
        let times = if passes(point)[2] == 3 { 2 } else { 3 };
        die(CHAINS, SLOW, &["chain-on-record:7", &at(point, times)]);
    }
}

#[test]
fn requests_survive_servers_that_are_killed_while_they_repair_the_record() {
    let unnoted = [
        "answers-published:2",
        "answer-off-record:1",
        "answer-off-record:5",
    ];
    for point in &REQUEST_POINTS[8..] {
        for died in unnoted {
            die(CHAINS, SLOW, &[died, &at(point, 1)]);
        }
        // Three die in a row.
        die(
            CHAINS,
            SLOW,
            &["answers-published:1", &at(point, 1), "answers-published:1"],
        );
    }
}

/// What a server that was killed left behind: three chains taken, in another order than they lie on the
/// ring, one of them returned. The next one does the other two, in the order in which they were taken.
#[test]
fn requests_of_a_server_that_died_are_done_by_the_next_one() {
    let fixture = Fixture::new(MemoryDisk::new(limits(64 << 20)).unwrap(), 2);
    let told = VhostUserInflight::new(0, 0, 1, 128);
    let mut asking = Driver::connect(fixture.connect(), USUAL);
    let (told, record) = asking.frontend.get_inflight_fd(&told).unwrap();
    drop(asking);
    fixture.wait_empty();

    let mut driver = Driver::connect(fixture.connect(), USUAL);
    let fd = record.as_raw_fd();
    driver.frontend.set_inflight_fd(&told, fd).unwrap();
    // Chains 0, 3 and 6 read sectors 0, 8 and 16; all three are on the ring.
    let mut vring = Vring::new(0, 128);
    for (head, sector) in [(0, 0), (3, 8), (6, 16)] {
        let at = DATA + 0x1_0000 * u64::from(head);
        driver.header(at, T_IN, sector);
        driver.memory.put(at + 16, &[UNTOUCHED]);
        let chain = [
            (at, 16, NEXT, head + 1),
            (at + 4096, 4096, WRITE | NEXT, head + 2),
            (at + 16, 1, WRITE, 0),
        ];
        for (index, descriptor) in (head..).zip(chain) {
            driver
                .memory
                .descriptor(vring.descriptors, index, descriptor);
        }
        vring.offer(&driver.memory, head);
    }
    // The dead server's record: 6 was taken first, then 0 and 3; 0 has been returned.
    driver
        .memory
        .word(vring.used + 2)
        .store(1, Ordering::Relaxed);
    vring.next_used = 1;
    let entry = |head: u64, inflight: u8, number: u64| {
        record.write_all_at(&[inflight], 16 + 16 * head).unwrap();
        record
            .write_all_at(&number.to_le_bytes(), 16 + 16 * head + 8)
            .unwrap();
    };
    // Version 1, descriptors, last batch began at 0, used index 0: the end of it was not noted.
    let room = u16::try_from((told.mmap_size - 16) / 16).unwrap();
    let header: Vec<u8> = [1u16, room, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    record.write_all_at(&header, 8).unwrap();
    entry(0, 1, 11);
    entry(3, 1, 12);
    entry(6, 1, 10);
    driver.vrings.push(vring);
    // The base that a client sends after a reconnect is the used index.
    driver.start(0, 1);

    let memory = &driver.memory;
    let heads: Vec<u32> = (0..2).map(|_| driver.vrings[0].wait(memory).0).collect();
    assert_eq!(heads, [6, 3]);
    // And it goes on with what is new.
    assert_eq!(driver.read(0, 512).0, OK);
    let mut left = [0; 2];
    record.read_exact_at(&mut left, 14).unwrap();
    assert_eq!(u16::from_le_bytes(left), 4, "the record's used index");
    for head in [0, 3, 6] {
        let mut flag = [9];
        record.read_exact_at(&mut flag, 16 + 16 * head).unwrap();
        assert_eq!(flag, [0], "chain {head} is on record as under way");
    }
}
