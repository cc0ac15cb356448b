//! Another size for a disk in use.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

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
