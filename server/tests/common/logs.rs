//! Logs that cannot be written, and servers that have one.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, PipeReader, PipeWriter, Write, pipe};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;
use testkit::process;

use crate::common::{LIMIT, Sandbox};

/// A standard error, and what keeps it as it is.
pub type BadLog = (Stdio, Option<PipeReader>);

/// Makes one.
type Make = fn() -> BadLog;

/// All kinds: a full file system, a pipe whose reader has died, a full pipe that is not read.
pub const BAD_LOGS: [(&str, Make); 3] = [
    ("full", || (full().into(), None)),
    ("reader has died", || (pipe().unwrap().1.into(), None)),
    ("not read", || {
        let (reader, writer) = pipe().unwrap();
        fill(&writer);
        (OwnedFd::from(writer).into(), Some(reader))
    }),
];

/// A file on which there is no space.
pub fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

fn fill(mut writer: &PipeWriter) {
    rustix::pipe::fcntl_setpipe_size(writer, 4096).unwrap();
    fcntl_setfl(writer, OFlags::NONBLOCK).unwrap();
    loop {
        match writer.write(&[b'.'; 512]) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    fcntl_setfl(writer, OFlags::empty()).unwrap();
}

/// Starts a server that logs all it does to `errors`, and waits until it is ready.
pub fn serve(lab: &Sandbox, args: &[&str], errors: impl Into<Stdio>) -> Child {
    let mut command = lab.command(&[&["--log", "debug"], args].concat());
    command.stdout(Stdio::piped()).stderr(errors);
    process::bind(&mut command);
    let mut server = process::spawn(&mut command).unwrap();
    let lines = BufReader::new(server.stdout.take().unwrap()).lines();
    assert!(
        lines.map_while(Result::ok).any(|line| line == "ready"),
        "{args:?}: it ended"
    );
    server
}

/// The exit code of a server that ends; none if it was killed.
pub fn ended(mut server: Child) -> Option<i32> {
    let status = process::wait_limited(&mut server, LIMIT).unwrap();
    status.expect("the server ends").code()
}

/// Sends a signal to a server, and waits for its end.
pub fn end_by(server: Child, signal: Signal) -> Option<i32> {
    process::signal(&server, signal).unwrap();
    ended(server)
}
