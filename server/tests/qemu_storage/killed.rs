//! Daemons and servers that are killed while a client writes.

use crate::common::*;
use crate::rounds::*;
use crate::{Disk, daemons, is_over, kill};

#[test]
fn a_client_loses_nothing_that_was_flushed_when_the_daemon_is_killed_again_and_again() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_client();
    let kill_it = || kill(disk.daemon());
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
    let log = server.log();
    assert!(
        log.contains("qemu-storage-daemon ended (signal: 9"),
        "{log}"
    );
    disk.end(client, server);
}

#[test]
fn a_client_loses_nothing_when_the_server_is_killed_again_and_again() {
    let Some(disk) = Disk::new() else { return };
    let serve = || {
        let server = disk.serve();
        // One of the two servers has one.
        disk.daemon();
        server
    };
    let kills = (&disk.lab, "QEMU_KILLS");
    let (server, client) = kill_servers(kills, disk.serve_client(), serve);
    disk.end(client, server);
}

#[test]
fn the_daemon_ends_with_a_server_that_is_killed() {
    let Some(disk) = Disk::new() else { return };
    let server = disk.serve();
    disk.daemon();
    server.kill().unwrap();
    eventually("the daemon ends", || daemons(&disk.lab).is_empty());
}

#[test]
fn another_server_takes_over() {
    let Some(disk) = Disk::new() else { return };
    let options = ["--take-over", "--ublk", "no", &disk.spec];
    let take_over = || disk.lab.serve(&options);
    let (next, client) = hand_over(&disk.lab, disk.serve_client(), take_over);
    disk.daemon();
    disk.end(client, next);
}

#[test]
fn a_server_waits_until_the_daemon_of_the_one_before_has_ended() {
    let Some(disk) = Disk::new() else { return };
    disk.serve().kill().unwrap();
    let lock = disk.lab.path("run/exports/d/qemu.lock");
    eventually("the daemon ends", || !lock.exists());
    // What a guest could put there that has taken the server over: it is told, and waited for by no program.
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &lock,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let serve = ["serve", "--ublk", "no", &disk.spec];
    disk.lab.fails(&serve, 1, &["cannot lock", "qemu.lock"]);
    std::fs::remove_file(&lock).unwrap();
    // As if the daemon had not ended.
    let lock = std::fs::File::create(lock).unwrap();
    lock.lock().unwrap();
    let next = std::thread::scope(|scope| {
        let next = scope.spawn(|| disk.serve());
        // Long enough for a daemon that does not wait.
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert!(daemons(&disk.lab).is_empty());
        drop(lock);
        next.join().unwrap()
    });
    disk.daemon();
    next.stop().unwrap();
    is_over(&disk.lab, &disk.path);
}

/// What a service manager does with `KillSignal=SIGUSR2`, and all processes of a unit get it.
#[test]
fn a_signal_to_hand_over_ends_the_server_before_its_daemon() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_client();
    let ended = write(&mut client, 3);
    finish(&mut client, ended);
    let daemon = disk.daemon();
    let status = std::fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let keeper: i32 = parent.unwrap().trim().parse().unwrap();
    for pid in [daemon, keeper] {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::USR2).unwrap();
    }
    check(&mut client, 3);
    assert_eq!(daemons(&disk.lab), [daemon]);
    let (status, log) = server.end_by(rustix::process::Signal::USR2).unwrap();
    assert!(status.success(), "{log}");
    assert!(daemons(&disk.lab).is_empty());
    let next = disk.serve();
    let mut client = client.reconnect(|| disk.lab.connect("d"));
    assert!(client.start());
    check(&mut client, 3);
    disk.end(client, next);
}

#[test]
fn a_resize_while_there_is_no_daemon_is_refused_and_the_next_daemon_comes() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_client();
    let aside = disk.lab.path("aside");
    std::fs::rename(&disk.path, &aside).unwrap();
    daemons(&disk.lab).into_iter().for_each(kill);
    eventually("it cannot be started", || {
        server.log().contains("No such file")
    });
    disk.lab.fails(&["resize", "d", "32M"], 1, &["d"]);
    std::fs::rename(&aside, &disk.path).unwrap();
    assert_eq!(client.driver.read(0, 512).0, OK);
    disk.lab.ok(&["resize", "d", "32M"]);
    disk.end(client, server);
}
