//! A log that cannot be written, or that is not read, changes nothing for clients.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use common::*;
use rustix::process::{Pid, Signal, kill_process};

/// A server with this standard error, when it is ready.
fn serve(lab: &Sandbox, errors: impl Into<Stdio>, level: &str) -> Child {
    let mut server = Command::new(env!("CARGO_BIN_EXE_ublkup"))
        .args(["--log", level, "serve", "--ublk", "no", "d=mem:1M"])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .unwrap();
    let lines = BufReader::new(server.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "ready"));
    server
}

/// A client writes and reads; then the server is told to end, and does.
fn is_as_ever(lab: &Sandbox, mut server: Child) {
    let mut driver = Driver::running(lab.connect("d"), VERSION_1 | PROTOCOL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
    drop(driver);
    let stat: serde_json::Value = serde_json::from_str(&lab.ok(&["stat", "d", "--json"])).unwrap();
    assert!(stat["lost_log_lines"].as_u64().unwrap() > 0, "{stat}");
    assert!(lab.ok(&["stat", "d"]).contains("could not be written"));
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert_eq!(server.wait().unwrap().code(), Some(0));
    lab.is_clean();
}

#[test]
fn a_log_on_a_full_file_system_changes_nothing() {
    let lab = sandbox();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let server = serve(&lab, full(), "debug");
    is_as_ever(&lab, server);
    // Nor does it change how other commands end.
    let ends = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ublkup"));
        let command = command
            .args(args)
            .env("UBLKUP_RUNTIME_DIR", lab.path("run"));
        command.stderr(full()).status().unwrap().code()
    };
    assert_eq!(ends(&["list"]), Some(0));
    assert_eq!(ends(&["stat", "d"]), Some(1));
    assert_eq!(ends(&["serve", "mem:1M,nonsense"]), Some(2));
}

#[test]
fn a_log_whose_reader_has_died_changes_nothing() {
    let lab = sandbox();
    let (reader, writer) = std::io::pipe().unwrap();
    let server = serve(&lab, OwnedFd::from(writer), "debug");
    drop(reader);
    is_as_ever(&lab, server);
}

#[test]
fn a_log_that_is_not_read_holds_up_no_thread() {
    let lab = sandbox();
    let (mut reader, writer) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    // More lines than fit into the pipe and wait for it.
    let server = serve(&lab, OwnedFd::from(writer), "trace");
    let lost = || {
        let stat = lab.ok(&["stat", "d", "--json"]);
        let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
        stat["lost_log_lines"].as_u64() > Some(0)
    };
    eventually("lines are lost", || {
        for _ in 0..200 {
            // A message of no meaning, which is worth a line.
            lab.connect("d").write_all(&[0; 12]).unwrap();
        }
        lost()
    });
    is_as_ever(&lab, server);
    let mut lines = String::new();
    reader.read_to_string(&mut lines).unwrap();
    assert!(!lines.is_empty());
}
