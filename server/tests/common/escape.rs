//! What is outside of a server's sandbox, and what became of the server's attempts to reach it (`storage/escape.rs`).

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;

use ublkup::engine::sandbox::Status;

/// What is tried, each by what.
pub const ATTEMPTS: [&str; 20] = [
    "call: open",
    "call: create",
    "call: chmod",
    "call: connect",
    "call: udp",
    "call: exec",
    "call: ptrace",
    "call: memory",
    "call: descriptor",
    "call: signal",
    "call: unshare",
    "call: setns",
    "call: keys",
    "call: environment",
    "another ring: openat",
    "another ring: connect",
    "ring: openat",
    "ring: socket",
    "ring: connect",
    "ring: unlinkat",
];

/// A folder with a file to read, one to remove and a socket to connect to.
pub struct Outside {
    folder: tempfile::TempDir,
    _listener: UnixListener,
}

impl Outside {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for file in ["secret", "target"] {
            std::fs::write(folder.path().join(file), "x").unwrap();
        }
        let listener = UnixListener::bind(folder.path().join("listener")).unwrap();
        Self {
            folder,
            _listener: listener,
        }
    }

    /// Where it is, for the server's environment.
    pub fn path(&self) -> String {
        self.folder.path().display().to_string()
    }

    pub fn target_has_gone(&self) -> bool {
        !self.folder.path().join("target").exists()
    }
}

/// How each attempt ended, as the server's log tells.
pub fn ends(log: &str) -> BTreeMap<String, String> {
    let told = log.lines().filter_map(|line| line.split_once("escape by "));
    let ends = told.filter_map(|(_, text)| {
        let (attempt, end) = text.split_once(" -> ")?;
        Some((attempt.to_owned(), end.split(' ').next()?.to_owned()))
    });
    ends.collect()
}

/// Asserts that nothing was reached by a server that is confined like this, but for attempts that end as they like.
pub fn all_are_refused(ends: &BTreeMap<String, String>, status: &Status, but: &[&str]) {
    assert!(status.on, "{status}");
    // A kernel before 7.0 cannot restrict rings that the server has not made, and says so.
    let other_rings = status.missing.iter().any(|what| what.contains("rings"));
    // Those depend on the kernel.
    let datagrams = status
        .missing
        .iter()
        .filter(|what| what.contains("datagrams"));
    let known = usize::from(other_rings) + datagrams.count();
    assert_eq!(status.missing.len(), known, "{status}");
    for attempt in ATTEMPTS {
        if but.contains(&attempt) && ends.contains_key(attempt) {
            continue;
        }
        let expected = match attempt == "another ring: connect" && other_rings {
            true => "possible",
            false => "refused",
        };
        assert_eq!(
            ends.get(attempt).map(String::as_str),
            Some(expected),
            "{attempt}: {ends:?}"
        );
    }
}
