//! `qcow2:` and `qemu:`, by the `qemu-storage-daemon` of this machine.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

#[path = "qemu_storage/images.rs"]
mod images;
#[path = "qemu_storage/killed.rs"]
mod killed;
#[path = "common/recorded.rs"]
mod recorded;
#[path = "common/rounds.rs"]
mod rounds;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::sandbox::Sandbox;
use testkit::server::Server;

/// Whether QEMU's programs are here.
fn has_qemu() -> bool {
    let found = ["qemu-storage-daemon", "qemu-img"]
        .map(|program| Command::new(program).arg("--version").output().is_ok());
    if found != [true; 2] {
        eprintln!("not tested: no qemu-storage-daemon or qemu-img here");
    }
    found == [true; 2]
}

fn qemu_img(arguments: &[&str]) -> Output {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output
}

/// An image of 16 MiB, and its SPEC as export `d`.
fn image(lab: &Sandbox) -> (PathBuf, String) {
    let path = lab.path("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "16M"]);
    let spec = format!("d=qcow2:{}", path.display());
    (path, spec)
}

fn serve(lab: &Sandbox, spec: &str) -> Server {
    lab.serve(&["--ublk", "no", spec])
}

/// The daemons of a sandbox, as their sockets tell.
fn daemons(lab: &Sandbox) -> Vec<i32> {
    let folder = lab.path("run").display().to_string();
    let of = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        (line.starts_with("qemu-storage-daemon\0") && line.contains(&folder)).then_some(pid)
    };
    std::fs::read_dir("/proc").unwrap().filter_map(of).collect()
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// No daemon and no file is left, and the image is whole.
fn is_over(lab: &Sandbox, image: &Path) {
    assert!(daemons(lab).is_empty());
    qemu_img(&["check", "-q", image.to_str().unwrap()]);
    lab.is_clean();
}
