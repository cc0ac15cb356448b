//! A guest whose memory the server does not see hangs, and nothing but the server's log can say why.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use common::*;
use testkit::server::Server;
use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

fn serve(lab: &Sandbox) -> Server {
    lab.serve(&["--ublk", "no", "d=mem:1M"])
}

/// The lines of the log with this in them.
fn lines(server: &Server, text: &str) -> usize {
    server
        .log()
        .lines()
        .filter(|line| line.contains(text))
        .count()
}

fn is_told(server: &Server, text: &str) {
    eventually("the cause is in the log", || lines(server, text) > 0);
    assert_eq!(lines(server, "share=on"), 1, "{}", server.log());
}

#[test]
fn a_client_that_shares_no_memory_and_sets_up_a_vring_is_told_of() {
    let lab = sandbox();
    let server = serve(&lab);
    let mut frontend = Frontend::from_stream(lab.connect("d"), 0x8000);
    frontend.set_owner().unwrap();
    frontend.get_features().unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    let features = VERSION_1 | PROTOCOL;
    frontend.set_features(features).unwrap();
    let mut driver = Driver {
        frontend,
        memory: Memory::new(),
        features,
        vrings: Vec::new(),
    };
    driver.add_vring(128);
    is_told(
        &server,
        "vring 0 is set up and cannot be served, because the client has shared no memory",
    );
    // Memory that comes late is used.
    let region = driver.memory.region();
    driver.frontend.set_mem_table(&[region]).unwrap();
    assert_eq!(driver.write(0, &[7; 512]), OK);
    drop(driver);
    server.stop().unwrap();
}

#[test]
fn a_kick_of_a_ring_that_was_never_written_is_told_of() {
    let lab = sandbox();
    let server = serve(&lab);
    let driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL);
    // QEMU kicks once by itself, the driver for its first request.
    driver.vrings[0].kick.write(1).unwrap();
    driver.vrings[0].kick.write(1).unwrap();
    is_told(&server, "vring 0 was kicked and is empty");
    drop(driver);
    server.stop().unwrap();
}

#[test]
fn a_request_in_memory_that_is_not_shared_is_told_of_once() {
    let lab = sandbox();
    let server = serve(&lab);
    let mut driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL);
    assert_eq!(driver.read(0, 512).0, OK);
    for _ in 0..2 {
        driver.header(DATA, T_IN, 0);
        let chain = [
            (DATA, 16, 0),
            (0xf_0000_0000, 512, WRITE),
            (DATA + 16, 1, WRITE),
        ];
        driver.submit_on(0, 0, &chain);
        driver.vrings[0].wait(&driver.memory);
        assert_eq!(driver.memory.byte(DATA + 16), IOERR);
    }
    is_told(
        &server,
        "guest address 0xf00000000 is not in the memory that the client shared",
    );
    drop(driver);
    server.stop().unwrap();
}

#[test]
fn nothing_is_told_of_a_client_that_shares_its_memory() {
    let lab = sandbox();
    let server = serve(&lab);
    let mut driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL);
    // As QEMU does, before there is a request.
    driver.vrings[0].kick.write(1).unwrap();
    for _ in 0..3 {
        assert_eq!(driver.read(0, 512).0, OK);
        // A kick too many.
        driver.vrings[0].kick.write(1).unwrap();
    }
    drop(driver);
    let log = server.stop().unwrap();
    assert!(!log.contains("share=on"), "{log}");
}
