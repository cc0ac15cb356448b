//! `qemu-storage-daemon` as the other server, where it is installed; and a confined server in front.

use std::path::Path;
use std::process::{Child, Command};

use testkit::process::spawn_bound;
use testkit::shell::has_programs;

use crate::common::*;
use crate::peer::{Knobs, Peer};
use crate::{open, serve, size_bytes};

struct Daemon(Child);

impl Daemon {
    /// Serves an image at a socket, where that can be tested.
    fn start(image: &Path, socket: &Path) -> Option<Self> {
        if !has_programs(&["qemu-storage-daemon"]) {
            return None;
        }
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("file,node-name=n,filename={}", image.display()))
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path={}",
                socket.display()
            ));
        let child = spawn_bound(&mut command).unwrap();
        eventually("qemu-storage-daemon listens", || socket.exists());
        Some(Self(child))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_s_storage_daemon_is_served_killed_and_served_again() {
    let lab = sandbox();
    let (image, socket) = (lab.image("disk.img", 16 << 20), lab.path("qsd.sock"));
    let Some(daemon) = Daemon::start(&image, &socket) else {
        return;
    };
    let server = serve(&lab, &socket);
    assert_eq!(size_bytes(&lab), 16 << 20);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    let bytes: Vec<u8> = (0..1 << 20u32)
        .map(|at: u32| (at / 512).to_le_bytes()[0])
        .collect();
    assert_eq!(driver.write(8, &bytes), OK);
    assert_eq!(driver.request(T_FLUSH, 0, &[]).0, OK);
    assert!(std::fs::read(&image).unwrap()[4096..][..1 << 20] == bytes);
    assert_eq!(driver.segment(T_WRITE_ZEROES, 8, 8, 0), OK);
    assert_eq!(driver.segment(T_DISCARD, 16, 8, 0), OK);
    for round in 1..4 {
        drop(driver);
        // Another client brings other memory.
        driver = Driver::running(lab.connect("d"), USUAL);
        assert_eq!(driver.write(64, &[round; 4096]), OK);
        assert_eq!(driver.read(64, 4096), (OK, vec![round; 4096]));
    }
    drop(daemon);
    driver.memory.put(DATA + 4096, &[9; 512]);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
    let _ = std::fs::remove_file(&socket);
    let daemon = Daemon::start(&image, &socket).unwrap();
    assert_eq!(driver.vrings[0].wait(&driver.memory), (0, 1));
    assert_eq!(driver.read(0, 512), (OK, vec![9; 512]));
    drop(driver);
    server.stop().unwrap();
    drop(daemon);
    lab.is_clean();
}

#[test]
fn a_confined_server_connects_again() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let spec = format!("d=vhost-user:{}", peer.socket().display());
    let server = lab.serve(&["--sandbox=yes", "--ublk", "no", &spec]);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    peer.hang_up();
    eventually("it is back", || server.log().contains("the server is back"));
    assert_eq!(driver.write(0, &[2; 512]), OK);
    assert_eq!(driver.read(0, 512), (OK, vec![2; 512]));
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_disk_is_one_export_s_even_if_its_server_takes_several_clients() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    // By another path. The server would take it: a client that waits is not told.
    std::os::unix::fs::symlink(lab.path("peer.sock"), lab.path("again.sock")).unwrap();
    let spec = format!("e=vhost-user:{}", lab.path("again.sock").display());
    lab.serve_fails(
        &["--ublk", "no", &spec],
        1,
        &["cannot lock the disk", "another export of this host has it"],
    );
    assert_eq!(peer.knobs().connections, 1);
    server.stop().unwrap();
    // It goes with its holder.
    let server = lab.serve(&["--ublk", "no", &spec]);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_server_that_does_not_listen_yet_is_waited_for() {
    let lab = sandbox();
    let socket = lab.path("peer.sock");
    // The socket is there, and its server is not.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| open(&socket));
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!opening.is_finished());
        let _peer = Peer::start(&socket, Knobs::default());
        drop(opening.join().unwrap());
    });
}
