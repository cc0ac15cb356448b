//! The admin socket: a request from anybody who may connect, or the answer of anybody who listens there.
//!
//! What must hold: a request is answered with one line of JSON, and does what its words say or nothing; an answer is taken
//! for what it is, or refused.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use ublkup::engine::{SnapshotProgress, SnapshotStep};
use ublkup::export::admin::testing::{answer, resize, stat};
use ublkup::export::admin::{Command, ExportStatus, Request, Resized, Service};

/// Nothing here waits: all is sent before it is read.
const LIMIT: Duration = Duration::from_secs(10);

const STATUS: &str = r#"{"name": "disk", "state": "serving", "access": "free", "pid": 1, "backend": "mem:1M",
    "size_bytes": 1048576, "block_bytes": 512, "read_only": false, "write_cache": false, "serial": "disk",
    "poll_us": "100", "cpus": null, "ublk": null, "vhost": null}"#;

/// An export that notes what it was told.
#[derive(Default)]
struct Export(Mutex<Option<Command>>);

impl Export {
    fn note(&self, command: Command) {
        *self.0.lock().expect("no panic") = Some(command);
    }
}

impl Service for Export {
    fn name(&self) -> &str {
        "disk"
    }

    fn status(&self) -> ExportStatus {
        self.note(Command::Stat {});
        serde_json::from_str(STATUS).expect("a status")
    }

    fn resize(&self, size_bytes: Option<u64>, shrink: bool) -> anyhow::Result<Resized> {
        self.note(Command::Resize { size_bytes, shrink });
        anyhow::bail!("the size stays")
    }

    fn snapshot(&self, step: SnapshotStep) -> anyhow::Result<SnapshotProgress> {
        self.note(Command::Snapshot { step });
        anyhow::bail!("no snapshot")
    }

    fn stop(&self, force: bool, openers: Option<String>) -> anyhow::Result<()> {
        self.note(Command::Stop { force, openers });
        Ok(())
    }

    fn set(&self, options: BTreeMap<String, String>) -> anyhow::Result<()> {
        self.note(Command::Set { options });
        Ok(())
    }

    fn leave(&self) -> anyhow::Result<()> {
        self.note(Command::Leave {});
        Ok(())
    }
}

/// Runs one input: an answer if it begins with `<`, a request if not.
pub fn run(input: &[u8]) {
    let (mut peer, stream) = UnixStream::pair().expect("a connection");
    // An answer of a megabyte would be cut off; a socket holds less than that.
    let (bytes, is_answer) = match input {
        [b'<', answer @ ..] => (answer, true),
        request => (request, false),
    };
    let bytes = &bytes[..bytes.len().min(64 << 10)];
    peer.write_all(bytes).expect("it fits into the socket");
    peer.shutdown(Shutdown::Write).expect("shut down");
    match is_answer {
        true => ask(&stream, bytes),
        false => serve(&mut peer, stream, bytes),
    }
}

fn serve(peer: &mut UnixStream, stream: UnixStream, request: &[u8]) {
    let export = Export::default();
    let answered = answer(stream, &export);
    let mut said = String::new();
    // A request that was not read to its end resets the connection.
    let read = peer.read_to_string(&mut said);
    // What is longer than a request may be is cut off.
    let request = &request[..request.len().min(4096)];
    let line = request.split_inclusive(|&byte| byte == b'\n').next();
    let line = line.and_then(|line| std::str::from_utf8(line).ok());
    let request = line.and_then(|line| Request::parse(line).ok());
    let is_for_us = |asked: &Request| asked.export.as_deref().is_none_or(|name| name == "disk");
    let request = request.filter(is_for_us).map(|asked| asked.command);
    let is_noted = |command: &Command| !matches!(command, Command::Server {} | Command::Events {});
    let command = request.clone().filter(is_noted);
    let done = export.0.lock().expect("no panic").take();
    assert_eq!(done, command, "done, and asked for");
    if answered.is_err() {
        assert_eq!(command, None);
        return;
    }
    if read.is_err() {
        return;
    }
    assert!(said.ends_with('\n') && said.lines().count() == 1, "{said}");
    let said: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let refused = said.get("error").is_some();
    let refuses = matches!(
        request,
        None | Some(Command::Resize { .. } | Command::Server {})
    );
    assert_eq!(refused, refuses, "{request:?}: {said}");
}

fn ask(stream: &UnixStream, answer: &[u8]) {
    let line = answer.split_inclusive(|&byte| byte == b'\n').next();
    let line = line.unwrap_or_default();
    let is_refusal = serde_json::from_slice::<serde_json::Value>(line).is_ok_and(|answer| {
        answer
            .get("error")
            .is_some_and(serde_json::Value::is_string)
    });
    // Which of the two is asked does not matter to who answers.
    let answered = match answer.len() % 2 {
        0 => stat(stream, LIMIT).map(|status| serde_json::to_value(status).expect("JSON")),
        _ => resize(stream, LIMIT).map(|resized| serde_json::to_value(resized).expect("JSON")),
    };
    if let Ok(taken) = answered {
        assert!(!is_refusal, "a refusal was taken for an answer");
        let said: serde_json::Value = serde_json::from_slice(line).expect("JSON");
        assert_eq!(taken["size_bytes"], said["size_bytes"]);
    }
}
