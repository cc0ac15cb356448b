//! A server that breaks the protocol is disconnected; its clients notice a pause.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ublkup::engine::{MappedFile, StorageControl};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

use crate::common::*;
use crate::peer::{Knobs, Mood, Peer};
use crate::{open, serve};

#[test]
fn a_server_that_answers_wrongly_is_disconnected_and_its_requests_wait() {
    for (mood, told) in [
        (Mood::WrongHead, "which it did not have"),
        (Mood::Twice, "more than it was given"),
        (Mood::WrongIndex, "more than it was given"),
        (Mood::WrongStatus, "with status 0x7"),
    ] {
        let lab = sandbox();
        let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
        let server = serve(&lab, peer.socket());
        let mut driver = Driver::running(lab.connect("d"), USUAL);
        assert_eq!(driver.write(0, &[1; 512]), OK);
        peer.set_mood(mood);
        driver.memory.put(DATA + 4096, &[2; 512]);
        driver.prepare(T_OUT, 0, &[(512, 0)]);
        eventually("it is told", || {
            let log = server.log();
            log.contains("the server broke the protocol") && log.contains(told)
        });
        peer.set_mood(Mood::Serve);
        assert_eq!(driver.vrings[0].wait(&driver.memory), (0, 1));
        assert_eq!(driver.read(0, 512), (OK, vec![2; 512]));
        drop(driver);
        let log = server.stop().unwrap();
        let times = log.matches("broke the protocol").count();
        assert!(times <= 2, "{mood:?}: {times}\n{log}");
        assert!(!log.contains("panicked"), "{log}");
        lab.is_clean();
    }
}

#[test]
fn a_server_that_takes_long_to_map_memory_is_not_taken_for_dead() {
    let scratch = tempfile::tempdir().unwrap();
    let knobs = Knobs {
        // Longer than the limit of other messages.
        mapping_takes: Some(Duration::from_secs(11)),
        ..Knobs::default()
    };
    let peer = Peer::start(&scratch.path().join("peer.sock"), knobs);
    let fixture = Fixture::new(open(peer.socket()), 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    assert_eq!(peer.knobs().connections, 1);
}

#[test]
fn a_region_that_the_server_refuses_is_copied_and_it_is_not_asked_again() {
    let slots = Knobs::default().protocol;
    for protocol in [slots, slots - Protocol::CONFIGURE_MEM_SLOTS] {
        let scratch = tempfile::tempdir().unwrap();
        let knobs = Knobs {
            // Rings and the memory for copies.
            max_regions: 2,
            protocol,
            ..Knobs::default()
        };
        let peer = Peer::start(&scratch.path().join("peer.sock"), knobs);
        let disk = open(peer.socket());
        let copies = disk.copies();
        let fixture = Fixture::new(disk, 1);
        let mut driver = Driver::running(fixture.connect(), USUAL);
        for round in 1..=3 {
            assert_eq!(driver.write(0, &[round; 512]), OK);
            assert_eq!(driver.read(0, 512), (OK, vec![round; 512]));
        }
        assert_eq!(copies.load(Ordering::Relaxed), 6);
        // This one hangs up after each refusal. Others stay.
        assert_eq!(peer.knobs().connections, 2);
        // The next connection, which has the same memory to map.
        peer.hang_up();
        eventually("it has connected again", || peer.knobs().connections == 3);
        assert_eq!(driver.read(0, 512), (OK, vec![3; 512]));
        assert_eq!(peer.knobs().connections, 3);
    }
}

#[test]
fn a_server_that_changes_its_size_all_the_time_is_followed_once_at_a_time() {
    let scratch = tempfile::tempdir().unwrap();
    let peer = Peer::start(&scratch.path().join("peer.sock"), Knobs::default());
    let disk = open(peer.socket());
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    disk.on_change(Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    }));
    let change = |connections: usize| {
        peer.knobs().data.resize((4 + connections) << 20, 0);
        peer.hang_up();
        eventually("it has connected again", || {
            peer.knobs().connections == connections
        });
    };
    (2..6).for_each(change);
    eventually("it is told", || told.load(Ordering::Relaxed) > 0);
    assert_eq!(disk.grow(None).unwrap(), 9 << 20);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    // What is asked for is not told too.
    peer.knobs().data.resize(16 << 20, 0);
    assert_eq!(disk.grow(None).unwrap(), 16 << 20);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    change(6);
    eventually("it is told again", || told.load(Ordering::Relaxed) == 2);
    // The one who asked for another size does not follow.
    peer.knobs().data.resize(32 << 20, 0);
    disk.grow(Some(1 << 30)).unwrap_err();
    assert_eq!(told.load(Ordering::Relaxed), 3);
}

#[test]
fn a_memory_table_that_requests_in_flight_have_kept_is_changed_after_them() {
    let scratch = tempfile::tempdir().unwrap();
    let knobs = Knobs {
        protocol: Knobs::default().protocol - Protocol::CONFIGURE_MEM_SLOTS,
        ..Knobs::default()
    };
    let peer = Peer::start(&scratch.path().join("peer.sock"), knobs);
    let disk = open(peer.socket());
    let sharing = disk.sharing().unwrap();
    let fixture = Fixture::new(disk, 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    let before = peer.knobs().regions;
    let held = |driver: &mut Driver, act: &mut dyn FnMut()| {
        peer.set_mood(Mood::Hold);
        driver.prepare(T_OUT, 0, &[(512, 0)]);
        peer.wait_held(1);
        act();
        // Longer than requests in flight are waited for.
        std::thread::sleep(Duration::from_secs(6));
        peer.set_mood(Mood::Serve);
        peer.release();
        assert_eq!(driver.vrings[0].wait(&driver.memory).0, 0);
    };
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut shared = None;
    held(&mut driver, &mut || {
        let memory = MappedFile {
            file: file.as_fd(),
            offset_bytes: 0,
            address: 0x10000,
            len_bytes: 1 << 20,
        };
        shared = Some(sharing.share(memory).unwrap());
    });
    eventually("the server has it", || peer.knobs().regions == before + 1);
    held(&mut driver, &mut || drop(shared.take()));
    eventually("the server lets go of it", || {
        peer.knobs().regions == before
    });
    assert_eq!(peer.knobs().connections, 1);
}
