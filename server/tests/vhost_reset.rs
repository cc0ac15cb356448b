//! The device begins anew: RESET_DEVICE, and the status.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/disks.rs"]
mod disks;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::*;
use disks::Gated;
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;
const NEED_REPLY: u32 = 8;

fn fixture() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 2)
}

/// A second hand on the connection of a driver: for messages that its crate does not know.
struct Raw(UnixStream);

impl Raw {
    fn send(&mut self, request: u32, flags: u32, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        let header = [request, 1 | flags, len].map(u32::to_ne_bytes).concat();
        self.0.write_all(&[&header, payload].concat()).unwrap();
    }

    fn answer(&mut self, request: u32) -> u64 {
        let mut answer = [0; 20];
        self.0.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..12], [request, 5, 8].map(u32::to_ne_bytes).concat());
        u64::from_ne_bytes(answer[12..].try_into().unwrap())
    }

    /// Whether the server has hung up, perhaps without having read everything.
    fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(len) => len == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    fn status(&mut self) -> u64 {
        self.send(GET_STATUS, 0, &[]);
        self.answer(GET_STATUS)
    }

    fn set_status(&mut self, status: u64) -> u64 {
        self.send(SET_STATUS, NEED_REPLY, &status.to_ne_bytes());
        self.answer(SET_STATUS)
    }
}

fn running(fixture: &Fixture) -> (Driver, Raw) {
    let stream = fixture.connect();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let raw = Raw(stream.try_clone().unwrap());
    (Driver::running(stream, USUAL), raw)
}

/// Starts the first vring again as a driver does that was just loaded.
fn start_again(driver: &mut Driver) {
    driver.frontend.set_features(driver.features).unwrap();
    let vring = Vring::new(0, 128);
    driver.memory.put(vring.available, &[0; 512]);
    driver.memory.put(vring.used, &[0; 2048]);
    driver.vrings[0] = vring;
    driver.start(0, 0);
}

#[test]
fn a_device_that_was_reset_begins_anew_and_keeps_memory_and_disk() {
    let fixture = fixture();
    let (mut driver, mut raw) = running(&fixture);
    driver.add_vring(128);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    for by_status in [false, true, false] {
        if by_status {
            assert_eq!(raw.set_status(0), 0);
        } else {
            driver.frontend.reset_device().unwrap();
        }
        assert_eq!(fixture.door.sessions()[0].vrings, 0);
        assert!(
            fixture.ownership.holder().is_some(),
            "it boots anew, no more"
        );
        start_again(&mut driver);
        assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
    }
}

#[test]
fn the_status_is_what_was_set_and_a_reset_is_acknowledged_when_all_is_done() {
    let (fixture, gate) = Gated::fixture(1 << 20, 1);
    let (mut driver, mut raw) = running(&fixture);
    assert_eq!(raw.status(), 0);
    for status in [1, 3, 11, 15] {
        assert_eq!(raw.set_status(status), 0);
        assert_eq!(raw.status(), status);
    }
    // Without a wish for an answer there is none.
    raw.send(SET_STATUS, 0, &7u64.to_ne_bytes());
    assert_eq!(raw.status(), 7);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        gate.write(1).unwrap();
    });
    eventually("the device takes the request", || {
        fixture.counters.totals().batches > 0
    });
    assert_eq!(raw.set_status(0), 0);
    assert_eq!(raw.status(), 0);
    opener.join().unwrap();
}

#[test]
fn messages_about_the_status_that_make_no_sense_end_the_session() {
    let fixture = fixture();
    let odd: [(u32, u32, &[u8]); 5] = [
        (SET_STATUS, 0, &256u64.to_ne_bytes()),
        (SET_STATUS, 0, &[0; 7]),
        (SET_STATUS, 0, &[]),
        (GET_STATUS, 0, &[0; 8]),
        // An answer nobody asked for.
        (GET_STATUS, 4, &[]),
    ];
    for (request, flags, payload) in odd {
        let (driver, mut raw) = running(&fixture);
        raw.send(request, flags, payload);
        assert!(raw.is_closed(), "{request} {payload:?}");
        drop(driver);
        fixture.wait_empty();
    }
    // Who did not agree on it may not use it.
    let mut raw = Raw(fixture.connect());
    raw.0.set_read_timeout(Some(PATIENCE)).unwrap();
    raw.send(GET_STATUS, 0, &[]);
    assert!(raw.is_closed());
}

/// It asks and asks and does not read: its session ends, nobody else waits.
#[test]
fn a_client_that_does_not_read_its_answers_loses_its_session() {
    let mut limits = limits(1 << 20);
    limits.read_only = true;
    let fixture = Fixture::new(MemoryDisk::new(limits).unwrap(), 1);
    let mut good = Driver::running(fixture.connect(), VERSION_1 | PROTOCOL);
    let mut deaf = fixture.connect();
    deaf.set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let get_features = [1u32, 1, 0].map(u32::to_ne_bytes).concat();
    // Until the server stops reading, because it cannot write.
    let error = loop {
        if let Err(error) = deaf.write_all(&get_features) {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    for _ in 0..100 {
        assert_eq!(good.read(0, 4096).0, OK);
    }
    assert_eq!(fixture.door.sessions().len(), 2, "it is being waited for");
    eventually("its session ends", || fixture.door.sessions().len() == 1);
    assert_eq!(good.read(0, 4096).0, OK);
}

#[test]
fn what_a_broken_ring_left_on_record_is_gone_after_a_reset() {
    let (fixture, gate) = Gated::fixture(1 << 20, 1);
    let mut driver = Driver::connect(fixture.connect(), USUAL);
    let wanted = VhostUserInflight::new(0, 0, 1, 128);
    let (told, record) = driver.frontend.get_inflight_fd(&wanted).unwrap();
    let send = |driver: &mut Driver| {
        let fd = record.as_raw_fd();
        driver.frontend.set_inflight_fd(&told, fd).unwrap();
        driver.add_vring(128);
    };
    send(&mut driver);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    let is_taken = || {
        // The flag of descriptor 0 (vhost-user, "Inflight I/O tracking").
        let mut flag = [0];
        record.read_exact_at(&mut flag, 16).unwrap();
        flag[0] != 0
    };
    eventually("the chain is taken", is_taken);
    // The chain ends, but cannot be returned.
    let vring = &driver.vrings[0];
    let index = driver.memory.word(vring.available + 2);
    index.store(300, Ordering::Release);
    vring.kick.write(1).unwrap();
    assert!(readable(&vring.error, PATIENCE), "the ring is not broken");
    gate.write(1).unwrap();
    driver.frontend.reset_device().unwrap();
    assert!(!is_taken());

    driver
        .memory
        .word(driver.vrings[0].available + 2)
        .store(0, Ordering::Release);
    driver.vrings.clear();
    driver.frontend.set_features(USUAL).unwrap();
    send(&mut driver);
    gate.write(1).unwrap();
    assert_eq!(driver.read(0, 512).0, OK);
    assert_eq!(driver.vrings[0].used_index(&driver.memory), 1);
}
