//! Exports of a server of the program, and what tests ask of them.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{CONFIG_WCE, Driver, FLUSH, OK, Sandbox, USUAL};

/// What disks with and without a write cache have.
pub const WRITE_THROUGH: u64 = USUAL & !(FLUSH | CONFIG_WCE);

pub fn stat(lab: &Sandbox, export: &str) -> Value {
    serde_json::from_str(&lab.ok(&["stat", export, "--json"])).unwrap()
}

/// Writes and reads through the vhost-user door.
pub fn exercise(lab: &Sandbox, export: &str) {
    let mut driver = Driver::running(lab.connect(export), WRITE_THROUGH);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
}

/// All that is in a folder.
pub fn tree(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
        }
        found.insert(path);
    }
    found
}

/// What a socket answers to a request.
pub fn ask(socket: &Path, request: &Value) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
