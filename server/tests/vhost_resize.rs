//! A disk that gets another size while clients have it.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::sandbox;
use common::*;
use ublkup::request::Capacity;
use ublkup::storage::Null;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const OLD_BYTES: u64 = 1 << 20;
const NEW_BYTES: u64 = 1 << 21;

/// A fixture and the size of its disk.
fn fixture() -> (Fixture, Capacity) {
    let limits = limits(OLD_BYTES);
    let capacity = limits.capacity.clone();
    (Fixture::new(Null::new(limits), 1), capacity)
}

fn told_sectors(driver: &mut Driver) -> u64 {
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, config) = driver.frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
    u64::from_le_bytes(config.try_into().unwrap())
}

/// Gives the client a channel, and waits until the session has it.
fn channel(driver: &mut Driver) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    driver.frontend.set_backend_request_fd(&theirs).unwrap();
    told_sectors(driver);
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours
}

#[test]
fn a_client_is_told_of_another_size_and_may_use_it() {
    let (fixture, capacity) = fixture();
    let mut driver = Driver::running(fixture.connect(), USUAL);
    let mut messages = channel(&mut driver);
    let behind = OLD_BYTES / 512;
    assert_eq!(told_sectors(&mut driver), behind);
    assert_eq!(driver.read(behind, 512).0, IOERR);
    capacity.set(NEW_BYTES);
    assert_eq!(fixture.door.tell_new_size(), 0);
    let mut message = [0; 12];
    messages.read_exact(&mut message).unwrap();
    // CONFIG_CHANGE_MSG, version 1, nothing behind.
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(told_sectors(&mut driver), NEW_BYTES / 512);
    assert_eq!(driver.read(behind, 512).0, OK);
    assert_eq!(driver.read(NEW_BYTES / 512, 512).0, IOERR);
    // A smaller one holds from the next request on.
    capacity.set(OLD_BYTES);
    assert_eq!(driver.read(behind, 512).0, IOERR);
}

#[test]
fn every_client_of_a_read_only_disk_is_told() {
    let mut limits = limits(OLD_BYTES);
    limits.read_only = true;
    let capacity = limits.capacity.clone();
    let fixture = Fixture::new(Null::new(limits), 1);
    let mut clients: Vec<_> = (0..4)
        .map(|_| Driver::running(fixture.connect(), VERSION_1 | PROTOCOL))
        .map(|mut driver| (channel(&mut driver), driver))
        .collect();
    capacity.set(NEW_BYTES);
    assert_eq!(fixture.door.tell_new_size(), 0);
    for (messages, driver) in &mut clients {
        messages.read_exact(&mut [0; 12]).unwrap();
        assert_eq!(told_sectors(driver), NEW_BYTES / 512);
        assert_eq!(driver.read(OLD_BYTES / 512, 512).0, OK);
    }
}

#[test]
fn clients_that_cannot_be_told_or_do_not_read_disturb_nobody() {
    let (fixture, _) = fixture();
    let mut deaf = Driver::running(fixture.connect(), USUAL);
    assert_eq!(fixture.door.tell_new_size(), 1, "it has no channel");
    let full = channel(&mut deaf);
    let mut sent = 0;
    while fixture.door.tell_new_size() == 0 {
        sent += 1;
        assert!(sent < 1_000_000, "somebody reads");
    }
    assert!(sent > 0);
    // The channel is replaced by the next one, and a broken one breaks nothing else.
    let mut again = channel(&mut deaf);
    drop(full);
    assert_eq!(fixture.door.tell_new_size(), 0);
    again.read_exact(&mut [0; 12]).unwrap();
    drop(again);
    // A test beside this one may be starting a program, which has the channel until it runs.
    eventually("the channel is gone", || fixture.door.tell_new_size() == 1);
    assert_eq!(deaf.read(0, 512).0, OK);
}

#[test]
fn a_channel_that_is_no_stream_socket_is_refused() {
    let (fixture, _) = fixture();
    let mut driver = Driver::connect(fixture.connect(), USUAL);
    let file = tempfile::tempfile().unwrap();
    assert!(driver.frontend.set_backend_request_fd(&file).is_err());
    assert!(file.as_raw_fd() >= 0);
    fixture.wait_empty();
    assert_eq!(fixture.door.stop(Duration::from_secs(5)), 0);
}

#[test]
fn a_file_that_another_servers_guest_has_keeps_its_size() {
    const MORE_BYTES: u64 = 3 << 20;
    let lab = sandbox();
    let image = lab.image("disk.img", OLD_BYTES);
    let serve = |name: &str| {
        let spec = format!("{name}=file:{}", image.display());
        lab.serve(&["--ublk", "no", "--migration", &spec])
    };
    let len_bytes = || fs::metadata(&image).unwrap().len();
    let size_bytes = |name: &str| -> u64 {
        let stat = lab.ok(&["stat", name, "--json"]);
        let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
        stat["size_bytes"].as_u64().unwrap()
    };
    let (idle, owner) = (serve("idle"), serve("owner"));
    let socket = lab.path("run/exports/owner/vhost-user-blk");
    let mut guest = Driver::running(UnixStream::connect(socket).unwrap(), USUAL);
    for size in [&["2M"][..], &["512K", "--shrink"]] {
        let resize = [&["resize", "idle"], size].concat();
        lab.fails(
            &resize,
            1,
            &["disk.img is in use", "give it another size there"],
        );
        assert_eq!(
            (len_bytes(), size_bytes("idle")),
            (OLD_BYTES, OLD_BYTES),
            "{size:?}"
        );
    }
    assert_eq!(guest.write(OLD_BYTES / 512 - 1, &[7; 512]), OK);
    // Its own server may, and then the other one may look.
    lab.ok(&["resize", "owner", "2M"]);
    assert_eq!(guest.write(NEW_BYTES / 512 - 1, &[7; 512]), OK);
    assert!(lab.ok(&["resize", "idle"]).contains("2M, was 1M"));
    // Nobody's file is anybody's.
    guest.frontend.get_vring_base(0).unwrap();
    drop(guest);
    eventually("the guest is gone", || {
        lab.ok(&["list"])
            .lines()
            .any(|line| line.starts_with("owner") && line.contains("free"))
    });
    lab.ok(&["resize", "idle", "3M"]);
    assert_eq!((len_bytes(), size_bytes("idle")), (MORE_BYTES, MORE_BYTES));
    // And free for a guest again.
    let socket = lab.path("run/exports/owner/vhost-user-blk");
    let mut guest = Driver::running(UnixStream::connect(socket).unwrap(), USUAL);
    assert_eq!(guest.read(NEW_BYTES / 512 - 1, 512), (OK, vec![7; 512]));
    drop(guest);
    idle.stop().unwrap();
    owner.stop().unwrap();
    lab.is_clean();
}
