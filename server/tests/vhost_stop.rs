//! Exports of one server that are stopped while others are.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::process::{Command, Stdio};

use common::*;

/// A request that the storage does not finish holds up the end of its own export only.
#[test]
fn an_export_that_cannot_end_yet_keeps_no_other_from_it() {
    let lab = sandbox();
    let image = lab.image("disk.img", 1 << 20);
    let stuck = format!("stuck=fault:write=stall;file:{}", image.display());
    let server = lab.serve(&["--ublk", "no", &stuck, "fine=mem:1M", "last=mem:1M"]);
    let mut driver = Driver::running(lab.connect("stuck"), USUAL);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
    let is_stopping = || {
        let stat = lab.ok(&["stat", "stuck", "--json"]);
        let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
        stat["state"] == "stopping"
    };
    let mut stuck = Command::new(env!("CARGO_BIN_EXE_ublkup"))
        .args(["stop", "--force", "stuck"])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("it is being stopped", is_stopping);
    lab.ok(&["stop", "fine"]);
    lab.fails(&["stat", "fine"], 1, &["fine"]);
    assert!(is_stopping(), "the stuck one has ended");
    assert_eq!(stuck.try_wait().unwrap(), None);
    // The others are served meanwhile.
    lab.ok(&["stat", "last"]);
    server.kill().unwrap();
    assert!(!stuck.wait().unwrap().success());
}
