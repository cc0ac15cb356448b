//! A cluster that does not answer for a while.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::*;
use crate::{ARGS, Image, PLAIN, connect, serve, stat};

/// The cluster's only OSD, stopped until the value goes.
struct Stopped(Pid);

impl Stopped {
    fn new() -> Self {
        let conf = PathBuf::from(std::env::var("CEPH_CONF").unwrap());
        let pid = std::fs::read_to_string(conf.with_file_name("osd.0.pid")).unwrap();
        let pid: u32 = pid.trim().parse().unwrap();
        testkit::proc::stop(pid).unwrap();
        Self(Pid::from_raw(pid.cast_signed()).unwrap())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// For as long as a thousand writes to another disk take, or as many seconds as `RBD_STOP_S` says.
#[test]
#[ignore = "needs a Ceph cluster"]
fn while_the_cluster_does_not_answer_requests_wait_and_other_exports_do_not() {
    let image = Image::new("waiting", "64M");
    let lab = sandbox();
    let server = lab.serve(&[&ARGS[..], &[&image.spec(), "m=mem:1M"]].concat());
    let mut driver = connect(&lab);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    let stopped = Stopped::new();
    driver.memory.put(DATA + 4096, &[2; 512]);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
    let mut other = Driver::running(lab.connect("m"), PLAIN);
    let seconds = std::env::var("RBD_STOP_S").map_or(0, |seconds| seconds.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut writes, mut longest) = (0, Duration::ZERO);
    while writes < 1000 || Instant::now() < end {
        let begun = Instant::now();
        assert_eq!(other.write(0, &[3; 512]), OK);
        longest = longest.max(begun.elapsed());
        writes += 1;
    }
    eprintln!("{writes} writes to another disk meanwhile, the longest in {longest:?}");
    assert!(lab.ok(&["stat", "d"]).contains("running"));
    drop(other);
    lab.ok(&["stop", "--force", "m"]);
    assert_eq!(driver.vrings[0].reap(&driver.memory), None);
    drop(stopped);
    assert_eq!(driver.vrings[0].wait(&driver.memory), (0, 1));
    assert_eq!(driver.read(0, 512), (OK, vec![2; 512]));
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_stop_says_what_it_waits_for_and_a_second_signal_ends_it() {
    let image = Image::new("stopping", "64M");
    let lab = sandbox();
    let server = serve(&lab, &image);
    let mut driver = connect(&lab);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    let stopped = Stopped::new();
    driver.memory.put(DATA + 4096, &[2; 512]);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
    let process = Pid::from_raw(server.pid().cast_signed()).unwrap();
    kill_process(process, Signal::TERM).unwrap();
    eventually("it says what it waits for", || {
        let log = server.log();
        log.contains("d: still waiting for the requests of its vhost-user clients")
    });
    let (status, log) = server.end_by(Signal::TERM).unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    drop(stopped);
    // What it had was done or not, and is not done later.
    let server = serve(&lab, &image);
    let mut driver = connect(&lab);
    let (status, found) = driver.read(0, 512);
    assert!(
        status == OK && (found == [1; 512] || found == [2; 512]),
        "{found:?}"
    );
    assert_eq!(driver.write(0, &[3; 512]), OK);
    assert_eq!(driver.read(0, 512), (OK, vec![3; 512]));
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

/// Reads and writes of 64 KiB, which all go to the cluster.
fn have_under_way(lab: &Sandbox, driver: &mut Driver) {
    for at in 0..8_u16 {
        let memory = DATA + 0x20000 * u64::from(at);
        let (kind, flags) = match at % 2 {
            0 => (T_IN, WRITE),
            _ => (T_OUT, 0),
        };
        driver.header(memory, kind, u64::from(at) * 128);
        let data = (memory + 4096, 65536, flags);
        driver.submit_on(0, 3 * at, &[(memory, 16, 0), data, (memory + 16, 1, WRITE)]);
    }
    eventually("all have been taken", || {
        stat(lab)["vhost"]["in_flight"] == 8
    });
}

/// With its memory, or with a file that has become empty.
#[test]
#[ignore = "needs a Ceph cluster"]
fn a_client_that_goes_with_requests_at_the_cluster_leaves_the_disk_to_the_next() {
    let image = Image::new("left", "64M");
    let lab = sandbox();
    let server = serve(&lab, &image);
    for takes_memory in [false, true, false, true] {
        let mut driver = connect(&lab);
        assert_eq!(driver.write(0, &[1; 512]), OK);
        let stopped = Stopped::new();
        have_under_way(&lab, &mut driver);
        if takes_memory {
            // From here on this process must not touch the memory either.
            driver.memory.file.set_len(0).unwrap();
        }
        drop(driver);
        drop(stopped);
        let mut next = connect(&lab);
        assert_eq!(next.write(8, &[2; 512]), OK);
        assert_eq!(next.read(8, 512), (OK, vec![2; 512]));
    }
    let log = server.stop().unwrap();
    assert!(!log.contains("panicked"), "{log}");
    lab.is_clean();
}
