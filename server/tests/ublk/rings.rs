//! A server under which io_uring is switched off.

use std::fs;

use super::common::sandbox;
use super::data::serve;

const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

/// Switches io_uring off for all, until the value is dropped.
struct Off;

impl Off {
    fn new() -> Self {
        fs::write(SWITCH, "2").unwrap();
        Self
    }
}

impl Drop for Off {
    fn drop(&mut self) {
        fs::write(SWITCH, "0").unwrap();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_device_is_removed_when_no_more_rings_can_be_made() {
    let lab = sandbox();
    let (server, device) = serve(&lab, "d", "mem:64M", &[]);
    let off = Off::new();
    let log = server.stop().unwrap();
    drop(off);
    assert!(!device.exists(), "{log}");
    lab.is_clean();
}
