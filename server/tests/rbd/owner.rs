//! Which of several servers has the image.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use testkit::sandbox::Sandbox;
use testkit::server::Server;
use vhost::VhostBackend;

use crate::common::*;
use crate::{ARGS, Image, PLAIN, connect, rbd, serve, size_bytes};

#[test]
#[ignore = "needs a Ceph cluster"]
fn an_image_has_one_writer_and_any_number_of_readers() {
    let image = Image::new("claimed", "64M");
    let (lab, other) = (sandbox(), sandbox());
    let server = serve(&lab, &image);
    let spec = image.spec();
    let second = [&ARGS[..], &[&spec]].concat();
    other.serve_fails(
        &second,
        1,
        &[
            "rbd:rbd/claimed is in use by client ",
            "stop that one first",
        ],
    );
    let reader = other.serve(&[&second[..], &["--read-only"]].concat());
    assert_eq!(connect(&lab).write(0, &[1; 512]), OK);
    assert_eq!(connect(&other).read(0, 512), (OK, vec![1; 512]));
    reader.stop().unwrap();
    server.stop().unwrap();
    // The lock went with the server.
    let next = serve(&other, &image);
    next.stop().unwrap();
    lab.is_clean();
    other.is_clean();
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_server_whose_lock_is_taken_away_ends_and_writes_no_more() {
    let image = Image::new("fenced", "64M");
    let lab = sandbox();
    let server = serve(&lab, &image);
    let mut driver = connect(&lab);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    let locks: serde_json::Value =
        serde_json::from_str(&rbd(&["lock", "ls", "--format", "json", &image.0])).unwrap();
    let text = |key: &str| locks[0][key].as_str().unwrap().to_owned();
    rbd(&["lock", "rm", &image.0, &text("id"), &text("locker")]);
    assert_eq!(driver.write(0, &[2; 512]), IOERR);
    let (status, log) = server.wait().unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("another client of the cluster has taken rbd:rbd/fenced"),
        "{log}"
    );
    lab.is_clean();
    let server = serve(&lab, &image);
    assert_eq!(connect(&lab).read(0, 512), (OK, vec![1; 512]));
    server.stop().unwrap();
}

/// Serves an image as soon as that is possible.
fn serve_when_free(lab: &Sandbox, image: &Image) -> Server {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let mut command = lab.command(&[&["serve"], &ARGS[..], &[&image.spec()]].concat());
        let limit = Duration::from_secs(60);
        match Server::launch(&mut command, limit).unwrap().ready() {
            Ok(server) => return server,
            Err(error) => {
                let why = format!("{error:#}");
                assert!(why.contains("is in use by client"), "{why}");
                assert!(Instant::now() < deadline, "{why}");
            }
        }
    }
}

/// Its host does not answer, and comes back when another one has the image.
#[test]
#[ignore = "needs a Ceph cluster"]
fn a_write_of_a_server_that_the_cluster_has_lost_changes_nothing_after_its_successors() {
    let image = Image::new("lost", "64M");
    let (lab, other) = (sandbox(), sandbox());
    let server = serve(&lab, &image);
    let mut driver = connect(&lab);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    let process = Pid::from_raw(server.pid().cast_signed()).unwrap();
    testkit::proc::stop(server.pid()).unwrap();
    driver.memory.put(DATA + 4096, &[2; 512]);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
    // The cluster forgets the client (osd_client_watch_timeout).
    let successor = serve_when_free(&other, &image);
    let mut next = connect(&other);
    assert_eq!(next.write(0, &[3; 512]), OK);
    kill_process(process, Signal::CONT).unwrap();
    driver.vrings[0].wait(&driver.memory);
    assert_eq!(next.read(0, 512), (OK, vec![3; 512]), "a stale write");
    let (status, log) = server.wait().unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("another client of the cluster has taken rbd:rbd/lost"),
        "{log}"
    );
    successor.stop().unwrap();
}

/// Each server has the image while its guest runs.
#[test]
#[ignore = "needs a Ceph cluster"]
fn a_guest_moves_between_two_servers_of_an_image_and_back() {
    let image = Image::new("moved", "64M");
    let labs = [sandbox(), sandbox()];
    let spec = image.spec();
    let args = [&ARGS[..], &["--migration", &spec]].concat();
    let servers = labs.each_ref().map(|lab| lab.serve(&args));
    // With it the server says what it has taken.
    let features = PLAIN | EVENT_IDX;
    let mut source = Driver::running(labs[0].connect("d"), features);
    for round in 1..=6_u8 {
        let sector = u64::from(round) * 8;
        assert_eq!(source.write(sector, &[round; 4096]), OK);
        // Under way when the guest stops.
        source.memory.put(DATA + 4096, &[round; 4096]);
        source.prepare(T_OUT, 8 * 100, &[(4096, 0)]);
        // What it has not, the target finds in the ring.
        source.vrings[0].wait_taken(&source.memory);
        source.begin_migration();
        let mut target = Driver::connect(labs[usize::from(round % 2)].connect("d"), features);
        source.frontend.get_vring_base(0).unwrap();
        target.add_vring(128);
        assert_eq!(target.read(8 * 100, 4096), (OK, vec![round; 4096]));
        for earlier in 1..=round {
            let sector = u64::from(earlier) * 8;
            assert_eq!(target.read(sector, 4096), (OK, vec![earlier; 4096]));
        }
        if round == 1 {
            // The source has nothing that it could write with. It waits for that before it says so.
            let next = source.vrings[0].next_available;
            assert!(attempt(|| source.start(0, next)).is_err());
        }
        source = target;
    }
    drop(source);
    for (server, lab) in servers.into_iter().zip(&labs) {
        server.stop().unwrap();
        lab.is_clean();
    }
}

/// Two servers have the image, each for a guest that may come.
#[test]
#[ignore = "needs a Ceph cluster"]
fn a_resize_where_no_guest_runs_leaves_the_image_to_other_servers() {
    let image = Image::new("idle", "64M");
    let labs = [sandbox(), sandbox()];
    let spec = image.spec();
    let args = [&ARGS[..], &["--migration", &spec]].concat();
    let servers = labs.each_ref().map(|lab| lab.serve(&args));
    let leave = |guest: Driver| guest.frontend.get_vring_base(0).unwrap();
    // Of the other server, which the cluster tells.
    let grows = |lab: &Sandbox, mebibytes: u64| {
        eventually("the disk has grown", || size_bytes(lab) == mebibytes << 20);
    };
    labs[0].ok(&["resize", "d", "80M"]);
    assert_eq!(rbd(&["lock", "ls", &image.0]), "", "it is locked");
    grows(&labs[1], 80);
    // The library knows by now that it does not take the lock by itself.
    for lab in [1, 0, 1] {
        let mut guest = connect(&labs[lab]);
        assert_eq!(guest.write((80 << 11) - 1, &[1; 512]), OK);
        leave(guest);
    }
    labs[0].ok(&["resize", "d", "96M"]);
    assert_eq!(rbd(&["lock", "ls", &image.0]), "", "it is locked");
    grows(&labs[1], 96);
    let mut guest = connect(&labs[1]);
    assert_eq!(guest.write((96 << 11) - 1, &[2; 512]), OK);
    // The server of the guest does it.
    labs[0].ok(&["resize", "d", "112M"]);
    grows(&labs[1], 112);
    assert_eq!(guest.write((112 << 11) - 1, &[3; 512]), OK);
    leave(guest);
    let mut guest = connect(&labs[0]);
    assert_eq!(guest.read((112 << 11) - 1, 512), (OK, vec![3; 512]));
    leave(guest);
    for (server, lab) in servers.into_iter().zip(&labs) {
        server.stop().unwrap();
        lab.is_clean();
    }
}
