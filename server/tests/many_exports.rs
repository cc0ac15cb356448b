//! What many exports in one process cost, and what happens where descriptors run out.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{CONFIG_WCE, Driver, FLUSH, OK, Sandbox, USUAL, sandbox};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use testkit::proc::{Holdings, sleeps};
use testkit::sandbox::start;
use testkit::server::Server;
use ublkup::engine::open_files;

const EXPORTS: usize = 1000;

/// Of these: folder, name lock, admin socket, vhost socket.
const DESCRIPTORS_PER_EXPORT: usize = 4;

/// Descriptors and threads of a process whatever it serves.
const DESCRIPTORS: usize = 20;
const THREADS: usize = 4;

/// Starts a server with this limit on open files, as ulimit(1) is told it.
fn serve_under(lab: &Sandbox, limit: &str, args: &[&str]) -> Server {
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit $0 && exec \"$@\"", limit])
        .args([env!("CARGO_BIN_EXE_ublkup"), "serve"])
        .args(args)
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"));
    start(command)
}

#[test]
fn a_thousand_idle_exports_share_their_threads_and_wake_nobody() {
    let hard = getrlimit(Resource::Nofile).maximum;
    let wanted = DESCRIPTORS_PER_EXPORT * EXPORTS + DESCRIPTORS;
    assert!(
        hard.is_none_or(|hard| hard >= wanted as u64),
        "the hard limit on open files is {hard:?}, this test needs {wanted}"
    );
    let lab = sandbox();
    let specs: Vec<String> = (0..EXPORTS).map(|n| format!("e{n}=null:1G")).collect();
    let mut args = vec!["--ublk", "no", "--vhost", "yes"];
    args.extend(specs.iter().map(String::as_str));
    let begun = Instant::now();
    // The server raises it.
    let server = serve_under(&lab, "-Sn 256", &args);
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
fn sixty_four_exports_serve_a_client_each_under_the_usual_soft_limit() {
    const CLIENTS: usize = 64;
    // All the clients are in this process.
    open_files::raise_limit();
    let lab = sandbox();
    let specs: Vec<String> = (0..CLIENTS).map(|n| format!("e{n}=mem:1M")).collect();
    let mut args = vec!["--ublk", "no", "--vhost", "yes", "--queues", "2"];
    args.extend(specs.iter().map(String::as_str));
    let server = serve_under(&lab, "-Sn 1024", &args);
    let features = USUAL & !(FLUSH | CONFIG_WCE);
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let mut driver = Driver::running(lab.connect(&format!("e{number}")), features);
        driver.add_vring(128);
        clients.push(driver);
    }
    // What a client reads is of its own export, with all the others there.
    for (number, driver) in clients.iter_mut().enumerate() {
        let own = [u8::try_from(number).unwrap(); 512];
        assert_eq!(driver.write(0, &own), OK, "e{number}");
    }
    for (number, driver) in clients.iter_mut().enumerate() {
        let own = vec![u8::try_from(number).unwrap(); 512];
        assert_eq!(driver.read(0, 512), (OK, own), "e{number}");
    }
    let held = Holdings::of(server.pid()).unwrap().descriptors;
    println!("{CLIENTS} clients: {held} descriptors");
    assert!(held > 1024, "the limit was not reached: {held}");
    drop(clients);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn doctor_says_which_server_may_open_too_few_files_for_what_it_serves() {
    let lab = sandbox();
    let found = || lab.finish(&["doctor"], &[]).stdout;
    let line = |found: &str, whose: &str| {
        let mut lines = found.lines();
        let begin = format!("open files: {whose}: at most ");
        lines.find(|line| line.contains(&begin)).map(str::to_owned)
    };
    assert!(line(&found(), "a server that is started from here").is_some());
    let exports = ["a=null:1G", "b=null:1G", "c=null:1G", "d=null:1G"];
    let args = ["--ublk", "no", "--server-name"];
    let low = [&args[..], &["low"], &exports].concat();
    let low = serve_under(&lab, "-n 100", &low);
    let high = serve_under(
        &lab,
        "-n 1000",
        &[&args[..], &["high", "e=null:1G"]].concat(),
    );
    let found = found();
    let told = line(&found, "server 'low'").unwrap();
    assert!(told.starts_with("warning"), "{told}");
    for part in [
        "at most 100,",
        "4 exports",
        "160",
        "LimitNOFILE=",
        "ulimit -Hn",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let told = line(&found, "server 'high'").unwrap();
    assert!(
        told.starts_with("ok") && told.contains("at most 1000,"),
        "{told}"
    );
    low.stop().unwrap();
    high.stop().unwrap();
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
