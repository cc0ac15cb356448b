//! Disks up to the largest there can be.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use common::*;
use ublkup::engine::{Storage, StorageControl};
use ublkup::request::MAX_DISK_BYTES;
use ublkup::storage::{CacheMode, File, Null};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

/// Writes, zeroes and discards at the end of the disk, and reads it back.
fn use_the_end(disk: impl Storage, stores: bool) {
    let capacity_bytes = disk.limits().capacity.bytes();
    let fixture = Fixture::new(disk, 1);
    let mut driver = Driver::running(
        fixture.connect(),
        VERSION_1 | PROTOCOL | DISCARD | WRITE_ZEROES,
    );
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, capacity) = driver.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    assert_eq!(capacity, (capacity_bytes / 512).to_le_bytes());
    let last = capacity_bytes / 512 - 8;
    assert_eq!(driver.write(last, &[7; 4096]), OK);
    if stores {
        assert_eq!(driver.read(last, 4096), (OK, vec![7; 4096]));
        assert_eq!(driver.read(0, 4096), (OK, vec![0; 4096]));
    }
    assert_eq!(driver.write(last + 1, &[7; 4096]), IOERR);
    assert_eq!(driver.write(u64::MAX, &[7; 4096]), IOERR);
    assert_eq!(driver.segment(T_WRITE_ZEROES, last - 1024, 1032, 0), OK);
    if stores {
        assert_eq!(driver.read(last, 4096), (OK, vec![0; 4096]));
    }
    // 2 TiB less a sector is as much as a request can name.
    let much = u32::MAX - 7;
    assert_eq!(
        driver.segment(T_DISCARD, last + 8 - u64::from(much), much, 0),
        OK
    );
    assert_eq!(driver.segment(T_DISCARD, last, 9, 0), IOERR);
}

#[test]
fn the_largest_null_disk_is_served() {
    use_the_end(Null::new(limits(MAX_DISK_BYTES)), false);
}

/// The file systems decide how large a file may be: 16 TiB on ext4, as much as 63 bits reach on tmpfs and XFS.
#[test]
fn files_are_served_up_to_their_largest_size() {
    let sizes = [
        MAX_DISK_BYTES,
        MAX_DISK_BYTES - (1 << 20),
        4 << 50,
        15 << 40,
    ];
    for (folder, least_bytes) in [
        ("/dev/shm", MAX_DISK_BYTES),
        (env!("CARGO_TARGET_TMPDIR"), 15 << 40),
    ] {
        for cache in [CacheMode::Auto, CacheMode::Buffered] {
            let dir = tempfile::tempdir_in(folder).unwrap();
            let path = dir.path().join("disk.img");
            let file = std::fs::File::create(&path).unwrap();
            let possible = sizes.into_iter().find(|size| file.set_len(*size).is_ok());
            let len_bytes = possible.unwrap();
            assert!(len_bytes >= least_bytes, "{folder}: {len_bytes}");
            let disk = File::open(file_options(path, cache)).unwrap();
            assert_eq!(disk.limits().capacity.bytes(), len_bytes);
            use_the_end(disk, true);
        }
    }
}

#[test]
fn a_file_that_ends_behind_the_largest_disk_is_served_to_there_or_refused() {
    let lab = sandbox();
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = shm.path().join("disk.img");
    // 2^63 - 1 bytes: not a whole number of blocks.
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(MAX_DISK_BYTES + 4095).unwrap();
    let spec = format!("d=file:{}", path.display());
    lab.serve_fails(
        &["--ublk", "no", &spec],
        1,
        &["is larger than 9223372036854771712 bytes"],
    );
    let server = lab.serve(&["--ublk", "no", &format!("{spec},block-size=4096")]);
    assert!(
        lab.ok(&["stat", "d", "--json"])
            .contains("9223372036854771712")
    );
    server.stop().unwrap();
    lab.serve_fails(
        &["--ublk", "no", "null:8E"],
        2,
        &["larger than 9223372036854771712 bytes"],
    );
}
