//! The admin protocol: its shapes, as they were recorded, and its event stream.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;

use common::{Driver, LIMIT, OK, Sandbox, USUAL, sandbox};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ublkup::engine::events::Event;
use ublkup::export::admin::{ExportStatus, Request, Resized, ServerStatus};

/// Where what was said by older versions is recorded. Lines are added, and none is ever changed.
const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recorded");

fn recorded(file: &str) -> Vec<String> {
    let path = Path::new(RECORDED).join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// Asserts that all of `old` is in `new`, with the same values.
fn expect_within(old: &Value, new: &Value, at: &str) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in old {
                let found = new
                    .get(key)
                    .unwrap_or_else(|| panic!("{at}.{key} has gone"));
                expect_within(value, found, &format!("{at}.{key}"));
            }
        }
        (Value::Array(old), Value::Array(new)) => {
            assert_eq!(old.len(), new.len(), "{at}");
            for (number, (old, new)) in old.iter().zip(new).enumerate() {
                expect_within(old, new, &format!("{at}[{number}]"));
            }
        }
        (old, new) => assert_eq!(old, new, "{at}"),
    }
}

/// Asserts that each recorded line is understood, and said again in the same words.
fn expect_kept<T: DeserializeOwned + Serialize>(file: &str) {
    for line in recorded(file) {
        let old: Value = serde_json::from_str(&line).unwrap();
        let understood: T = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("{file}: no longer understood: {error}: {line}"));
        expect_within(&old, &serde_json::to_value(understood).unwrap(), file);
    }
}

#[test]
fn what_older_versions_said_is_understood_and_said_in_the_same_words() {
    expect_kept::<ExportStatus>("stat-0.json");
    expect_kept::<ExportStatus>("stat-1.json");
    expect_kept::<ServerStatus>("server-1.json");
    expect_kept::<Resized>("resized-0.json");
    expect_kept::<Event>("events-1.jsonl");
}

#[test]
fn what_older_versions_asked_is_still_understood() {
    for line in recorded("requests.jsonl") {
        let request = Request::parse(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let again = Request::parse(&request.line().unwrap()).unwrap();
        assert_eq!(request, again);
    }
    for wrong in [
        r#"{"command":"stat","verbose":true}"#,
        r#"{"command":"stat","export":7}"#,
        r#"{"export":"a"}"#,
        "[]",
    ] {
        assert!(Request::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn the_document_has_every_event_and_every_field() {
    let document = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/admin.md");
    let document = std::fs::read_to_string(document).unwrap();
    for line in recorded("events-1.jsonl") {
        let event: Value = serde_json::from_str(&line).unwrap();
        let kind = event["event"].as_str().unwrap();
        assert!(document.contains(&format!("| `{kind}` |")), "{kind}");
    }
    for file in ["stat-1.json", "server-1.json", "resized-0.json"] {
        for line in recorded(file) {
            let answer: Value = serde_json::from_str(&line).unwrap();
            for key in answer.as_object().unwrap().keys() {
                assert!(document.contains(&format!("`{key}`")), "{file}: {key}");
            }
        }
    }
}

/// Asks at an admin socket.
fn ask(socket: &Path, request: &Value) -> Value {
    let stream = send(socket, request);
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn send(socket: &Path, request: &Value) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    stream
}

/// The next line of an event stream.
fn next(lines: &mut impl BufRead) -> Value {
    let mut line = String::new();
    lines.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

fn watch(socket: &Path, request: &Value) -> BufReader<UnixStream> {
    let mut lines = BufReader::new(send(socket, request));
    let begin = next(&mut lines);
    assert_eq!(begin["event"], "begin");
    assert_eq!(begin["schema"], 1);
    lines
}

fn serve(lab: &Sandbox) -> testkit::server::Server {
    let image = lab.image("a.img", 1 << 20).display().to_string();
    let specs = [format!("a=file:{image}"), "b=mem:1M".to_owned()];
    lab.serve(&["--ublk", "no", "--server-name", "s", &specs[0], &specs[1]])
}

#[test]
fn a_server_has_a_socket_for_all_of_its_exports() {
    let lab = sandbox();
    let server = serve(&lab);
    let socket = lab.path("run/servers/s/control");
    let said = ask(&socket, &json!({"command": "server"}));
    assert_eq!(said["exports"], json!(["a", "b"]));
    assert_eq!(said["pid"], server.pid());
    let all = ask(&socket, &json!({"command": "stat"}));
    let names: Vec<_> = all["exports"].as_array().unwrap().iter().collect();
    assert_eq!([&names[0]["name"], &names[1]["name"]], ["a", "b"]);
    let one = ask(&socket, &json!({"command": "stat", "export": "b"}));
    assert_eq!((&one["name"], &one["server"]), (&json!("b"), &json!("s")));
    for (request, why) in [
        (json!({"command": "stop"}), "of which export?"),
        (
            json!({"command": "stat", "export": "c"}),
            "has no export called 'c'",
        ),
    ] {
        let refused = ask(&socket, &request)["error"].as_str().unwrap().to_owned();
        assert!(refused.contains(why), "{refused}");
    }
    let of_b = lab.path("run/exports/b/control");
    let refused = ask(&of_b, &json!({"command": "stat", "export": "a"}));
    assert!(
        refused["error"]
            .as_str()
            .unwrap()
            .contains("of 'b', not of 'a'")
    );
    lab.serve_fails(
        &["--ublk", "no", "--server-name", "s", "c=mem:1M"],
        1,
        &["a server called 's' runs already"],
    );
    let stopped = ask(&socket, &json!({"command": "stop", "export": "b"}));
    assert_eq!(stopped, json!({"stopped": true}));
    assert_eq!(
        ask(&socket, &json!({"command": "server"}))["exports"],
        json!(["a"])
    );
    server.stop().unwrap();
    lab.is_clean();
    assert!(!lab.path("run/servers/s").exists());
}

#[test]
fn what_happens_to_an_export_is_told_as_it_happens() {
    let lab = sandbox();
    let server = serve(&lab);
    let socket = lab.path("run/servers/s/control");
    let mut all = watch(&socket, &json!({"command": "events"}));
    let mut of_b = watch(
        &lab.path("run/exports/b/control"),
        &json!({"command": "events"}),
    );
    let mut expect = |kind: &str| {
        let event = next(&mut all);
        assert_eq!(
            (&event["event"], &event["export"]),
            (&json!(kind), &json!("a"))
        );
        event
    };
    let mut driver = Driver::running(lab.connect("a"), USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    assert_eq!(expect("client-came")["pid"], std::process::id());
    expect("upgraded");
    let second = lab.connect("a");
    let refused = expect("client-refused");
    assert!(
        refused["why"].as_str().unwrap().contains("in use by"),
        "{refused}"
    );
    drop(second);
    lab.ok(&["resize", "a", "2M"]);
    let resized = expect("resized");
    let sizes = [&resized["size_bytes"], &resized["old_size_bytes"]];
    assert_eq!(sizes, [&json!(2 << 20), &json!(1 << 20)]);
    lab.ok(&["set", "a", "iops-total=10"]);
    assert_eq!(expect("changed")["key"], "iops-total");
    for _ in 0..3 {
        assert_eq!(driver.write(0, &[7; 512]), OK);
    }
    expect("throttled");
    lab.ok(&["set", "a", "poll-us=0"]);
    assert_eq!(expect("changed")["value"], "0");
    drop(driver);
    assert_eq!(expect("client-left")["how"], "died");
    lab.ok(&["stop", "--force", "a"]);
    assert_eq!(expect("stopped")["in_order"], true);
    // The first that concerns it, and the last: the stream ends with the server.
    server.stop().unwrap();
    assert_eq!(next(&mut of_b)["event"], "stopped");
    assert_eq!(of_b.read_line(&mut String::new()).unwrap(), 0);
    lab.is_clean();
}

#[test]
fn a_reader_that_does_not_read_holds_up_nothing_and_is_told_what_it_missed() {
    let lab = sandbox();
    let server = serve(&lab);
    let socket = lab.path("run/servers/s/control");
    let request = json!({"command": "events", "export": "b"});
    let mut slow = watch(&socket, &request);
    let _never_reads: Vec<_> = (1..16).map(|_| watch(&socket, &request)).collect();
    let one_more = ask(&socket, &request);
    let busy = one_more["error"].as_str().unwrap().to_owned();
    assert!(busy.contains("16 clients watch events"), "{busy}");
    // More than its queue and the connection hold.
    for round in 0..3000 {
        let stream = lab.connect("b");
        stream.shutdown(Shutdown::Both).unwrap();
        drop(stream);
        if round % 500 == 0 {
            ask(&socket, &json!({"command": "stat"}));
        }
    }
    let mut before = 0;
    let mut lost = 0;
    let after = loop {
        let line = next(&mut slow);
        if line["event"] == "lost" {
            lost = line["count"].as_u64().unwrap();
            // Told once there is room again.
            lab.connect("b").shutdown(Shutdown::Both).unwrap();
            continue;
        }
        let sequence = line["sequence"].as_u64().unwrap();
        if lost > 0 {
            break sequence;
        }
        assert!(
            before == 0 || sequence == before + 1,
            "{sequence} after {before}"
        );
        before = sequence;
    };
    assert_eq!(after, before + lost + 1);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn events_are_printed_for_people_and_for_programs() {
    let lab = sandbox();
    let server = serve(&lab);
    lab.fails(
        &["events", "--server", "t"],
        1,
        &["no server called 't' runs; there are: s"],
    );
    let mut watchers = [&["events", "b"][..], &["events", "--json"]].map(|args| {
        let mut command = lab.command(args);
        command.stdout(Stdio::piped()).spawn().unwrap()
    });
    let lines = watchers
        .each_mut()
        .map(|watcher| BufReader::new(watcher.stdout.take().unwrap()));
    let [people, programs] = lines.map(BufRead::lines);
    let (mut people, mut programs) = (people.map(Result::unwrap), programs.map(Result::unwrap));
    let mut json = || -> Value { serde_json::from_str(&programs.next().unwrap()).unwrap() };
    assert_eq!(json()["event"], "begin");
    let (told, is_told) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        people.next().inspect(|_| told.send(()).unwrap());
        people.last()
    });
    common::eventually("the first line", || {
        drop(lab.connect("b"));
        is_told.try_recv().is_ok()
    });
    assert_eq!(json()["event"], "client-came");
    server.stop().unwrap();
    let last = reader.join().unwrap().unwrap();
    assert!(last.ends_with("Z b stopped in_order=true"), "{last}");
    let rest: Vec<Value> = (programs)
        .map(|line| serde_json::from_str(&line).unwrap())
        .collect();
    assert_eq!(rest.last().unwrap()["event"], "stopped");
    for mut watcher in watchers {
        assert!(watcher.wait().unwrap().success());
    }
    lab.fails(&["events"], 1, &["no server runs"]);
}
