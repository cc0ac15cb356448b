//! A server dies, the block device stays, and the next server goes on with it.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use upgrade_proto::{Answer, Lookup, connect};

use super::common::{Driver, OK, eventually};
use super::common::{Sandbox, sandbox};
use super::upgrade::{BLOCK, PLAIN, direct, errno, leave, read_block, service, stat, write_block};
use testkit::server::Server;

/// A disk in a file, which outlives its servers.
pub struct Disk {
    pub lab: Sandbox,
    pub image: PathBuf,
}

impl Disk {
    pub fn new() -> Self {
        let lab = sandbox();
        let image = lab.image("disk.img", 64 << 20);
        Self { lab, image }
    }

    pub fn serve(&self, args: &[&str]) -> Server {
        self.serve_with(args, &[])
    }

    pub fn serve_with(&self, args: &[&str], env: &[(&str, &str)]) -> Server {
        let spec = format!("file:{}", self.image.display());
        let args = [&["--ublk", "yes", "--name", "d", spec.as_str()], args].concat();
        self.lab.serve_with(&args, env)
    }

    pub fn device(&self) -> PathBuf {
        stat(&self.lab)["ublk"]["device"].as_str().unwrap().into()
    }

    pub fn access(&self) -> String {
        stat(&self.lab)["access"].as_str().unwrap().to_owned()
    }

    pub fn come(&self, held: &File) -> Driver {
        // By the kernel's way: the descriptor is all there is.
        let lookup = Lookup {
            runtime_dirs: Vec::new(),
            ..Lookup::default()
        };
        match connect(held, &service(), &lookup).unwrap() {
            Answer::Found(found) => {
                Driver::running(found.into_stream(), PLAIN | super::common::FLUSH)
            }
            Answer::NoService(why) => panic!("no service: {why}"),
        }
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_write_that_meets_a_dead_server_is_done_by_the_next_one() {
    let disk = Disk::new();
    let server = disk.serve(&[]);
    let device = disk.device();
    let held = direct(&device);
    write_block(&held, 1, b'1').unwrap();
    server.kill().unwrap();
    let writer = std::thread::spawn({
        let held = direct(&device);
        move || write_block(&held, 2, b'2')
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!writer.is_finished(), "the write did not wait");
    let server = disk.serve(&[]);
    assert_eq!(disk.device(), device);
    writer.join().unwrap().unwrap();
    // The descriptor of before still works, and so does the disk.
    for (number, byte) in [(1, b'1'), (2, b'2')] {
        assert!(read_block(&held, number).0.iter().all(|&b| b == byte));
    }
    write_block(&held, 3, b'3').unwrap();
    drop(held);
    server.stop().unwrap();
    disk.lab.is_clean();
    assert!(!device.exists(), "an orderly end removes the device");
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_client_comes_back_by_the_descriptor_it_has_when_the_server_was_replaced() {
    let disk = Disk::new();
    let server = disk.serve(&["--reconnect-grace", "3600"]);
    let held = direct(&disk.device());
    let mut driver = disk.come(&held);
    assert_eq!(driver.write(0, &[b'a'; BLOCK]), OK);
    server.kill().unwrap();
    drop(driver);
    let server = disk.serve(&["--reconnect-grace", "3600"]);
    // The disk is the client's: nobody else writes before it is back.
    assert_eq!(disk.access(), "waiting");
    assert_eq!(errno(write_block(&held, 0, b'x')), Some(libc::EBADE));
    let mut driver = disk.come(&held);
    assert_eq!(disk.access(), "upgraded");
    assert_eq!(driver.read(0, BLOCK), (OK, vec![b'a'; BLOCK]));
    leave(driver);
    eventually("the client leaves", || disk.access() == "block");
    write_block(&held, 0, b'b').unwrap();
    drop(held);
    server.stop().unwrap();
    disk.lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_device_that_waits_is_not_gone_on_with_as_another_disk() {
    let disk = Disk::new();
    disk.serve(&[]).kill().unwrap();
    // The same name, another size: the old device goes.
    File::options()
        .write(true)
        .open(&disk.image)
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    let server = disk.serve(&[]);
    let size = std::fs::read_to_string(format!(
        "/sys/block/{}/size",
        disk.device().file_name().unwrap().to_str().unwrap()
    ));
    assert_eq!(size.unwrap().trim(), "65536");
    server.kill().unwrap();
    // And who does not want to go on with it can clean up.
    disk.lab.ok(&["doctor", "--clean"]);
    assert!(super::is_gone(0), "the device is left");
    disk.lab.is_clean();
}
