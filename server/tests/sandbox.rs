//! What a server in its sandbox can still do, tried by its own queue thread.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/escape.rs"]
mod escape;

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{Driver, OK, Sandbox, USUAL};
use escape::{ATTEMPTS, Outside, all_are_refused};
use testkit::sandbox::start;
use testkit::seccomp::filter;
use ublkup::engine::sandbox::{self, Status};
use ublkup::storage::ESCAPE_VARIABLE;

fn status(lab: &Sandbox, export: &str) -> Status {
    let stat = lab.ok(&["stat", export, "--json"]);
    let mut stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
    serde_json::from_value(stat["sandbox"].take()).unwrap()
}

/// What the log of a server said.
struct Tried {
    ends: BTreeMap<String, String>,
    status: Status,
    target_has_gone: bool,
    log: String,
    /// What `doctor` says of the sandbox here.
    doctor: String,
}

/// The line of `doctor` about the sandbox.
fn of_doctor(found: &str) -> String {
    let mut lines = found.lines();
    lines
        .find(|line| line.contains(" sandbox: "))
        .unwrap()
        .to_owned()
}

/// Has a queue thread try everything.
fn escape(args: &[&str]) -> Tried {
    let lab = common::sandbox();
    let outside = Outside::new();
    let image = lab.image("image", 1 << 20);
    let spec = format!("d=fault:write=escape*1;file:{}", image.display());
    let args = [args, &["--ublk", "no", &spec]].concat();
    let server = lab.serve_with(&args, &[(ESCAPE_VARIABLE, &outside.path())]);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
    drop(driver);
    let status = status(&lab, "d");
    let doctor = of_doctor(&lab.finish(&["doctor"], &[]).stdout);
    let log = server.stop().unwrap();
    lab.is_clean();
    Tried {
        ends: escape::ends(&log),
        status,
        target_has_gone: outside.target_has_gone(),
        log,
        doctor,
    }
}

#[test]
fn a_server_in_its_sandbox_reaches_nothing_outside() {
    let tried = escape(&[]);
    all_are_refused(&tried.ends, &tried.status, &[]);
    assert!(!tried.target_has_gone);
    // All say the same of it.
    let said = format!("sandbox: {}", tried.status);
    assert!(tried.log.contains(&said), "{said}: {}", tried.log);
    assert!(tried.doctor.ends_with(&said), "{said}: {}", tried.doctor);
}

#[test]
fn without_the_sandbox_all_of_it_is_possible() {
    let tried = escape(&["--sandbox=no"]);
    assert_eq!(tried.status, Status::default());
    assert!(tried.target_has_gone);
    assert!(!tried.log.contains("sandbox: on"), "{}", tried.log);
    for attempt in ATTEMPTS {
        assert_eq!(
            tried.ends.get(attempt).map(String::as_str),
            Some("possible"),
            "{attempt}: {:?}",
            tried.ends
        );
    }
}

#[test]
fn what_a_kernel_or_a_container_does_not_let_a_server_give_up_is_told() {
    let lab = common::sandbox();
    let forbidden = [libc::SYS_landlock_create_ruleset, libc::SYS_seccomp];
    let forbidden = forbidden.map(|call| u32::try_from(call).unwrap());
    let [errno, allow] = [libc::SECCOMP_RET_ERRNO | 1, libc::SECCOMP_RET_ALLOW];
    let confined = |args: &[&str]| {
        let mut command = lab.command(args);
        // SAFETY: the filter is made of system calls, and nothing is allocated.
        unsafe { command.pre_exec(move || filter(forbidden, errno, allow)) };
        command
    };
    let spec = format!("d=file:{}", lab.image("image", 1 << 20).display());
    let server = start(confined(&["serve", "--ublk", "no", &spec]));
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    drop(driver);
    let status = status(&lab, "d");
    assert!(status.on);
    for lack in ["files stay open", "all system calls"] {
        let told = status.missing.iter().any(|what| what.contains(lack));
        assert!(told, "{lack}: {status}");
    }
    let said = format!("sandbox: {status}");
    let found = confined(&["doctor"]).output().unwrap().stdout;
    let doctor = of_doctor(&String::from_utf8(found).unwrap());
    assert!(
        doctor.starts_with("warning") && doctor.ends_with(&said),
        "{said}: {doctor}"
    );
    let log = server.stop().unwrap();
    assert!(log.contains(&said), "{said}: {log}");
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
