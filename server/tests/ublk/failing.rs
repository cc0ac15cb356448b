//! Storage that fails for a while: a disk of one server is the storage of another one.

use super::recovery::Disk;
use super::upgrade::{direct, errno, stat, write_block};

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_flush_that_failed_fails_again_after_the_device_has_healed() {
    let below = Disk::new();
    let faults = "fault:write=eio*1;mem:16M";
    let failing = below.lab.serve(&["--ublk", "yes", "--name", "d", faults]);
    let device = below.device();
    let above = Disk::new();
    let spec = format!("file:{},cache=buffered", device.display());
    let server = above.lab.serve(&["--ublk", "yes", "--name", "d", &spec]);

    let held = direct(&above.device());
    write_block(&held, 0, b'a').unwrap();
    // The kernel tells its first caller that the write-back failed, and no later one.
    assert_eq!(errno(held.sync_data()), Some(libc::EIO));
    assert_eq!(stat(&below.lab)["ublk"]["counters"]["errors"], 1);
    write_block(&held, 1, b'b').unwrap();
    assert_eq!(errno(held.sync_data()), Some(libc::EIO));
    drop(held);

    let told = stat(&above.lab)["last_error"].as_str().unwrap().to_owned();
    for part in [device.to_str().unwrap(), "flush", "Input/output error"] {
        assert!(told.contains(part), "{told}");
    }
    let log = server.stop().unwrap();
    assert!(log.contains(&told), "{told}\n{log}");
    // A server that comes later sees the device as it is now.
    let server = above.lab.serve(&["--ublk", "yes", "--name", "d", &spec]);
    let held = direct(&above.device());
    write_block(&held, 0, b'c').unwrap();
    held.sync_data().unwrap();
    drop(held);
    server.stop().unwrap();
    above.lab.is_clean();
    failing.stop().unwrap();
    below.lab.is_clean();
}
