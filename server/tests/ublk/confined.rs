//! What a server with a block device, which keeps more than others, can still do in its sandbox.

use ublkup::engine::sandbox::Status;
use ublkup::storage::ESCAPE_VARIABLE;

use super::common::sandbox;
use super::escape::{Outside, all_are_refused, ends};
use super::upgrade::{direct, read_block, stat, write_block};

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_with_a_block_device_reaches_nothing_outside_its_sandbox() {
    let lab = sandbox();
    let outside = Outside::new();
    let image = lab.image("disk.img", 64 << 20);
    let spec = format!("d=fault:write=escape*1;file:{}", image.display());
    let args = ["--ublk", "yes", &spec];
    let server = lab.serve_with(&args, &[(ESCAPE_VARIABLE, &outside.path())]);
    let device = server.block_device().unwrap();
    let held = direct(&device);
    write_block(&held, 0, b'7').unwrap();
    assert!(read_block(&held, 0).0.iter().all(|&byte| byte == b'7'));
    drop(held);
    let status: Status = serde_json::from_value(stat(&lab)["sandbox"].take()).unwrap();
    let log = server.stop().unwrap();
    lab.is_clean();
    // The driver takes CAP_SYS_ADMIN, and to that Linux 6.14 and later show the environment of any process in /proc, whatever
    // Landlock says (`may_access_mm`, kernel/fork.c).
    all_are_refused(&ends(&log), &status, &["call: environment"]);
    assert!(!outside.target_has_gone());
    assert!(log.contains(&format!("sandbox: {status}")), "{log}");
}
