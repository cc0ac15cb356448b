//! Images of a real cluster, whose configuration `CEPH_CONF` names.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

#[path = "rbd/declarations.rs"]
mod declarations;
#[path = "rbd/killed.rs"]
mod killed;
#[path = "rbd/late.rs"]
mod late;
#[path = "rbd/lost_lock.rs"]
mod lost_lock;
#[path = "rbd/owner.rs"]
mod owner;
#[path = "common/recorded.rs"]
mod recorded;
#[path = "rbd/refused.rs"]
mod refused;
#[path = "common/rounds.rs"]
mod rounds;
#[path = "rbd/waiting.rs"]
mod waiting;

use std::io::Write as _;
use std::process::{Command, Stdio};

use common::*;
use testkit::sandbox::Sandbox;
use testkit::server::Server;

/// What a disk without a write cache offers.
const PLAIN: u64 = VERSION_1 | INDIRECT | PROTOCOL | DISCARD | WRITE_ZEROES;

/// An image in the pool `rbd` that is removed with the value.
struct Image(String);

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn rbd(args: &[&str]) -> String {
    run("rbd", args)
}

fn ceph(args: &[&str]) -> String {
    run("ceph", args)
}

/// A library of this source, to be loaded before others.
fn preloaded(lab: &Sandbox, source: &str) -> String {
    let path = lab.path("preloaded.so").display().to_string();
    let mut compiler = Command::new("cc")
        .args([
            "-Wall", "-Werror", "-shared", "-fPIC", "-o", &path, "-xc", "-", "-ldl",
        ])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = compiler.stdin.take().unwrap();
    input.write_all(source.as_bytes()).unwrap();
    drop(input);
    assert!(compiler.wait().unwrap().success());
    path
}

impl Image {
    fn new(name: &str, size: &str) -> Self {
        rbd(&["create", "--size", size, name]);
        Self(name.to_owned())
    }

    fn spec(&self) -> String {
        format!("d=rbd:rbd/{}", self.0)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let remove = |action: &[&str]| {
            let mut command = Command::new("rbd");
            let done = command
                .args(action)
                .args(["--no-progress", &self.0])
                .output();
            done.is_ok_and(|done| done.status.success())
        };
        remove(&["snap", "purge"]);
        // The cluster may believe for a while that a killed server still has it open.
        for _ in 0..20 {
            if remove(&["rm"]) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
        eprintln!("{} is still there", self.0);
    }
}

const ARGS: [&str; 2] = ["--ublk", "no"];

fn serve(lab: &Sandbox, image: &Image) -> Server {
    lab.serve(&[&ARGS[..], &[&image.spec()]].concat())
}

fn connect(lab: &Sandbox) -> Driver {
    Driver::running(lab.connect("d"), PLAIN)
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn what_is_written_is_read_again() {
    let image = Image::new("plain", "64M");
    let lab = sandbox();
    let server = serve(&lab, &image);
    let mut driver = connect(&lab);
    assert_eq!(driver.read(8, 4096), (OK, vec![0; 4096]));
    assert_eq!(driver.write(8, &[7; 4096]), OK);
    assert_eq!(driver.read(8, 4096), (OK, vec![7; 4096]));
    assert_eq!(driver.segment(T_WRITE_ZEROES, 8, 4, 0), OK);
    let mut half = vec![0; 2048];
    half.extend([7; 2048]);
    assert_eq!(driver.read(8, 4096), (OK, half));
    let sectors_of_object = (4 << 20) / 512;
    assert_eq!(driver.segment(T_DISCARD, 0, sectors_of_object, 0), OK);
    assert_eq!(driver.read(8, 4096), (OK, vec![0; 4096]));
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_snapshot_is_read_only_and_an_image_grows() {
    let image = Image::new("grown", "64M");
    let lab = sandbox();
    let server = serve(&lab, &image);
    assert_eq!(connect(&lab).write(0, &[1; 512]), OK);
    rbd(&["snap", "create", "--no-progress", "grown@then"]);
    assert_eq!(connect(&lab).write(0, &[2; 512]), OK);
    let other = sandbox();
    let frozen = other.serve(&[&ARGS[..], &["d=rbd:rbd/grown@then"]].concat());
    assert_eq!(connect(&other).read(0, 512), (OK, vec![1; 512]));
    frozen.stop().unwrap();
    lab.ok(&["resize", "d", "80M"]);
    let last = (80 << 11) - 1;
    assert_eq!(connect(&lab).write(last, &[3; 512]), OK);
    assert!(rbd(&["info", "grown"]).contains("size 80 MiB"));
    // By another client, which nothing but the cluster tells.
    rbd(&["resize", "--no-progress", "--size", "96M", "grown"]);
    eventually("the disk has grown, too", || size_bytes(&lab) == 96 << 20);
    assert_eq!(connect(&lab).write((96 << 11) - 1, &[4; 512]), OK);
    server.stop().unwrap();
}

fn stat(lab: &Sandbox) -> serde_json::Value {
    serde_json::from_str(&lab.ok(&["stat", "d", "--json"])).unwrap()
}

fn size_bytes(lab: &Sandbox) -> serde_json::Value {
    stat(lab)["size_bytes"].clone()
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn an_image_that_is_only_read_grows_with_its_writer() {
    let image = Image::new("read", "64M");
    let (lab, other) = (sandbox(), sandbox());
    let writer = serve(&lab, &image);
    let reader = other.serve(&[&ARGS[..], &["--read-only", &image.spec()]].concat());
    let mut driver = connect(&other);
    for (size, sectors) in [("80M", 80 << 11), ("96M", 96 << 11)] {
        lab.ok(&["resize", "d", size]);
        let last = sectors - 1;
        assert_eq!(connect(&lab).write(last, &[1; 512]), OK);
        eventually("the reader's disk has grown, too", || {
            size_bytes(&other) == sectors * 512
        });
        assert_eq!(driver.read(last, 512), (OK, vec![1; 512]));
        assert_eq!(driver.read(0, 512), (OK, vec![0; 512]));
    }
    drop(driver);
    reader.stop().unwrap();
    writer.stop().unwrap();
    lab.is_clean();
    other.is_clean();
}
