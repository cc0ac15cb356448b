//! A server that goes away, comes back, changes, or does not answer.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use testkit::sandbox::Sandbox;

use ublkup::engine::StorageControl;

use crate::common::*;
use crate::peer::{Knobs, Mood, Peer};
use crate::{open, serve, size_bytes, stat};

/// Offers a write of a block without waiting for its end.
fn offer(driver: &mut Driver, byte: u8) {
    driver.memory.put(DATA + 4096, &[byte; 512]);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
}

/// The server hangs up, and the one in front of it has noticed: the threads of the other end as late as they like.
fn leave(lab: &Sandbox, peer: &Peer) {
    peer.leave();
    eventually("its absence is noticed", || {
        let told = stat(lab)["last_error"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        told.contains("has been away for")
    });
}

fn ended(driver: &mut Driver) -> u8 {
    assert_eq!(driver.vrings[0].wait(&driver.memory), (0, 1));
    driver.memory.byte(DATA + 16)
}

#[test]
fn what_a_server_had_when_it_hung_up_is_submitted_again() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    for (round, mood) in (1..).zip([Mood::Hold, Mood::DoWithoutAnswer, Mood::Hold]) {
        let before = peer.count(T_OUT);
        peer.set_mood(mood);
        offer(&mut driver, round);
        eventually("it has the request", || peer.count(T_OUT) == before + 1);
        assert_eq!(driver.vrings[0].reap(&driver.memory), None);
        peer.set_mood(Mood::Serve);
        peer.hang_up();
        assert_eq!(ended(&mut driver), OK);
        assert_eq!(peer.count(T_OUT), before + 2);
        assert_eq!(driver.read(0, 512), (OK, vec![round; 512]));
    }
    drop(driver);
    let log = server.stop().unwrap();
    // Losses of one kind are told now and then, and their ends likewise.
    let told = log.matches("1 requests wait until it is back").count();
    assert!(told > 0, "{log}");
    assert_eq!(log.matches("the server is back").count(), told, "{log}");
    lab.is_clean();
}

#[test]
fn requests_wait_while_there_is_no_server_and_clients_come_and_go() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    leave(&lab, &peer);
    offer(&mut driver, 7);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(driver.vrings[0].reap(&driver.memory), None);
    peer.come_back();
    assert_eq!(ended(&mut driver), OK);
    // A client that comes meanwhile brings memory that the next server is to map.
    driver.frontend.get_vring_base(0).unwrap();
    drop(driver);
    leave(&lab, &peer);
    use vhost::VhostBackend;
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    driver.prepare(T_IN, 0, &[(512, WRITE)]);
    std::thread::sleep(Duration::from_millis(100));
    peer.come_back();
    assert_eq!(driver.vrings[0].wait(&driver.memory).0, 0);
    assert_eq!(driver.memory.get(DATA + 4096, 512), [7; 512]);
    drop(driver);
    let log = server.stop().unwrap();
    // Once for each absence, however often it was tried.
    assert!(log.matches("cannot").count() <= 4, "{log}");
    lab.is_clean();
}

#[test]
fn a_disk_that_comes_back_smaller_is_waited_for_and_a_larger_one_is_a_resize() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    leave(&lab, &peer);
    peer.knobs().data.truncate(2 << 20);
    offer(&mut driver, 3);
    peer.come_back();
    eventually("it is told", || {
        server.log().contains("what is behind its end is missing")
    });
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(driver.vrings[0].reap(&driver.memory), None);
    peer.knobs().data.resize(8 << 20, 0);
    assert_eq!(ended(&mut driver), OK);
    eventually("the disk has grown", || size_bytes(&lab) == 8 << 20);
    assert_eq!(driver.write((8 << 11) - 1, &[1; 512]), OK);
    drop(driver);
    let log = server.stop().unwrap();
    assert_eq!(
        log.matches("what is behind its end is missing").count(),
        1,
        "{log}"
    );
    lab.is_clean();
}

#[test]
fn the_size_of_a_disk_is_its_server_s() {
    let behind = sandbox();
    let image = behind.image("disk.img", 4 << 20);
    let spec = format!("p=file:{}", image.display());
    let other = behind.serve(&["--ublk", "no", &spec]);
    let lab = sandbox();
    let server = serve(&lab, &behind.path("run/exports/p/vhost-user-blk"));
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    // It tells of it (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG).
    behind.ok(&["resize", "p", "6M"]);
    eventually("the disk has grown", || size_bytes(&lab) == 6 << 20);
    assert_eq!(driver.write((6 << 11) - 1, &[1; 512]), OK);
    lab.fails(
        &["resize", "d", "16M"],
        1,
        &["its size is changed at its server"],
    );
    assert_eq!(size_bytes(&lab), 6 << 20);
    drop(driver);
    server.stop().unwrap();
    other.stop().unwrap();
    // One that does not tell is asked.
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    peer.knobs().data.resize(8 << 20, 0);
    assert!(lab.ok(&["resize", "d"]).contains("8M"));
    assert_eq!(size_bytes(&lab), 8 << 20);
    server.stop().unwrap();
    lab.is_clean();
    behind.is_clean();
}

#[test]
fn while_a_server_does_not_answer_other_exports_are_served() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let spec = format!("d=vhost-user:{}", peer.socket().display());
    let server = lab.serve(&["--ublk", "no", &spec, "m=mem:1M"]);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    peer.set_mood(Mood::Hold);
    offer(&mut driver, 1);
    peer.wait_held(1);
    let mut other = Driver::running(lab.connect("m"), VERSION_1 | PROTOCOL);
    for _ in 0..1000 {
        assert_eq!(other.write(0, &[3; 512]), OK);
    }
    assert!(lab.ok(&["stat", "d"]).contains("running"));
    assert_eq!(driver.vrings[0].reap(&driver.memory), None);
    peer.set_mood(Mood::Serve);
    peer.release();
    assert_eq!(ended(&mut driver), OK);
    drop((driver, other));
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_thread_sleeps_while_it_waits_for_the_other_server() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    let sleeps = || {
        let rounds = || stat(&lab)["vhost"]["counters"]["enters"].as_u64().unwrap();
        eventually("the thread makes no system calls", || {
            let before = rounds();
            std::thread::sleep(Duration::from_millis(300));
            rounds() == before
        });
    };
    assert_eq!(driver.write(0, &[1; 512]), OK);
    sleeps();
    peer.set_mood(Mood::Hold);
    offer(&mut driver, 2);
    peer.wait_held(1);
    sleeps();
    peer.set_mood(Mood::Serve);
    // It is woken by this server, and by the next.
    peer.release();
    assert_eq!(ended(&mut driver), OK);
    sleeps();
    peer.set_mood(Mood::Hold);
    offer(&mut driver, 3);
    peer.wait_held(1);
    peer.set_mood(Mood::Serve);
    peer.hang_up();
    assert_eq!(ended(&mut driver), OK);
    sleeps();
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_server_that_is_stopped_holds_up_its_own_disk_alone() {
    let (behind, lab) = (sandbox(), sandbox());
    let image = behind.image("disk.img", 4 << 20);
    let spec = format!("p=file:{}", image.display());
    let other = behind.serve(&["--ublk", "no", &spec]);
    let socket = behind.path("run/exports/p/vhost-user-blk");
    let spec = format!("d=vhost-user:{}", socket.display());
    let server = lab.serve(&["--ublk", "no", &spec, "m=mem:1M"]);
    let process = Pid::from_raw(other.pid().cast_signed()).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    // A client that comes meanwhile gets through the handshake, although its memory finds no taker.
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    offer(&mut driver, 5);
    let mut memory = Driver::running(lab.connect("m"), VERSION_1 | PROTOCOL);
    for _ in 0..1000 {
        assert_eq!(memory.write(0, &[3; 512]), OK);
    }
    assert_eq!(driver.vrings[0].reap(&driver.memory), None);
    kill_process(process, Signal::CONT).unwrap();
    assert_eq!(ended(&mut driver), OK);
    assert_eq!(driver.read(0, 512), (OK, vec![5; 512]));
    drop((driver, memory));
    let log = server.stop().unwrap();
    assert!(!log.contains("requests wait until it is back"), "{log}");
    other.stop().unwrap();
    lab.is_clean();
    behind.is_clean();
}

#[test]
fn a_stop_says_what_it_waits_for_and_a_second_signal_ends_it() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL | EVENT_IDX);
    peer.set_mood(Mood::Hold);
    offer(&mut driver, 1);
    peer.wait_held(1);
    let process = Pid::from_raw(server.pid().cast_signed()).unwrap();
    kill_process(process, Signal::TERM).unwrap();
    eventually("it says what it waits for", || {
        (server.log()).contains("still waiting for the requests of its vhost-user clients")
    });
    let (status, log) = server.end_by(Signal::TERM).unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
}

#[test]
fn a_stop_does_not_wait_for_a_server_that_is_away() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL | EVENT_IDX);
    leave(&lab, &peer);
    offer(&mut driver, 1);
    driver.vrings[0].wait_taken(&driver.memory);
    let log = server.stop().unwrap();
    assert!(!log.contains("still waiting"), "{log}");
    // It has no answer: the client submits it to the next server.
    assert_eq!(driver.vrings[0].reap(&driver.memory), None);
    assert_eq!(peer.count(T_OUT), 0);
    lab.is_clean();
}

#[test]
fn a_flush_fails_when_what_it_covers_went_away_with_the_server() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    let flush = |driver: &mut Driver| driver.request(T_FLUSH, 0, &[]).0;
    // All is flushed: nothing can be lost.
    assert_eq!(driver.write(0, &[1; 512]), OK);
    assert_eq!(flush(&mut driver), OK);
    leave(&lab, &peer);
    peer.come_back();
    assert_eq!(flush(&mut driver), OK);
    // It was answered, and no flush came after it.
    assert_eq!(driver.write(0, &[2; 512]), OK);
    leave(&lab, &peer);
    peer.come_back();
    assert_eq!(driver.read(0, 512).0, OK);
    assert_eq!(flush(&mut driver), IOERR);
    assert_eq!(flush(&mut driver), OK);
    // The same with a flush in flight.
    assert_eq!(driver.write(0, &[3; 512]), OK);
    peer.set_mood(Mood::Hold);
    driver.prepare(T_FLUSH, 0, &[]);
    peer.wait_held(1);
    peer.set_mood(Mood::Serve);
    peer.hang_up();
    assert_eq!(ended(&mut driver), IOERR);
    assert_eq!(flush(&mut driver), OK);
    drop(driver);
    let log = server.stop().unwrap();
    let times = log.matches("writes were answered and not flushed").count();
    assert_eq!(times, 2, "{log}");
    lab.is_clean();
}

#[test]
fn without_a_write_back_cache_a_server_that_goes_away_fails_no_flush() {
    let lab = sandbox();
    let features = Knobs::default().features & !FLUSH;
    let knobs = Knobs {
        features,
        ..Knobs::default()
    };
    let peer = Peer::start(&lab.path("peer.sock"), knobs);
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL & !(FLUSH | CONFIG_WCE));
    assert_eq!(driver.write(0, &[1; 512]), OK);
    leave(&lab, &peer);
    peer.come_back();
    assert_eq!(driver.write(0, &[2; 512]), OK);
    drop(driver);
    let log = server.stop().unwrap();
    assert!(!log.contains("not flushed"), "{log}");
    lab.is_clean();
}

#[test]
fn what_waits_for_a_client_that_is_gone_is_never_submitted() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL | EVENT_IDX);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    leave(&lab, &peer);
    offer(&mut driver, 9);
    driver.vrings[0].wait_taken(&driver.memory);
    drop(driver);
    eventually("its departure is noticed", || {
        !lab.ok(&["stat", "d", "--json"]).contains("\"vrings\": 1")
    });
    peer.come_back();
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.read(0, 512), (OK, vec![1; 512]));
    assert_eq!(peer.count(T_OUT), 1);
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_disk_that_has_ended_leaves_the_server_to_the_next() {
    let scratch = tempfile::tempdir().unwrap();
    let peer = Peer::start(&scratch.path().join("peer.sock"), Knobs::default());
    let disk = open(peer.socket());
    // What the export does when its door has given up: threads have the disk still.
    disk.end();
    let next = Fixture::new(open(peer.socket()), 1);
    let mut driver = Driver::running(next.connect(), USUAL);
    assert_eq!(driver.write(0, &[2; 512]), OK);
    for connections in 3..10 {
        // The disk that has ended does not come back in between.
        peer.hang_up();
        eventually("the next disk is back", || {
            peer.knobs().connections == connections
        });
        assert_eq!(driver.read(0, 512), (OK, vec![2; 512]));
    }
    assert_eq!(peer.knobs().connections, 9);
    drop(disk);
}
