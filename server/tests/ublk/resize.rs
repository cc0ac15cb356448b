//! Another size for a disk in use.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use testkit::ublk_control::stop_device;
use testkit::wait::eventually;

use crate::common::sandbox;
use crate::data::{serve, stat};
use crate::{MIB, run};

fn size_of(disk: &Path) -> u64 {
    let text = run("blockdev", &["--getsize64", disk.to_str().unwrap()]).unwrap();
    text.parse().unwrap()
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_grows_while_it_is_open_and_shrinks_when_nobody_uses_it() {
    let lab = sandbox();
    let image = lab.image("disk.img", 16 * MIB);
    let spec = format!("file:{}", image.display());
    let (server, disk) = serve(&lab, "size", &spec, &[]);
    assert_eq!(size_of(&disk), 16 * MIB);
    let held = File::options().read(true).write(true).open(&disk).unwrap();
    assert!(held.write_all_at(&[7; 4096], 16 * MIB).is_err());
    // The storage first, by its owner; then by the server.
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(24 * MIB)
        .unwrap();
    assert_eq!(size_of(&disk), 16 * MIB, "nobody has asked yet");
    assert!(lab.ok(&["resize", "size"]).contains("24M, was 16M"));
    assert_eq!(size_of(&disk), 24 * MIB);
    lab.ok(&["resize", "size", "32M"]);
    assert_eq!(
        (size_of(&disk), fs::metadata(&image).unwrap().len()),
        (32 * MIB, 32 * MIB)
    );
    assert_eq!(stat(&lab, "size")["size_bytes"], 32 * MIB);
    held.write_all_at(&[7; 4096], 31 * MIB).unwrap();
    held.sync_all().unwrap();
    let mut back = [0; 4096];
    File::open(&image)
        .unwrap()
        .read_exact_at(&mut back, 31 * MIB)
        .unwrap();
    assert_eq!(back, [7; 4096]);
    // Less only for who insists, and while nobody has claimed it.
    lab.fails(&["resize", "size", "8M"], 1, &["--shrink"]);
    lab.fails(&["resize", "size", "100"], 1, &["no size"]);
    drop(held);
    lab.ok(&["resize", "size", "8M", "--shrink"]);
    assert_eq!(
        (size_of(&disk), fs::metadata(&image).unwrap().len()),
        (8 * MIB, 8 * MIB)
    );
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_that_grew_while_its_server_was_dead_goes_on_with_the_new_size() {
    let lab = sandbox();
    let image = lab.image("disk.img", 16 * MIB);
    let spec = format!("file:{}", image.display());
    let (server, disk) = serve(&lab, "grew", &spec, &[]);
    server.kill().unwrap();
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(24 * MIB)
        .unwrap();
    let (server, again) = serve(&lab, "grew", &spec, &[]);
    assert_eq!((&again, size_of(&disk)), (&disk, 24 * MIB));
    server.stop().unwrap();
    lab.is_clean();
}

/// The driver does one command at a time for each device, so one that waits for a request of the disk holds up the others.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn stat_does_not_wait_for_a_driver_that_does_not_answer() {
    let lab = sandbox();
    let (server, disk) = serve(&lab, "slow", "fault:read=delay8000@32M-48M;null:64M", &[]);
    let name = disk.file_name().unwrap().to_str().unwrap().to_owned();
    let id = name.trim_start_matches("ublkb").parse().unwrap();
    let input = format!("if={}", disk.display());
    let mut reader = Command::new("dd")
        .args([&input, "of=/dev/null", "bs=4096", "skip=8200", "count=1"])
        .args(["iflag=direct", "status=none"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let sys = Path::new("/sys/block").join(&name);
    eventually("the request is under way", || {
        let inflight = fs::read_to_string(sys.join("inflight")).unwrap();
        inflight.split_whitespace().next() == Some("1")
    });
    // Another program stops the device, which waits for the request.
    let stopper = std::thread::spawn(move || stop_device(id));
    eventually("the driver stops the device", || {
        fs::File::open(&disk).is_err()
    });
    let mut resize = Command::new(env!("CARGO_BIN_EXE_ublkup"))
        .args(["resize", "slow", "128M"])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The new size is what clients are about to be told.
    eventually("the driver is asked", || {
        stat(&lab, "slow")["size_bytes"] == 128 * MIB
    });
    for _ in 0..3 {
        assert_eq!(stat(&lab, "slow")["state"], "serving");
    }
    assert!(
        resize.try_wait().unwrap().is_none(),
        "the driver has not answered"
    );
    // Then all of it ends: the request, the device, and the server, which has no other.
    reader.wait().unwrap();
    stopper.join().unwrap().unwrap();
    assert_ne!(server.exit_code().unwrap(), Some(0));
    resize.wait().unwrap();
    lab.is_clean();
}
