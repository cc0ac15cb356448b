//! Options that are changed while an export is served.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::os::unix::net::UnixStream;

use common::{Driver, OK, Sandbox, USUAL, eventually, sandbox};
use serde_json::{Value, json};

fn stat(lab: &Sandbox) -> Value {
    serde_json::from_str(&lab.ok(&["stat", "a", "--json"])).unwrap()
}

/// A client that has the disk dies.
fn die(lab: &Sandbox) {
    let mut driver = Driver::running(lab.connect("a"), USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    drop(driver);
    eventually("the session ends", || {
        stat(lab)["vhost"]["sessions"] == json!([])
    });
}

#[test]
fn limits_and_grace_change_at_once_and_the_next_server_knows() {
    let lab = sandbox();
    let image = lab.image("a.img", 1 << 20).display().to_string();
    let spec = format!("a=file:{image},reconnect-grace=3600,iops-read=7");
    let server = lab.serve(&["--ublk", "no", &spec]);
    assert_eq!(stat(&lab)["limits"]["iops_read"], 7);
    lab.ok(&[
        "set",
        "a",
        "reconnect-grace=0",
        "iops-read=1000",
        "bps-write=10M",
    ]);
    let limits = &stat(&lab)["limits"];
    assert_eq!(
        (&limits["iops_read"], &limits["bps_write"]),
        (&json!(1000), &json!(10 << 20))
    );
    die(&lab);
    assert_eq!(
        stat(&lab)["access"],
        "free",
        "nothing is kept with a grace of nothing"
    );
    server.kill().unwrap();
    let server = lab.recover(&["a"]);
    let limits = &stat(&lab)["limits"];
    assert_eq!(
        (&limits["iops_read"], &limits["bps_write"]),
        (&json!(1000), &json!(10 << 20))
    );
    die(&lab);
    assert_eq!(stat(&lab)["access"], "free");
    lab.ok(&[
        "set",
        "a",
        "reconnect-grace=3600",
        "iops-read=0",
        "bps-write=0",
    ]);
    assert_eq!(stat(&lab)["limits"], Value::Null);
    die(&lab);
    assert_eq!(stat(&lab)["access"], "waiting");
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn what_cannot_be_changed_is_named_and_then_nothing_is() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "a=mem:1M"]);
    for (option, words) in [
        (
            "queues=3",
            "queues cannot be changed while the export is served",
        ),
        ("depth=3", "depth cannot be changed"),
        (
            "iops-reed=3",
            "iops-reed: unknown key; did you mean 'iops-read'?",
        ),
        (
            "reconnect-grace=soon",
            "reconnect-grace: invalid value 'soon'",
        ),
        ("log=verbose", "log: give one of error, warn, info"),
    ] {
        lab.fails(
            &["set", "a", "iops-total=5", option],
            1,
            &["a stays as it is", words],
        );
        assert_eq!(stat(&lab)["limits"], Value::Null, "{option}");
    }
    let usage = lab.finish(&["set", "a", "iops-total"], &[]);
    assert_eq!(usage.status.code(), Some(2));
    assert!(usage.stderr.contains("give KEY=VALUE"), "{usage:?}");
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn queue_threads_stop_to_poll_when_they_are_told_so() {
    let lab = sandbox();
    let image = lab.image("a.img", 1 << 20).display().to_string();
    let spec = format!("a=file:{image},poll-us=0");
    let server = lab.serve(&["--ublk", "no", &spec]);
    let mut driver = Driver::running(lab.connect("a"), USUAL);
    lab.ok(&["set", "a", "poll-us=always"]);
    assert_eq!(stat(&lab)["poll_us"], "always");
    // This wakes it up, and it does not sleep any more.
    assert_eq!(driver.write(0, &[7; 512]), OK);
    let sleeps = || stat(&lab)["vhost"]["counters"]["sleeps"].as_u64().unwrap();
    let before = sleeps();
    assert_eq!(driver.write(0, &[8; 512]), OK);
    assert_eq!(sleeps(), before);
    lab.ok(&["set", "a", "poll-us=0"]);
    eventually("it sleeps, though nothing was asked of it", || {
        sleeps() > before
    });
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

/// The server cannot look up accounts, processors and files any more.
#[test]
fn an_option_changes_whatever_the_others_were_made_of() {
    let lab = sandbox();
    let group = std::process::Command::new("id")
        .arg("-gn")
        .output()
        .unwrap();
    let group = String::from_utf8(group.stdout).unwrap();
    let spec = format!("a=mem:1M,vhost-socket-group={}", group.trim());
    let server = lab.serve(&["--ublk", "no", &spec]);
    lab.ok(&["set", "a", "iops-total=5"]);
    assert_eq!(stat(&lab)["limits"]["iops_total"], 5);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn the_users_of_one_export_do_not_change_the_log_of_all() {
    let lab = sandbox();
    let shared = "a=mem:1M,admin-socket-mode=0666";
    let server = lab.serve(&["--ublk", "no", shared, "b=mem:1M"]);
    let words = [
        "log is the whole server's",
        "other exports have other users",
    ];
    lab.fails(&["set", "a", "log=off"], 1, &words);
    lab.ok(&["set", "a", "iops-total=5"]);
    lab.ok(&["set", "b", "log=debug"]);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn the_log_of_a_running_server_is_made_louder_and_quieter() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "a=mem:1M"]);
    let control = lab.path("run/exports/a/control");
    // The server has no client to answer, which it tells at the level debug.
    let hang_up = || drop(UnixStream::connect(&control).unwrap());
    hang_up();
    lab.ok(&["set", "a", "log=debug"]);
    eventually("a line of that level", || {
        hang_up();
        server.log().contains("DEBUG")
    });
    assert_eq!(server.log().matches("log=debug").count(), 1);
    lab.ok(&["set", "a", "log=error"]);
    lab.ok(&["set", "a", "iops-total=5"]);
    let log = server.stop().unwrap();
    assert!(!log.contains("iops-total=5"), "{log}");
    lab.is_clean();
}

#[test]
fn a_folder_of_configuration_is_served() {
    let lab = sandbox();
    let folder = lab.path("etc");
    std::fs::create_dir_all(folder.join("exports.d")).unwrap();
    std::fs::write(folder.join("ublkup.toml"), "[defaults]\nublk = \"no\"\n").unwrap();
    let export = "[[export]]\nspec = \"a=mem:1M\"\n";
    std::fs::write(folder.join("exports.d/a.toml"), export).unwrap();
    let server = lab.serve(&["--config", &folder.display().to_string()]);
    assert_eq!(stat(&lab)["name"], "a");
    lab.ok(&["remove", "a"]);
    drop(server);
    lab.is_clean();
}
