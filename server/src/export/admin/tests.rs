//! An admin socket from both sides.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use anyhow::{Context, Result};

use super::*;
use crate::door::ownership::OwnershipState;
use crate::engine::socket::SocketAccess;
use crate::engine::{SnapshotProgress, SnapshotStep};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[derive(Default)]
struct Fake(AtomicBool);

/// A server whose `stop` takes as long as the test wants.
#[derive(Default)]
struct Slow(Fake, Mutex<()>, AtomicUsize);

impl Service for Slow {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn status(&self) -> ExportStatus {
        self.0.status()
    }
    fn resize(&self, size_bytes: Option<u64>, shrink: bool) -> Result<Resized> {
        self.0.resize(size_bytes, shrink)
    }

    fn snapshot(&self, step: SnapshotStep) -> Result<SnapshotProgress> {
        self.0.snapshot(step)
    }
    fn stop(&self, _: bool, _: Option<String>) -> Result<()> {
        self.2.fetch_add(1, Ordering::SeqCst);
        drop(self.1.lock());
        Ok(())
    }
    fn set(&self, options: BTreeMap<String, String>) -> Result<()> {
        self.0.set(options)
    }
    fn leave(&self) -> Result<()> {
        self.0.leave()
    }
}

impl Service for Fake {
    fn name(&self) -> &str {
        "a"
    }
    fn status(&self) -> ExportStatus {
        ExportStatus {
            schema: SCHEMA,
            version: "1".into(),
            server: "s".into(),
            started_unix_seconds: 7,
            name: "a".into(),
            state: "serving".into(),
            access: OwnershipState::Free,
            kept_for: None,
            pid: 1,
            backend: "mem:1M".into(),
            size_bytes: 1 << 20,
            block_bytes: 512,
            read_only: false,
            write_cache: false,
            serial: "a".into(),
            poll_us: "100".into(),
            limits: None,
            sandbox: crate::engine::sandbox::Status::default(),
            last_error: None,
            lost_log_lines: 0,
            cpus: Some("2,3".into()),
            ublk: None,
            vhost: None,
        }
    }
    fn resize(&self, size_bytes: Option<u64>, _: bool) -> Result<Resized> {
        let size_bytes = size_bytes.context("no size")?;
        Ok(Resized {
            size_bytes,
            old_size_bytes: 1 << 20,
            untold_clients: 0,
        })
    }
    fn snapshot(&self, step: SnapshotStep) -> Result<SnapshotProgress> {
        anyhow::ensure!(step == SnapshotStep::Merge, "no");
        Ok(SnapshotProgress::default())
    }
    fn stop(&self, force: bool, _: Option<String>) -> Result<()> {
        anyhow::ensure!(force, "in use");
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn set(&self, options: BTreeMap<String, String>) -> Result<()> {
        anyhow::ensure!(options.contains_key("depth"), "unknown");
        Ok(())
    }
    fn leave(&self) -> Result<()> {
        anyhow::ensure!(self.0.load(Ordering::SeqCst), "not yet");
        Ok(())
    }
}

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn commands_are_answered_and_nonsense_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("control");
    let fake = Arc::new(Fake::default());
    let listening = serve("a", &path, &SocketAccess::default(), Arc::clone(&fake)).unwrap();
    assert_eq!(stat(&path, LIMIT).unwrap(), fake.status());
    assert_eq!(resize(&path, Some(7), false, LIMIT).unwrap().size_bytes, 7);
    let refused = resize(&path, None, false, LIMIT).unwrap_err();
    assert_eq!(refused.to_string(), "no size");
    let one = |key: &str| BTreeMap::from([(key.to_owned(), "1".to_owned())]);
    set(&path, one("depth"), LIMIT).unwrap();
    let refused = set(&path, one("x"), LIMIT).unwrap_err();
    assert_eq!(refused.to_string(), "unknown");
    snapshot(&path, SnapshotStep::Merge, LIMIT).unwrap();
    assert!(snapshot(&path, SnapshotStep::Begin, LIMIT).is_err());
    assert_eq!(leave(&path, LIMIT).unwrap_err().to_string(), "not yet");
    assert_eq!(
        stop(&path, false, LIMIT, || {}).unwrap_err().to_string(),
        "in use"
    );
    stop(&path, true, LIMIT, || {}).unwrap();
    leave(&path, LIMIT).unwrap();
    assert!(fake.0.load(Ordering::SeqCst));
    for nonsense in ["\n", "{}\n", "{\"command\":\"format\"}\n", "\u{0}\n"] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(nonsense.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("not a command"), "{nonsense}: {answer}");
    }
    // A flood without a line's end is cut off, not collected.
    let mut stream = UnixStream::connect(&path).unwrap();
    let _ = stream.write_all(&vec![b'x'; 1 << 20]);
    drop(listening);
}

#[test]
fn nobody_listens_after_the_handle_is_dropped() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("control");
    drop(
        serve(
            "a",
            &path,
            &SocketAccess::default(),
            Arc::new(Fake::default()),
        )
        .unwrap(),
    );
    assert!(stat(&path, LIMIT).is_err());
}

#[test]
fn silent_clients_keep_no_other_from_its_answer_and_the_oldest_goes() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("control");
    let fake = Arc::new(Fake::default());
    let listening = serve("a", &path, &SocketAccess::default(), Arc::clone(&fake)).unwrap();
    let mut silent: Vec<_> = (0..16)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    assert_eq!(stat(&path, LIMIT).unwrap(), fake.status());
    let mut end = [0];
    assert_eq!(
        silent[0].read(&mut end).unwrap(),
        0,
        "the oldest was hung up on"
    );
    // The others can still ask.
    silent[15].write_all(b"{\"command\":\"stat\"}\n").unwrap();
    let mut answer = String::new();
    silent[15].read_to_string(&mut answer).unwrap();
    assert!(answer.contains("serving"), "{answer}");
    drop(silent);
    drop(listening);
}

#[test]
fn a_server_whose_clients_all_wait_for_answers_says_that_it_is_busy() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("control");
    let slow = Arc::new(Slow::default());
    let listening = serve("a", &path, &SocketAccess::default(), Arc::clone(&slow)).unwrap();
    let turn = slow.1.lock().unwrap();
    std::thread::scope(|scope| {
        let waiting = [(); 16].map(|()| scope.spawn(|| stop(&path, true, 6 * LIMIT, || {})));
        while slow.2.load(Ordering::SeqCst) < waiting.len() {
            std::thread::yield_now();
        }
        let busy = stat(&path, LIMIT).unwrap_err().to_string();
        drop(turn);
        for stopped in waiting {
            stopped.join().unwrap().unwrap();
        }
        assert!(busy.starts_with("busy: 16 commands"), "{busy}");
    });
    assert!(stat(&path, LIMIT).is_ok());
    drop(listening);
}

#[test]
fn a_socket_that_no_server_accepts_from_or_that_never_ends_its_answer_is_left_in_time() {
    let temp = tempfile::tempdir().unwrap();
    let (full, slow) = (temp.path().join("full"), temp.path().join("slow"));
    let limit = Duration::from_millis(300);
    let _planted = UnixListener::bind(&full).unwrap();
    let mut waiting = Vec::new();
    // Until the backlog is full, whatever this system makes of it.
    while let Ok(client) = upgrade_proto::connect_within(&full, Duration::from_millis(1)) {
        waiting.push(client);
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(stat(&full, limit).map(drop)));
    let answer = receiver.recv_timeout(6 * LIMIT);
    let error = answer.expect("an end").unwrap_err().to_string();
    assert_eq!(error, "no answer within 0.3 s");
    let planted = UnixListener::bind(&slow).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut client, _) = planted.accept().unwrap();
            // Ends when the client has gone, or after some seconds.
            (0..400).all(|_| {
                std::thread::sleep(Duration::from_millis(20));
                client.write_all(b"x").is_ok()
            });
        });
        let error = stat(&slow, limit).unwrap_err().to_string();
        assert_eq!(error, "no answer within 0.3 s");
    });
}
