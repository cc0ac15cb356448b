//! `qcow2:` and `qemu:`, by the `qemu-storage-daemon` of this machine.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

#[path = "qemu_storage/formats.rs"]
mod formats;
#[path = "qemu_storage/images.rs"]
mod images;
#[path = "qemu_storage/killed.rs"]
mod killed;
#[path = "common/recorded.rs"]
mod recorded;
#[path = "common/rounds.rs"]
mod rounds;
#[path = "qemu_storage/snapshots.rs"]
mod snapshots;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::sandbox::Sandbox;
use testkit::server::Server;
use testkit::shell::has_programs;

use recorded::Client;

/// A directory for servers, where QEMU's programs are.
fn lab() -> Option<Sandbox> {
    has_programs(&["qemu-storage-daemon", "qemu-img"]).then(common::sandbox)
}

fn qemu_img(arguments: &[&str]) -> Output {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output
}

/// An image of 16 MiB, and its SPEC as export `d`.
struct Disk {
    lab: Sandbox,
    path: PathBuf,
    spec: String,
}

impl Disk {
    /// A new one, where that can be tested.
    fn new() -> Option<Self> {
        let lab = lab()?;
        let path = lab.path("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "16M"]);
        let spec = format!("d=qcow2:{}", path.display());
        Some(Self { lab, path, spec })
    }

    fn serve(&self) -> Server {
        serve(&self.lab, &self.spec)
    }

    /// Its server, and a client that has it.
    fn serve_client(&self) -> (Server, Client) {
        (self.serve(), rounds::client(&self.lab, common::USUAL))
    }

    /// Its only daemon.
    fn daemon(&self) -> i32 {
        let [daemon] = daemons(&self.lab)[..] else {
            panic!("{:?}", daemons(&self.lab));
        };
        daemon
    }

    fn end(&self, client: Client, server: Server) {
        drop(client);
        server.stop().unwrap();
        is_over(&self.lab, &self.path);
    }
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
