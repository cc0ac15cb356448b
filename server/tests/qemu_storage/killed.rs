//! Daemons and servers that are killed while a client writes.

use std::time::Instant;

use crate::common::*;
use crate::recorded::Client;
use crate::rounds::*;
use crate::{daemons, has_qemu, image, is_over, kill, serve};

#[test]
fn a_client_loses_nothing_that_was_flushed_when_the_daemon_is_killed_again_and_again() {
    if !has_qemu() {
        return;
    }
    let lab = sandbox();
    let (path, spec) = image(&lab);
    let server = serve(&lab, &spec);
    let mut client = Client::connect(lab.connect("d"), USUAL);
    assert!(client.start());
    let kill_it = || {
        let [daemon] = daemons(&lab)[..] else {
            panic!("{:?}", daemons(&lab));
        };
        kill(daemon);
    };
    let mut failed_flushes = 0;
    for round in 1..=kills("QEMU_KILLS") {
        let ended = write(&mut client, round);
        kill_it();
        finish(&mut client, ended);
        // What was answered before may be lost, and the flush says so.
        if client.driver.request(T_FLUSH, 0, &[]).0 != OK {
            failed_flushes += 1;
            let ended = write(&mut client, round);
            finish(&mut client, ended);
            assert_eq!(client.driver.request(T_FLUSH, 0, &[]).0, OK, "once");
        }
        check(&mut client, round);
        // What was flushed is there.
        kill_it();
        check(&mut client, round);
    }
    eprintln!("{failed_flushes} flushes failed");
    drop(client);
    let log = server.log();
    assert!(
        log.contains("qemu-storage-daemon ended (signal: 9"),
        "{log}"
    );
    server.stop().unwrap();
    is_over(&lab, &path);
}

#[test]
fn a_client_loses_nothing_when_the_server_is_killed_again_and_again() {
    if !has_qemu() {
        return;
    }
    let lab = sandbox();
    let (path, spec) = image(&lab);
    let mut server = serve(&lab, &spec);
    let mut pauses = Vec::new();
    let mut client = Client::connect(lab.connect("d"), USUAL);
    assert!(client.start());
    for round in 1..=kills("QEMU_KILLS") {
        let ended = write(&mut client, round);
        server.kill().unwrap();
        let died = Instant::now();
        server = serve(&lab, &spec);
        assert_eq!(
            daemons(&lab).len(),
            1,
            "one of the two servers has a daemon"
        );
        client = client.reconnect(|| lab.connect("d"));
        assert!(client.start());
        finish(&mut client, ended);
        pauses.push(died.elapsed());
        check(&mut client, round);
    }
    tell(&mut pauses);
    drop(client);
    server.stop().unwrap();
    is_over(&lab, &path);
}

#[test]
fn the_daemon_ends_with_a_server_that_is_killed() {
    if !has_qemu() {
        return;
    }
    let lab = sandbox();
    let (_, spec) = image(&lab);
    let server = serve(&lab, &spec);
    assert_eq!(daemons(&lab).len(), 1);
    server.kill().unwrap();
    eventually("the daemon ends", || daemons(&lab).is_empty());
}

#[test]
fn another_server_takes_over() {
    if !has_qemu() {
        return;
    }
    let lab = sandbox();
    let (path, spec) = image(&lab);
    let server = serve(&lab, &spec);
    let mut client = Client::connect(lab.connect("d"), USUAL);
    assert!(client.start());
    let ended = write(&mut client, 7);
    let next = lab.serve(&["--take-over", "--ublk", "no", &spec]);
    let (status, log) = server.wait().unwrap();
    assert!(status.success(), "{log}");
    client = client.reconnect(|| lab.connect("d"));
    assert!(client.start());
    finish(&mut client, ended);
    check(&mut client, 7);
    assert_eq!(daemons(&lab).len(), 1);
    drop(client);
    next.stop().unwrap();
    is_over(&lab, &path);
}

#[test]
fn a_server_waits_until_the_daemon_of_the_one_before_has_ended() {
    if !has_qemu() {
        return;
    }
    let lab = sandbox();
    let (path, spec) = image(&lab);
    let server = serve(&lab, &spec);
    server.kill().unwrap();
    let lock = lab.path("run/exports/d/qemu.lock");
    eventually("the daemon ends", || !lock.exists());
    // As if it had not.
    let lock = std::fs::File::create(lock).unwrap();
    lock.lock().unwrap();
    let next = std::thread::scope(|scope| {
        let next = scope.spawn(|| serve(&lab, &spec));
        // Long enough for a daemon that does not wait.
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert!(daemons(&lab).is_empty());
        drop(lock);
        next.join().unwrap()
    });
    assert_eq!(daemons(&lab).len(), 1);
    next.stop().unwrap();
    is_over(&lab, &path);
}

/// What a service manager does with `KillSignal=SIGUSR2`, and all processes of a unit get it.
#[test]
fn a_signal_to_hand_over_ends_the_server_before_its_daemon() {
    if !has_qemu() {
        return;
    }
    let lab = sandbox();
    let (path, spec) = image(&lab);
    let server = serve(&lab, &spec);
    let mut client = Client::connect(lab.connect("d"), USUAL);
    assert!(client.start());
    let ended = write(&mut client, 3);
    finish(&mut client, ended);
    let [daemon] = daemons(&lab)[..] else {
        panic!("{:?}", daemons(&lab));
    };
    let status = std::fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let keeper: i32 = parent.unwrap().trim().parse().unwrap();
    for pid in [daemon, keeper] {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::USR2).unwrap();
    }
    check(&mut client, 3);
    assert_eq!(daemons(&lab), [daemon]);
    let (status, log) = server.end_by(rustix::process::Signal::USR2).unwrap();
    assert!(status.success(), "{log}");
    assert!(daemons(&lab).is_empty());
    let next = serve(&lab, &spec);
    let mut client = client.reconnect(|| lab.connect("d"));
    assert!(client.start());
    check(&mut client, 3);
    drop(client);
    next.stop().unwrap();
    is_over(&lab, &path);
}

#[test]
fn a_resize_while_there_is_no_daemon_is_refused_and_the_next_daemon_comes() {
    if !has_qemu() {
        return;
    }
    let lab = sandbox();
    let (path, spec) = image(&lab);
    let server = serve(&lab, &spec);
    let mut client = Client::connect(lab.connect("d"), USUAL);
    assert!(client.start());
    let aside = lab.path("aside");
    std::fs::rename(&path, &aside).unwrap();
    daemons(&lab).into_iter().for_each(kill);
    eventually("it cannot be started", || {
        server.log().contains("No such file")
    });
    lab.fails(&["resize", "d", "32M"], 1, &["d"]);
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(client.driver.read(0, 512).0, OK);
    lab.ok(&["resize", "d", "32M"]);
    drop(client);
    server.stop().unwrap();
    is_over(&lab, &path);
}
