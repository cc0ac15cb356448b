//! Servers that do not end: with a request stuck in the storage, or not answering at all.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use common::*;
use rustix::process::{Pid, Signal, kill_process};
use testkit::server::Server;

fn signal(server: &Server, signal: Signal) {
    let pid = Pid::from_raw(server.pid().cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn a_server_with_a_stuck_request_says_what_it_waits_for_and_a_second_signal_ends_it() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "--queues", "1", "d=fault:read=stall;mem:1M"]);
    let mut driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL | EVENT_IDX);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    driver.vrings[0].wait_taken(&driver.memory);
    signal(&server, Signal::TERM);
    eventually("it says what it waits for", || {
        server
            .log()
            .contains("d: still waiting for the requests of its vhost-user clients")
    });
    // Not an end that anybody insists on.
    signal(&server, Signal::HUP);
    signal(&server, Signal::INT);
    let (status, log) = server.wait().unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("a second signal: ending at once"), "{log}");
    assert!(!log.contains("d: stopped"), "{log}");
}

#[test]
fn a_server_that_does_not_answer_is_not_waited_for_long() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "d=mem:1M"]);
    testkit::proc::stop(server.pid()).unwrap();
    let pid = format!("process {},", server.pid());
    let words = [
        &pid,
        "does not answer: end it with SIGTERM",
        "no answer within 5 s",
    ];
    lab.fails(&["stop", "d"], 1, &words);
    lab.fails(&["stop", "--force", "d"], 1, &words);
    signal(&server, Signal::CONT);
    server.stop().unwrap();
}

#[test]
fn a_stop_that_waits_for_the_storage_says_so() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "--queues", "1", "d=fault:read=stall;mem:1M"]);
    let mut driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL | EVENT_IDX);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    driver.vrings[0].wait_taken(&driver.memory);
    let mut stop = Command::new(env!("CARGO_BIN_EXE_ublkup"))
        .args(["stop", "--force", "d"])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut said = BufReader::new(stop.stderr.take().unwrap());
    said.read_line(&mut line).unwrap();
    assert!(line.contains("d still waits for requests"), "{line}");
    signal(&server, Signal::TERM);
    eventually("the signal has arrived", || {
        server.log().contains("draining")
    });
    signal(&server, Signal::TERM);
    assert_eq!(stop.wait().unwrap().code(), Some(1));
    assert_eq!(server.exit_code().unwrap(), Some(1));
}
