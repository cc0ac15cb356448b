//! Servers that are made to serve what their configuration says now.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/exports.rs"]
mod exports;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use common::{Driver, Sandbox, eventually, sandbox};
use exports::{WRITE_THROUGH, exercise, stat, tree};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use testkit::sandbox::start;

/// A folder of configuration with one file for each export.
fn configure(lab: &Sandbox, exports: &[(&str, &str)]) -> String {
    let folder = lab.path("etc");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(folder.join("exports.d")).unwrap();
    std::fs::write(folder.join("ublkup.toml"), "[defaults]\nublk = \"no\"\n").unwrap();
    for (name, keys) in exports {
        let file = folder.join(format!("exports.d/{name}.toml"));
        std::fs::write(file, format!("[[export]]\nname = \"{name}\"\n{keys}\n")).unwrap();
    }
    folder.display().to_string()
}

#[test]
fn a_server_is_made_to_serve_what_its_configuration_says_now() {
    const MEM: &str = "spec = \"mem:1M\"";
    let lab = sandbox();
    let image = lab.image("i.img", 1 << 20).display().to_string();
    let limited = format!("{MEM}\niops-total = 100\nqueues = 1");
    let folder = configure(&lab, &[("a", &limited), ("b", MEM), ("c", MEM)]);
    let server = lab.serve(&[
        "--server-name",
        "s",
        "--depth",
        "7",
        "--config",
        &folder,
        "z=mem:1M",
    ]);
    lab.ok(&["add", "--ublk", "no", "y=mem:1M"]);
    assert_eq!(lab.ok(&["reload"]), "nothing has changed\n");
    // What was changed by hand is as the file says again.
    lab.ok(&["set", "a", "iops-total=5", "reconnect-grace=60"]);
    let grouped = format!("spec = \"file:{image}\"\nvhost-socket-group = \"root\"");
    configure(
        &lab,
        &[
            ("a", &limited),
            ("b", &format!("{MEM}\nbps-read = \"1M\"")),
            ("d", &grouped),
        ],
    );
    let plan = lab.ok(&["reload", "--dry-run"]);
    assert_eq!(
        plan,
        "c: would be removed\na: iops-total=100 reconnect-grace=10\nb: bps-read=1048576\nd: would be added\n"
    );
    assert_eq!(stat(&lab, "a")["limits"]["iops_total"], 5);
    let done = lab.ok(&["reload", "s"]);
    assert_eq!(
        done,
        "c: removed\na: iops-total=100 reconnect-grace=10\nb: bps-read=1048576\nd: added\n"
    );
    assert_eq!(stat(&lab, "a")["limits"]["iops_total"], 100);
    assert_eq!(stat(&lab, "b")["limits"]["bps_read"], 1 << 20);
    exercise(&lab, "d");
    assert_eq!(lab.ok(&["reload"]), "nothing has changed\n");
    let names: Vec<_> = tree(&lab.path("run/exports"))
        .iter()
        .filter(|path| path.is_dir())
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(
        names,
        ["a", "b", "d", "y", "z"],
        "those that are not the file's stay"
    );
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn what_a_reload_cannot_do_is_told_and_keeps_nothing_else_from_it() {
    const MEM: &str = "spec = \"mem:1M\"";
    let lab = sandbox();
    let folder = configure(&lab, &[("a", MEM), ("b", MEM)]);
    let server = lab.serve(&["--config", &folder]);
    let before = stat(&lab, "a");
    let driver = Driver::running(lab.connect("b"), WRITE_THROUGH);
    configure(
        &lab,
        &[
            ("a", "spec = \"mem:2M\"\nqueues = 3\niops-read = 9"),
            ("c", "spec = \"file:/nowhere/c.img\""),
            ("d", MEM),
        ],
    );
    let finished = lab.finish(&["reload"], &[]);
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert_eq!(finished.stdout, "a: iops-read=9\nd: added\n");
    for words in [
        "b is not removed: in use",
        "a: cannot be changed while it is served: spec, queues: that takes a new server",
        "c is not added: cannot open /nowhere/c.img",
    ] {
        assert!(finished.stderr.contains(words), "{words}: {finished:?}");
    }
    assert_eq!(stat(&lab, "a")["size_bytes"], before["size_bytes"]);
    let outcomes: Value = {
        let finished = lab.finish(&["reload", "--json"], &[]);
        serde_json::from_str(&finished.stdout).unwrap()
    };
    assert_eq!(outcomes[0]["action"], "remove");
    assert_eq!(outcomes[1]["needs_restart"], json!(["spec", "queues"]));
    assert_eq!(
        outcomes[2]["error"].as_str().unwrap().split(':').next(),
        Some("c is not added")
    );
    // One that is wrong changes nothing.
    drop(driver);
    configure(&lab, &[("a", "spec = \"mem:1M\"\ncolour = \"red\"")]);
    lab.fails(&["reload"], 2, &["a.toml:4:", "colour: unknown key"]);
    // The last one stays.
    configure(&lab, &[("e", "spec = \"file:/nowhere/e.img\"")]);
    lab.ok(&["stop", "--force", "b"]);
    let finished = lab.finish(&["reload"], &[]);
    assert_eq!(finished.status.code(), Some(1));
    assert_eq!(finished.stdout, "a: removed\n");
    assert!(
        finished
            .stderr
            .contains("d is not removed: it is the last one"),
        "{finished:?}"
    );
    configure(&lab, &[("e", MEM)]);
    assert_eq!(lab.ok(&["reload"]), "e: added\nd: removed\n");
    server.stop().unwrap();
    let server = lab.serve(&["--ublk", "no", "a=mem:1M"]);
    lab.fails(
        &["reload"],
        1,
        &["was started without a configuration file"],
    );
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_hangup_does_not_end_a_server_without_a_terminal_and_says_what_reads_its_configuration() {
    let lab = sandbox();
    // The tests may have been started by nohup(1), whose programs ignore the signal.
    let mut command = Command::new("setsid");
    command
        .args([
            "env",
            "--default-signal=HUP",
            env!("CARGO_BIN_EXE_ublkup"),
            "serve",
            "--ublk",
            "no",
            "a=mem:1M",
        ])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
        .stdin(Stdio::null());
    let server = start(command);
    let pid = Pid::from_raw(server.pid().cast_signed()).unwrap();
    kill_process(pid, Signal::HUP).unwrap();
    eventually("it says so", || {
        server.log().contains("'ublkup reload' does it")
    });
    assert_eq!(stat(&lab, "a")["state"], "serving");
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_server_that_lies_about_its_exports_has_no_others_stopped() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "--server-name", "s", "a=mem:1M", "b=mem:1M"]);
    // What a guest that has taken over another server makes it answer.
    let folder = lab.path("run/servers/liar");
    std::fs::create_dir(&folder).unwrap();
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let listener = UnixListener::bind(folder.join("control")).unwrap();
    let schema = stat(&lab, "a")["schema"].clone();
    let answer = json!({
        "schema": schema, "version": "0.1.0", "server": "liar", "pid": 1, "started_unix_seconds": 0,
        "sandbox": {"on": false, "missing": []}, "lost_log_lines": 0, "exports": ["a", "b", "../servers/s"],
        "configuration": {"path": "/etc/passwd", "options": {}},
    });
    let liar = std::thread::spawn(move || {
        for client in listener.incoming().take(2) {
            let mut client = client.unwrap();
            BufReader::new(&client)
                .read_line(&mut String::new())
                .unwrap();
            writeln!(client, "{answer}").unwrap();
        }
    });
    let reload = ["reload", "liar"];
    lab.fails(
        &reload,
        1,
        &["'liar' was started without a configuration file"],
    );
    // Its record is what a server writes at its start.
    let folder = configure(&lab, &[("b", "spec = \"mem:1M\"\niops-total = 1")]);
    let record = json!({"path": folder, "options": {}}).to_string();
    std::fs::write(lab.path("run/records/servers-liar"), record).unwrap();
    let told = lab.finish(&reload, &[]).stderr;
    for words in [
        "a is not served by 'liar', which says so, but by 's'",
        "b is not served by 'liar'",
        "'../servers/s' is not a name",
    ] {
        assert!(told.contains(words), "{told}");
    }
    liar.join().unwrap();
    assert_eq!(stat(&lab, "a")["pid"], server.pid());
    assert_eq!(stat(&lab, "b")["limits"], stat(&lab, "a")["limits"]);
    server.stop().unwrap();
    lab.is_clean();
}
