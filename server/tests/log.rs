//! A log that cannot be written, or that is not read, changes nothing for clients.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/logs.rs"]
mod logs;
#[path = "common/recorded.rs"]
mod recorded;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use common::*;
use logs::BAD_LOGS;
use recorded::Client;
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
    let full = logs::full;
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
            // A client that does not wait for its answer is worth a line.
            drop(UnixStream::connect(lab.path("run/exports/d/control")).unwrap());
        }
        lost()
    });
    is_as_ever(&lab, server);
    let mut lines = String::new();
    reader.read_to_string(&mut lines).unwrap();
    assert!(!lines.is_empty());
}

/// A client writes, and reads what it wrote before.
fn writes(client: &mut Client, round: u8) {
    let driver = &mut client.driver;
    if round > 0 {
        assert_eq!(driver.read(0, 512), (OK, vec![round - 1; 512]));
    }
    assert_eq!(driver.write(0, &[round; 512]), OK);
}

#[test]
fn servers_whose_log_cannot_be_written_take_over_and_recover() {
    for (kind, log) in BAD_LOGS {
        println!("a log: {kind}");
        let lab = sandbox();
        let spec = format!("d=file:{}", lab.image("disk.img", 1 << 20).display());
        let serve = ["serve", "--ublk", "no", "--reconnect-grace", "3600", &spec];
        let (errors, _reader) = log();
        let first = logs::serve(&lab, &serve, errors);
        let mut client = Client::connect(lab.connect("d"), USUAL);
        assert!(client.start());
        writes(&mut client, 0);
        let (errors, _reader) = log();
        let take_over = [&serve[..], &["--take-over"]].concat();
        let second = logs::serve(&lab, &take_over, errors);
        assert_eq!(logs::ended(first), Some(0));
        let mut client = client.reconnect(|| lab.connect("d"));
        assert!(client.start(), "after a take-over");
        writes(&mut client, 1);
        assert_eq!(logs::end_by(second, Signal::KILL), None);
        let (errors, _reader) = log();
        let third = logs::serve(&lab, &["recover", "d"], errors);
        let mut client = client.reconnect(|| lab.connect("d"));
        assert!(client.start(), "after a recovery");
        writes(&mut client, 2);
        drop(client);
        assert_eq!(logs::end_by(third, Signal::TERM), Some(0));
        lab.is_clean();
    }
}

/// Standard error of a server in a file, after `body`, and after the server has ended.
fn logged(env: impl Fn(&File) -> Vec<(&'static str, String)>, body: impl Fn(&Sandbox)) -> String {
    let lab = sandbox();
    let path = lab.path("log");
    let file = File::create(&path).unwrap();
    let env = env(&file);
    let mut server = Command::new(env!("CARGO_BIN_EXE_ublkup"))
        .args(["serve", "--ublk", "no", "d=mem:1M"])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
        .envs(env)
        .stdout(Stdio::piped())
        .stderr(file)
        .spawn()
        .unwrap();
    let lines = BufReader::new(server.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "ready"));
    body(&lab);
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert_eq!(server.wait().unwrap().code(), Some(0));
    std::fs::read_to_string(path).unwrap()
}

/// A client with a message of no meaning, seen off.
fn garbage(lab: &Sandbox) {
    let mut stream = lab.connect("d");
    stream.write_all(&[0; 12]).unwrap();
    assert_eq!(stream.read(&mut [0; 12]).unwrap(), 0);
}

#[test]
fn clients_cannot_fill_the_log() {
    const CLIENTS: usize = 3000;
    let begun = std::time::Instant::now();
    let log = logged(
        |_| Vec::new(),
        |lab| (0..CLIENTS).for_each(|_| garbage(lab)),
    );
    let intervals = 2 + begun.elapsed().as_secs() / 10;
    let lines = log.lines().count() as u64;
    assert!(lines <= 12 * intervals + 4, "{lines} lines:\n{log}");
    assert!(log.contains("session ended: a message with the unknown number 0"));
}

#[test]
fn in_the_journal_each_line_has_its_priority_and_no_time() {
    let stream = |file: &File, more: u64| {
        let stat = file.metadata().unwrap();
        let name = format!("{}:{}", stat.dev(), stat.ino() + more);
        vec![("JOURNAL_STREAM", name)]
    };
    let log = logged(|file| stream(file, 0), garbage);
    let has = |begins: &str, what: &str| {
        log.lines()
            .any(|line| line.starts_with(begins) && line.contains(what))
    };
    assert!(log.lines().all(|line| line.starts_with('<')), "{log}");
    assert!(has("<6>client connected", ""), "{log}");
    assert!(has("<4>session ended", ""), "{log}");
    // Standard error is another file than the one that is the journal's.
    let log = logged(|file| stream(file, 1), garbage);
    assert!(!log.contains("<4>"), "{log}");
    assert!(log.contains(" WARN session ended"), "{log}");
}

#[test]
fn the_log_can_be_objects() {
    let log = logged(|_| vec![("UBLKUP_LOG_FORMAT", "json".into())], garbage);
    let objects: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let warning = objects
        .iter()
        .find(|object| object["level"] == "WARN")
        .unwrap();
    assert_eq!(
        (&warning["export"], &warning["session"]),
        (&"d".into(), &1.into())
    );
    let message = warning["message"].as_str().unwrap();
    assert!(message.starts_with("session ended: "), "{message}");
    assert!(warning["timestamp"].is_string());
}
