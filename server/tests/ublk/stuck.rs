//! A server that is to end while the storage has a request of its block device.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use super::common::{eventually, sandbox};
use ublkup::door::ublk::remove;

use super::upgrade::{direct, stat, write_block};

/// Fails what waits at a device: a process with a write that waits cannot end.
struct RemoveOnDrop<'a>(&'a Path);

impl Drop for RemoveOnDrop<'_> {
    fn drop(&mut self) {
        let number = self
            .0
            .to_str()
            .and_then(|path| path.strip_prefix("/dev/ublkb"));
        let _gone = number.map(|number| remove(number.parse().unwrap(), true));
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_with_a_stuck_request_of_its_block_device_names_it_and_a_second_signal_ends_it() {
    let lab = sandbox();
    let spec = "d=fault:write=stall;mem:64M";
    let server = lab.serve(&["--ublk", "yes", "--queues", "1", spec]);
    let device = server.block_device().unwrap();
    let _gone = RemoveOnDrop(&device);
    let writer = std::thread::spawn({
        let held = direct(&device);
        move || write_block(&held, 0, b'x')
    });
    eventually("the storage has the request", || {
        stat(&lab)["ublk"]["in_flight"].as_u64() == Some(1)
    });
    let pid = Pid::from_raw(server.pid().cast_signed()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let said = format!("d: still waiting for the requests of {}", device.display());
    eventually("it says what it waits for", || server.log().contains(&said));
    let (status, log) = server.end_by(Signal::INT).unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("a second signal: ending at once"), "{log}");
    assert!(!log.contains("d: stopped"), "{log}");
    // As after a crash: what is left is removed when a person says so, and the request fails.
    if lab.path("run/exports/d").exists() {
        lab.ok(&["stop", "--force", "d"]);
    }
    assert!(writer.join().unwrap().is_err());
    eventually("the device goes", || !device.exists());
    lab.is_clean();
}
