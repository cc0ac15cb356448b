//! What a server in its sandbox can still do, tried by its own queue thread.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{Driver, OK, Sandbox, USUAL};
use testkit::sandbox::start;
use testkit::seccomp::filter;
use ublkup::engine::sandbox::{self, Status};
use ublkup::storage::ESCAPE_VARIABLE;

/// What is tried, each by what.
const ATTEMPTS: [&str; 20] = [
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

fn status(lab: &Sandbox, export: &str) -> Status {
    let stat = lab.ok(&["stat", export, "--json"]);
    let mut stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
    serde_json::from_value(stat["sandbox"].take()).unwrap()
}

/// Has a queue thread try everything: how each attempt ended, how the server is confined, and whether `target` has
/// gone.
fn escape(args: &[&str]) -> (BTreeMap<String, String>, Status, bool) {
    let lab = common::sandbox();
    let outside = tempfile::tempdir().unwrap();
    let path = |name| outside.path().join(name);
    for file in ["secret", "target"] {
        std::fs::write(path(file), "x").unwrap();
    }
    let _listener = UnixListener::bind(path("listener")).unwrap();
    let image = lab.image("image", 1 << 20);
    let spec = format!("d=fault:write=escape*1;file:{}", image.display());
    let folder = outside.path().display().to_string();
    let args = [args, &["--ublk", "no", &spec]].concat();
    let server = lab.serve_with(&args, &[(ESCAPE_VARIABLE, &folder)]);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
    drop(driver);
    let status = status(&lab, "d");
    let log = server.stop().unwrap();
    lab.is_clean();
    let told = log.lines().filter_map(|line| line.split_once("escape by "));
    let ends = told.filter_map(|(_, text)| {
        let (attempt, end) = text.split_once(" -> ")?;
        Some((attempt.to_owned(), end.split(' ').next()?.to_owned()))
    });
    let ends = ends.collect();
    (ends, status, !path("target").exists())
}

#[test]
fn a_server_in_its_sandbox_reaches_nothing_outside() {
    let (ends, status, target_has_gone) = escape(&[]);
    assert!(status.on, "{status}");
    assert!(!target_has_gone);
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

#[test]
fn without_the_sandbox_all_of_it_is_possible() {
    let (ends, status, target_has_gone) = escape(&["--sandbox=no"]);
    assert_eq!(status, Status::default());
    assert!(target_has_gone);
    for attempt in ATTEMPTS {
        assert_eq!(
            ends.get(attempt).map(String::as_str),
            Some("possible"),
            "{attempt}: {ends:?}"
        );
    }
}

#[test]
fn what_a_kernel_or_a_container_does_not_let_a_server_give_up_is_told() {
    let lab = common::sandbox();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ublkup"));
    let spec = format!("d=file:{}", lab.image("image", 1 << 20).display());
    command
        .args(["serve", "--ublk", "no", &spec])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"));
    let forbidden = [libc::SYS_landlock_create_ruleset, libc::SYS_seccomp];
    let forbidden = forbidden.map(|call| u32::try_from(call).unwrap());
    let [errno, allow] = [libc::SECCOMP_RET_ERRNO | 1, libc::SECCOMP_RET_ALLOW];
    // SAFETY: the filter is made of system calls, and nothing is allocated.
    unsafe { command.pre_exec(move || filter(forbidden, errno, allow)) };
    let server = start(command);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    drop(driver);
    let status = status(&lab, "d");
    assert!(status.on);
    for lack in ["files stay open", "all system calls"] {
        let told = status.missing.iter().any(|what| what.contains(lack));
        assert!(told, "{lack}: {status}");
    }
    server.stop().unwrap();
    lab.is_clean();
}

/// Set for the copy of this program that enters a sandbox.
const INNER: &str = "SANDBOX_TEST_INNER";

#[test]
fn threads_that_block_all_signals_are_confined_as_well() {
    if std::env::var_os(INNER).is_none() {
        let name = std::thread::current().name().unwrap().to_owned();
        let mut inner = Command::new(std::env::current_exe().unwrap());
        inner
            .args(["--exact", &name, "--nocapture"])
            .env(INNER, "1");
        let output = inner.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let (ready, is_ready) = std::sync::mpsc::channel();
    let (go, goes) = std::sync::mpsc::channel::<()>();
    let deaf = std::thread::spawn(move || {
        // SAFETY: both functions fill in and read a set of signals.
        unsafe {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        }
        ready.send(()).unwrap();
        goes.recv().unwrap();
        std::fs::File::open("/etc/passwd").map(drop)
    });
    is_ready.recv().unwrap();
    let status = sandbox::enter(&sandbox::Reach::default());
    let told = status.missing.iter().any(|lack| lack.contains("threads"));
    assert!(status.on && !told, "{status:?}");
    go.send(()).unwrap();
    let opened = deaf.join().unwrap();
    let errno = opened.unwrap_err().raw_os_error();
    assert_eq!(errno, Some(libc::EACCES));
}
