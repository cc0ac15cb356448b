//! A client whose disk another one takes over: live migration, as the server sees it.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::io::Read;
use std::time::Duration;

use common::*;
use ublkup::door::ownership::OwnershipState;
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;

fn movable() -> Fixture {
    let fixture = Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 2);
    fixture.ownership.allow_moves(None);
    fixture
}

#[test]
fn the_disk_goes_to_the_client_that_waits_when_the_first_has_stopped_all_vrings() {
    let fixture = movable();
    let mut source = Driver::running(fixture.connect(), USUAL);
    source.add_vring(128);
    assert_eq!(source.write(0, &[7; 512]), OK);
    // It connects, and looks, and has no part in the disk yet.
    let mut target = Driver::connect(fixture.connect(), USUAL);
    assert_eq!(fixture.door.sessions().len(), 2);
    source.begin_migration();
    assert_eq!(source.frontend.get_vring_base(0).unwrap(), 1);
    assert_eq!(
        fixture.ownership.state(),
        OwnershipState::Upgraded,
        "one vring runs"
    );
    source.frontend.get_vring_base(1).unwrap();
    assert_eq!(fixture.ownership.state(), OwnershipState::Moving);
    target.add_vring(128);
    assert_eq!(target.read(0, 512), (OK, vec![7; 512]));
    assert_eq!(fixture.ownership.state(), OwnershipState::Upgraded);
    // The source must not write behind its back, and its end changes nothing.
    source.vrings[0].next_available = 1;
    assert!(attempt(|| source.start(0, 1)).is_err());
    drop(source);
    eventually("the source goes", || fixture.door.sessions().len() == 1);
    assert_eq!(fixture.ownership.state(), OwnershipState::Upgraded);
    assert_eq!(target.write(1, &[8; 512]), OK);
    target.frontend.get_vring_base(0).unwrap();
    drop(target);
    fixture.wait_empty();
    assert_eq!(fixture.ownership.state(), OwnershipState::Free);
}

#[test]
fn a_source_goes_on_when_nobody_took_the_disk_over() {
    let fixture = movable();
    let mut source = Driver::running(fixture.connect(), USUAL);
    assert_eq!(source.write(0, &[7; 512]), OK);
    let target = Driver::connect(fixture.connect(), USUAL);
    source.begin_migration();
    let base = source.frontend.get_vring_base(0).unwrap();
    drop(target);
    source.start(0, u16::try_from(base).unwrap());
    assert_eq!(fixture.ownership.state(), OwnershipState::Upgraded);
    assert_eq!(source.read(0, 512), (OK, vec![7; 512]));
}

#[test]
fn a_client_that_stops_without_a_migration_keeps_the_disk() {
    let fixture = movable();
    let mut guest = Driver::running(fixture.connect(), USUAL);
    let mut other = Driver::connect(fixture.connect(), USUAL);
    // It boots anew.
    guest.frontend.get_vring_base(0).unwrap();
    assert_eq!(fixture.ownership.state(), OwnershipState::Upgraded);
    assert!(attempt(|| other.add_vring(128)).is_err());
    guest.start(0, 0);
    assert_eq!(guest.read(0, 512).0, OK);
}

#[test]
fn where_clients_do_not_move_the_second_is_refused_when_it_connects() {
    let fixture = Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 1);
    let source = Driver::running(fixture.connect(), USUAL);
    source.begin_migration();
    source.frontend.get_vring_base(0).unwrap();
    assert_eq!(fixture.ownership.state(), OwnershipState::Upgraded);
    let mut refused = fixture.connect();
    refused.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0, "closed at once");
    drop(source);
    assert_eq!(fixture.door.stop(Duration::from_secs(10)), 0);
}
