//! What servers measure, and how it is collected.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use common::*;

/// What is answered to `request` there.
fn exchange(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// Three reads and a write, and one read behind the end of the disk.
fn use_disk(driver: &mut Driver) {
    for _ in 0..3 {
        assert_eq!(driver.read(0, 4096).0, OK);
    }
    assert_eq!(driver.write(8, &[7; 512]), OK);
    assert_eq!(driver.read(1 << 40, 512).0, IOERR);
}

const COUNTED: [&str; 6] = [
    "ublkup_up{export=\"a\"} 1",
    "ublkup_requests_total{export=\"a\",door=\"vhost-user\",op=\"read\"} 3",
    "ublkup_bytes_total{export=\"a\",door=\"vhost-user\",op=\"write\"} 512",
    "ublkup_errors_total{export=\"a\",door=\"vhost-user\",errno=\"EIO\"} 1",
    "ublkup_requests_in_flight{export=\"a\",door=\"vhost-user\"} 0",
    "ublkup_storage_duration_seconds_count{export=\"a\",door=\"vhost-user\",op=\"read\"} 3",
];

fn has_lines(text: &str, wanted: &[&str]) {
    for line in wanted {
        assert!(
            text.lines().any(|other| other == *line),
            "no {line} in {text}"
        );
    }
}

#[test]
fn prometheus_collects_from_a_server_in_its_sandbox() {
    let lab = sandbox();
    let socket = lab.path("metrics");
    let address = socket.to_str().unwrap();
    let server = lab.serve(&[
        "--ublk",
        "no",
        "--metrics",
        address,
        "a=mem:1M",
        "b=null:1M",
    ]);
    let mut driver = Driver::running(lab.connect("a"), VERSION_1 | PROTOCOL);
    use_disk(&mut driver);
    let ask = |request| exchange(UnixStream::connect(&socket).unwrap(), request);
    let (head, body) = ask(GET)
        .split_once("\r\n\r\n")
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains(&format!("Content-Length: {}\r\n", body.len())),
        "{head}"
    );
    has_lines(&body, &COUNTED);
    has_lines(&body, &["ublkup_up{export=\"b\"} 1"]);
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "404"),
        ("\x16\x03\x01\r\n\r\n", "400"),
    ] {
        let answer = ask(request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
    }
    // One that says nothing does not hold up the others.
    let silent = UnixStream::connect(&socket).unwrap();
    assert!(ask(GET).contains("ublkup_up"));
    silent.shutdown(Shutdown::Both).unwrap();
    has_lines(&lab.ok(&["metrics"]), &COUNTED);
    let log = server.stop().unwrap();
    assert!(!socket.exists());
    // What the driver did wrong is named, so that its owner finds it.
    let wrong = "type 0 at sector 1099511627776";
    assert!(log.contains(wrong), "{log}");
    let pid = format!("pid={}", std::process::id());
    assert!(
        log.lines()
            .any(|line| line.contains(wrong) && line.contains(&pid)),
        "{log}"
    );
}

#[test]
fn a_server_listens_for_collectors_on_the_machine_alone() {
    let lab = sandbox();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let open = lab.finish(&["serve", "--metrics", "0.0.0.0:9177", "a=mem:1M"], &[]);
    assert_eq!(open.code(), 2);
    assert!(
        open.stderr.contains("0.0.0.0 is not this machine alone"),
        "{}",
        open.stderr
    );
    let arguments = ["--ublk", "no", "--metrics", &address, "a=mem:1M"];
    lab.serve_fails(&arguments, 1, &["--metrics", &address]);
    drop(taken);
    let server = lab.serve(&arguments);
    let answer = exchange(TcpStream::connect(&address).unwrap(), GET);
    assert!(answer.contains("ublkup_up{export=\"a\"} 1\n"), "{answer}");
    server.stop().unwrap();
}

#[test]
fn requests_of_a_file_are_timed_and_an_export_without_a_server_is_down() {
    let lab = sandbox();
    let image = lab.image("disk.img", 1 << 20);
    let spec = format!("a=file:{}", image.display());
    let server = lab.serve(&["--ublk", "no", &spec]);
    let mut driver = Driver::running(lab.connect("a"), USUAL);
    use_disk(&mut driver);
    let stat = lab.ok(&["stat", "a", "--json"]);
    let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
    let latency = &stat["vhost"]["latency"][0];
    assert_eq!(latency["op"], "read");
    for kind in ["storage", "request"] {
        let times = &latency[kind];
        assert_eq!(times["count"], 3, "{times}");
        assert!(times["sum_ns"].as_u64().unwrap() > 0, "{times}");
        let buckets = times["buckets"].as_array().unwrap();
        let counts = buckets.iter().map(|bucket| bucket[1].as_u64().unwrap());
        assert_eq!(counts.sum::<u64>(), 3, "{times}");
    }
    assert!(stat["vhost"]["counters"]["sleeps"].as_u64().unwrap() > 0);
    server.kill().unwrap();
    has_lines(&lab.ok(&["metrics"]), &["ublkup_up{export=\"a\"} 0"]);
}
