//! An admin socket from both sides.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};

use super::*;
use crate::door::ownership::OwnershipState;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Default)]
struct Fake(AtomicBool);

impl Service for Fake {
    fn status(&self) -> ExportStatus {
        ExportStatus {
            name: "a".into(),
            state: "serving".into(),
            access: OwnershipState::Free,
            pid: 1,
            backend: "mem:1M".into(),
            size_bytes: 1 << 20,
            block_bytes: 512,
            read_only: false,
            write_cache: false,
            serial: "a".into(),
            poll_us: "100".into(),
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
    fn stop(&self, force: bool) -> Result<()> {
        anyhow::ensure!(force, "in use");
        self.0.store(true, Ordering::SeqCst);
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
    let listening = serve("a", &path, Arc::clone(&fake)).unwrap();
    assert_eq!(stat(&path, LIMIT).unwrap(), fake.status());
    assert_eq!(resize(&path, Some(7), false, LIMIT).unwrap().size_bytes, 7);
    let refused = resize(&path, None, false, LIMIT).unwrap_err();
    assert_eq!(refused.to_string(), "no size");
    assert_eq!(leave(&path, LIMIT).unwrap_err().to_string(), "not yet");
    assert_eq!(stop(&path, false, LIMIT).unwrap_err().to_string(), "in use");
    stop(&path, true, LIMIT).unwrap();
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
    drop(serve("a", &path, Arc::new(Fake::default())).unwrap());
    assert!(stat(&path, LIMIT).is_err());
}
