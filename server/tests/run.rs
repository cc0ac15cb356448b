//! `serve IMAGE` and `serve --run`, for those who want a disk for a moment.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use common::{eventually, sandbox};
use serde_json::Value;

#[test]
fn the_path_of_a_file_is_served_as_a_file() {
    let lab = sandbox();
    let image = lab.image("disk.img", 1 << 20).display().to_string();
    let other = lab.image("other.img", 1 << 20).display().to_string();
    let other = format!("b={other},read-only");
    let server = lab.serve(&["--ublk", "no", &image, &other]);
    let list: Value = serde_json::from_str(&lab.ok(&["list", "--json"])).unwrap();
    assert_eq!(list[0]["name"], "b");
    assert_eq!(list[0]["read_only"], true);
    assert_eq!(list[1]["backend"], format!("file:{image}"));
    server.kill().unwrap();
    let server = lab.recover(&["disk"]);
    server.stop().unwrap();
    lab.ok(&["stop", "--force", "b"]);
    lab.is_clean();
}

#[test]
fn a_disk_is_served_for_as_long_as_a_command_runs() {
    let lab = sandbox();
    let image = lab.image("disk.img", 1 << 20).display().to_string();
    let told = lab.path("told").display().to_string();
    let command = format!(
        "ublkup() {{ {} \"$@\"; }}; echo $UBLKUP_SOCKET > {told}; ublkup list >> {told}; exit 7",
        env!("CARGO_BIN_EXE_ublkup")
    );
    let finished = lab.finish(&["serve", "--ublk", "no", &image, "--run", &command], &[]);
    assert_eq!(finished.status.code(), Some(7), "{finished:?}");
    assert!(
        finished.stdout.is_empty(),
        "it is the command's: {finished:?}"
    );
    let told = std::fs::read_to_string(told).unwrap();
    assert!(told.contains("run/exports/disk/vhost-user-blk\n"), "{told}");
    assert!(told.contains("serving"), "{told}");
    lab.is_clean();
}

#[test]
fn a_command_does_not_outlive_the_disk_it_was_started_for() {
    let lab = sandbox();
    let told = lab.path("told");
    let command = format!("echo $$ > {}; exec sleep 600", told.display());
    let arguments = ["serve", "--ublk", "no", "a=mem:1M", "--run", &command];
    std::thread::scope(|scope| {
        let served = scope.spawn(|| lab.finish(&arguments, &[]));
        let pid = || std::fs::read_to_string(&told).unwrap_or_default();
        eventually("the command runs", || pid().ends_with('\n'));
        lab.ok(&["stop", "a"]);
        assert_eq!(served.join().unwrap().status.code(), Some(0));
        let process = format!("/proc/{}/stat", pid().trim());
        let is_gone =
            || std::fs::read_to_string(&process).map_or(true, |stat| stat.contains(") Z "));
        eventually("the command is gone", is_gone);
    });
    lab.is_clean();
}
