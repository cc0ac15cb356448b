//! What a server tells of the files that it serves: of their format, their options and their errors.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/exports.rs"]
mod exports;

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use common::*;
use exports::stat;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vhost::VhostBackend;

#[test]
fn an_image_of_another_format_is_warned_of_unless_it_is_said_to_be_raw() {
    let lab = sandbox();
    let path = lab.image("disk.img", 1 << 20);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).unwrap();
    let spec = format!("d=file:{}", path.display());
    let warning = format!("{}: it looks like a qcow2 image", path.display());
    for (more, warns) in [("", true), (",format=raw", false)] {
        let server = lab.serve(&["--ublk", "no", &format!("{spec}{more}")]);
        // Served it is anyhow, as it is.
        let mut driver = Driver::running(lab.connect("d"), USUAL);
        assert_eq!(driver.read(0, 512).1[..4], *b"QFI\xfb");
        drop(driver);
        let log = server.stop().unwrap();
        assert_eq!(log.contains(&warning), warns, "{more}: {log}");
        assert_eq!(log.contains("format=raw"), warns, "{more}: {log}");
    }
    lab.is_clean();
}

#[test]
fn discards_that_are_off_are_not_offered_and_zeroes_keep_their_space() {
    let lab = sandbox();
    let path = lab.path("disk.img");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    std::fs::File::open(&path).unwrap().sync_all().unwrap();
    let allocated = || std::fs::metadata(&path).unwrap().blocks();
    let before = allocated();
    for (more, offered) in [(",discard=off", false), ("", true)] {
        let spec = format!("d=file:{}{more}", path.display());
        let server = lab.serve(&["--ublk", "no", &spec]);
        // A client that discards all the same.
        let features = if offered { USUAL } else { USUAL & !DISCARD };
        let mut driver = Driver::running(lab.connect("d"), features);
        assert_eq!(
            driver.frontend.get_features().unwrap() & DISCARD != 0,
            offered
        );
        let discarded = driver.segment(T_DISCARD, 0, 1024, 0);
        assert_eq!(discarded, if offered { OK } else { UNSUPP });
        assert_eq!(allocated() == before, !offered, "{more}");
        // With the flag that lets it release space.
        assert_eq!(driver.segment(T_WRITE_ZEROES, 1024, 1024, 1), OK);
        assert_eq!(driver.read(1024, 512), (OK, vec![0; 512]));
        assert_eq!(allocated() == before, !offered, "{more}");
        drop(driver);
        server.stop().unwrap();
    }
    lab.is_clean();
}

#[test]
fn an_error_of_a_file_in_memory_is_in_the_log_and_in_stat() {
    let lab = sandbox();
    let file = memfd_create("disk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 1 << 20).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let server = lab.serve(&["--ublk", "no", &format!("d=file:{path}")]);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(8, &[7; 512]), OK);
    assert!(stat(&lab, "d")["last_error"].is_null());
    fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
    assert_eq!(driver.write(16, &[8; 512]), IOERR);
    assert_eq!(driver.read(8, 512), (OK, vec![7; 512]));
    drop(driver);
    let told = stat(&lab, "d")["last_error"].as_str().unwrap().to_owned();
    for part in ["write", "8192", "512", "Operation not permitted"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let log = server.stop().unwrap();
    assert!(log.contains(&told), "{told}\n{log}");
    lab.is_clean();
}
