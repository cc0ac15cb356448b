//! A block device on the disk of another vhost-user server.

use std::fs::File;
use std::thread;

use testkit::server::Server;

use super::common::{Sandbox, eventually, sandbox};
use super::upgrade::{BLOCK, direct, read_block, stat, write_block};

/// The server behind: export `p`, a file, which does not wait for a client that has died.
fn serve_behind(lab: &Sandbox) -> Server {
    let spec = format!("p=file:{}", lab.path("disk.img").display());
    lab.serve(&["--ublk", "no", "--reconnect-grace", "0", &spec])
}

fn serve_front(lab: &Sandbox, behind: &Sandbox) -> Server {
    serve_front_with(lab, behind, &[])
}

fn serve_front_with(lab: &Sandbox, behind: &Sandbox, more: &[&str]) -> Server {
    let socket = behind.path("run/exports/p/vhost-user-blk");
    let spec = format!("vhost-user:{}", socket.display());
    lab.serve(&[&["--ublk", "yes", "--name", "d", &spec], more].concat())
}

/// Has a block written while a server starts.
fn write_meanwhile(held: &File, byte: u8, start: impl FnOnce() -> Server) -> Server {
    thread::scope(|scope| {
        let writing = scope.spawn(|| write_block(held, 2, byte));
        let server = start();
        writing.join().unwrap().unwrap();
        server
    })
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_block_device_outlives_both_of_its_servers() {
    let (behind, lab) = (sandbox(), sandbox());
    let image = behind.image("disk.img", 16 << 20);
    let mut other = serve_behind(&behind);
    let mut server = serve_front(&lab, &behind);
    let device = stat(&lab)["ublk"]["device"].as_str().unwrap().to_owned();
    let held = direct(device.as_ref());
    for round in 0..6u8 {
        let byte = b'a' + round;
        write_block(&held, 1, byte).unwrap();
        held.sync_data().unwrap();
        let in_image = std::fs::read(&image).unwrap();
        assert!(
            in_image[BLOCK..2 * BLOCK]
                .iter()
                .all(|found| *found == byte)
        );
        // One of the two dies, and what is written meanwhile waits.
        if round % 2 == 0 {
            other.kill().unwrap();
            other = write_meanwhile(&held, byte, || serve_behind(&behind));
        } else {
            server.kill().unwrap();
            server = write_meanwhile(&held, byte, || serve_front(&lab, &behind));
        }
        for block in [1, 2] {
            let found = read_block(&held, block);
            assert!(found.0 == [byte; BLOCK], "{block} of {round}");
        }
    }
    let before = server;
    server = write_meanwhile(&held, b'x', || {
        serve_front_with(&lab, &behind, &["--take-over"])
    });
    assert!(before.wait().unwrap().0.success());
    assert!(read_block(&held, 2).0 == [b'x'; BLOCK]);
    assert_eq!(stat(&lab)["ublk"]["device"].as_str().unwrap(), device);
    behind.ok(&["resize", "p", "32M"]);
    eventually("the block device has grown", || {
        write_block(&held, (32 << 20) / BLOCK as u64 - 1, b'z').is_ok()
    });
    drop(held);
    server.stop().unwrap();
    other.stop().unwrap();
    lab.is_clean();
    behind.is_clean();
}
