//! What many exports in one process cost, and what happens where descriptors run out.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::time::{Duration, Instant};

use common::sandbox;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use testkit::proc::{Holdings, sleeps};

const EXPORTS: usize = 1000;

/// Of these: folder, name lock, admin socket, vhost socket.
const DESCRIPTORS_PER_EXPORT: usize = 4;

/// Descriptors and threads of a process whatever it serves.
const DESCRIPTORS: usize = 20;
const THREADS: usize = 4;

#[test]
fn a_thousand_idle_exports_share_their_threads_and_wake_nobody() {
    let hard = getrlimit(Resource::Nofile).maximum;
    let wanted = DESCRIPTORS_PER_EXPORT * EXPORTS + DESCRIPTORS;
    assert!(
        hard.is_none_or(|hard| hard >= wanted as u64),
        "the hard limit on open files is {hard:?}, this test needs {wanted}"
    );
    // The server raises it.
    let soft = Rlimit {
        current: Some(256),
        maximum: hard,
    };
    setrlimit(Resource::Nofile, soft).unwrap();
    let lab = sandbox();
    let specs: Vec<String> = (0..EXPORTS).map(|n| format!("e{n}=null:1G")).collect();
    let mut args = vec!["--ublk", "no", "--vhost", "yes"];
    args.extend(specs.iter().map(String::as_str));
    let begun = Instant::now();
    let server = lab.serve(&args);
    let took = begun.elapsed();
    let Holdings {
        threads,
        descriptors,
        resident_kib,
        ..
    } = Holdings::of(server.pid()).unwrap();
    println!(
        "{EXPORTS} exports: started in {took:?}, {threads} threads, {descriptors} descriptors, \
         {resident_kib} KiB"
    );
    assert!(threads <= THREADS, "{threads} threads");
    assert!(descriptors <= wanted, "{descriptors} descriptors");
    assert!(resident_kib <= 100 << 10, "{resident_kib} KiB");
    sleeps(server.pid()).expect("with a thousand exports");
    assert!(lab.ok(&["stat", "e999"]).contains("e999"));
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn an_admin_socket_outlives_a_time_without_descriptors() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "--vhost", "yes", "a=null:1G"]);
    let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap());
    let maximum = getrlimit(Resource::Nofile).maximum;
    let set = |current| prlimit(pid, Resource::Nofile, Rlimit { current, maximum }).unwrap();
    // As many as it has: there is none for a client.
    set(Some(3));
    std::thread::scope(|scope| {
        let stat = scope.spawn(|| lab.ok(&["stat", "a"]));
        // Longer than the server pauses after an error.
        std::thread::sleep(Duration::from_millis(2500));
        assert!(!stat.is_finished());
        set(maximum);
        assert!(stat.join().unwrap().contains("null:1G"));
    });
    let log = server.stop().unwrap();
    let said = "a: admin socket: cannot accept a client: Too many open files";
    assert_eq!(log.matches(said).count(), 1, "once for one cause: {log}");
    assert!(log.contains("the limit is 3 open files"), "{log}");
}
