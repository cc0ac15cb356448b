//! Snapshots of an image that is served.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::server::Server;
use ublkup::engine::{SnapshotProgress, SnapshotStep};
use ublkup::export::admin;

use crate::common::*;
use crate::recorded::Client;
use crate::rounds::*;
use crate::{Disk, daemons, is_over, kill, qemu_img};

const LIMIT: Duration = Duration::from_secs(60);

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Disk {
    fn snapshot(&self, words: &[&str]) -> String {
        self.lab.ok(&[&["snapshot"], words].concat())
    }

    fn snapshot_fails(&self, words: &[&str], why: &[&str]) {
        self.lab.fails(&[&["snapshot"], words].concat(), 1, why);
    }

    /// A step without the command, with a descriptor beside it.
    fn step(&self, step: SnapshotStep, proof: Option<&File>) -> Result<SnapshotProgress, String> {
        let control = self.lab.path("run/exports/d/control");
        let done = admin::snapshot(&control, step, proof.map(AsFd::as_fd), LIMIT);
        done.map_err(|error| format!("{error:#}"))
    }

    /// The files beside the image.
    fn files(&self) -> Vec<PathBuf> {
        let all = fs::read_dir(self.path.parent().unwrap()).unwrap();
        let all = all.map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = all.filter(|path| path.is_file()).collect();
        files.sort();
        files
    }

    /// A disk of which a daemon is started by a script.
    fn serve_by(&self, script: &str) -> (Server, Client) {
        let folder = self.lab.path("bin");
        fs::create_dir(&folder).unwrap();
        let program = folder.join("qemu-storage-daemon");
        fs::write(
            &program,
            format!("#!/bin/bash\ncd {}\n{script}\n", folder.display()),
        )
        .unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&program, mode).unwrap();
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        let server = self
            .lab
            .serve_with(&["--ublk", "no", &self.spec], &[("PATH", &path)]);
        (server, client(&self.lab, USUAL))
    }
}

/// Writes a round without a pause in which nothing is under way.
fn write_all(client: &mut Client, round: u32) {
    let ended = write(client, round);
    finish(client, ended);
}

fn flush(client: &mut Client) {
    assert_eq!(client.driver.request(T_FLUSH, 0, &[]).0, OK);
}

/// What an image that is not written to shows, where rounds write.
fn shows(image: &Path, raw: &Path, round: u32) {
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(image),
        text(raw),
    ]);
    let mut found = vec![0; pattern(round, 0).len()];
    for block in 0..4u16 {
        let at = u64::from(block) * found.len() as u64;
        File::open(raw)
            .unwrap()
            .read_exact_at(&mut found, at)
            .unwrap();
        assert!(found == pattern(round, block), "block {block}");
    }
}

#[test]
fn snapshots_are_made_and_merged_while_a_client_writes() {
    let Some(disk) = Disk::new() else { return };
    let serve = || {
        disk.lab
            .serve(&["--sandbox=yes", "--ublk", "no", &disk.spec])
    };
    let server = serve();
    let mut client = client(&disk.lab, USUAL);
    let (first, second) = (
        disk.lab.path("first, at 10:30.qcow2"),
        disk.lab.path("second.qcow2"),
    );
    write_all(&mut client, 1);
    disk.snapshot(&["create", "d", text(&first)]);
    // Nothing was lost, so nothing is said to be.
    flush(&mut client);
    let ended = write(&mut client, 2);
    disk.snapshot(&["create", "d", text(&second)]);
    finish(&mut client, ended);
    flush(&mut client);
    check(&mut client, 2);
    shows(&first, &disk.lab.path("raw"), 1);
    let list = disk.snapshot(&["list", "d"]);
    let at = [text(&disk.path), text(&second), text(&first)].map(|file| list.find(file).unwrap());
    assert!(at.is_sorted(), "{list}");
    // The next server has the same disk at the same path.
    server.kill().unwrap();
    let server = serve();
    client = client.reconnect(|| disk.lab.connect("d"));
    assert!(client.start());
    check(&mut client, 2);
    write_all(&mut client, 3);
    disk.snapshot_fails(
        &["commit", "d", text(&first)],
        &["is not what the image lies over", "second.qcow2"],
    );
    for (snapshot, round) in [(&second, 4), (&first, 5)] {
        let ended = write(&mut client, round);
        disk.snapshot(&["commit", "d", text(snapshot)]);
        finish(&mut client, ended);
        flush(&mut client);
        check(&mut client, round);
        assert!(!snapshot.exists());
    }
    disk.snapshot_fails(
        &["commit", "d", text(&disk.path)],
        &["lies over no snapshot"],
    );
    drop(client);
    server.stop().unwrap();
    assert_eq!(disk.files(), [disk.path.clone(), disk.lab.path("raw")]);
    shows(&disk.path, &disk.lab.path("raw"), 5);
    is_over(&disk.lab, &disk.path);
}

#[test]
fn a_backup_is_what_the_disk_held() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_client();
    let backup = disk.lab.path("backup-10:30.qcow2");
    write_all(&mut client, 1);
    disk.snapshot(&["backup", "d", text(&backup)]);
    write_all(&mut client, 2);
    shows(&backup, &disk.lab.path("raw"), 1);
    disk.snapshot_fails(
        &["backup", "d", text(&backup)],
        &["File exists", "backup-10:30.qcow2"],
    );
    let raw = disk.lab.path("backup.raw");
    disk.snapshot(&["backup", "d", text(&raw), "--format", "raw"]);
    assert!(fs::read(&raw).unwrap().starts_with(&pattern(2, 0)));
    check(&mut client, 2);
    let files = [&backup, &raw, &disk.path, &disk.lab.path("raw")];
    assert!(disk.files().iter().eq(files), "{:?}", disk.files());
    disk.end(client, server);
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let Some(disk) = Disk::new() else { return };
    let (server, client) = disk.serve_client();
    disk.snapshot_fails(&["create", "d", text(&disk.path)], &["is there already"]);
    disk.snapshot_fails(&["create", "d", "/proc/s.qcow2"], &["another file system"]);
    disk.snapshot_fails(&["create", "d", "/none/s.qcow2"], &["No such file"]);
    assert_eq!(disk.files(), std::slice::from_ref(&disk.path));
    disk.end(client, server);
    let (base, top) = (
        disk.lab.image("base.img", 1 << 20),
        disk.lab.path("top.qcow2"),
    );
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        text(&base),
        text(&top),
    ]);
    let other = disk
        .lab
        .serve(&["--ublk", "no", &format!("d=qcow2:{}", top.display())]);
    disk.snapshot_fails(
        &["commit", "d", text(&base)],
        &["is no qcow2 image", "qemu-img commit"],
    );
    other.stop().unwrap();
    let plain = disk.lab.serve(&["--ublk", "no", "d=mem:1M"]);
    disk.snapshot_fails(
        &["create", "d", text(&disk.lab.path("s"))],
        &["exports of qcow2:"],
    );
    assert!(
        disk.step(SnapshotStep::Begin, None)
            .unwrap_err()
            .contains("qcow2:")
    );
    plain.stop().unwrap();
    let spec = format!("d={},read-only", disk.spec.strip_prefix("d=").unwrap());
    let read_only = disk.lab.serve(&["--ublk", "no", &spec]);
    assert!(
        disk.step(SnapshotStep::Begin, None)
            .unwrap_err()
            .contains("without writes")
    );
    read_only.stop().unwrap();
}

/// A guest that has taken a server over can ask for any step.
#[test]
fn merging_takes_the_right_to_write_what_is_merged_into() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_client();
    let snapshot = disk.lab.path("s.qcow2");
    disk.snapshot(&["create", "d", text(&snapshot)]);
    write_all(&mut client, 1);
    let read_only = File::open(&snapshot).unwrap();
    let other = File::options()
        .read(true)
        .write(true)
        .open(&disk.path)
        .unwrap();
    for proof in [None, Some(&read_only), Some(&other)] {
        let why = disk.step(SnapshotStep::Merge, proof).unwrap_err();
        assert!(why.contains("takes a descriptor by which"), "{why}");
    }
    for step in [SnapshotStep::Finish, SnapshotStep::Resume] {
        disk.step(step, None).unwrap_err();
    }
    // No image lies where the new one has to be.
    let why = disk.step(SnapshotStep::Begin, None).unwrap_err();
    assert!(why.contains("has to be there"), "{why}");
    check(&mut client, 1);
    flush(&mut client);
    disk.end(client, server);
}

#[test]
fn a_command_that_dies_leaves_a_disk_that_is_served_again() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_client();
    write_all(&mut client, 1);
    let new = disk.lab.path("disk.qcow2.ublkup-new");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&new), "16M"]);
    disk.step(SnapshotStep::Begin, None).unwrap();
    assert!(daemons(&disk.lab).is_empty());
    // It waits for what does not come, and is served then.
    let ended = write(&mut client, 16);
    finish(&mut client, ended);
    flush(&mut client);
    check(&mut client, 16);
    let why = disk.step(SnapshotStep::Resume, None).unwrap_err();
    assert!(why.contains("took too long"), "{why}");
    // What was left is no obstacle.
    let snapshot = disk.lab.path("s.qcow2");
    disk.snapshot(&["create", "d", text(&snapshot)]);
    // Of a daemon that dies while it merges.
    let proof = File::options()
        .read(true)
        .write(true)
        .open(&snapshot)
        .unwrap();
    disk.step(SnapshotStep::Merge, Some(&proof)).unwrap();
    kill(disk.daemon());
    check(&mut client, 16);
    disk.step(SnapshotStep::Merge, Some(&proof)).unwrap();
    disk.snapshot(&["cancel", "d"]);
    disk.step(SnapshotStep::Finish, None).unwrap_err();
    disk.snapshot(&["commit", "d", text(&snapshot)]);
    check(&mut client, 16);
    assert_eq!(disk.files(), std::slice::from_ref(&disk.path));
    disk.end(client, server);
}

#[test]
fn a_new_image_that_cannot_be_served_is_taken_back() {
    let Some(disk) = Disk::new() else { return };
    // The second start fails.
    let script = "echo >>starts
        [ $(wc -l <starts) = 2 ] && { echo 'qemu-storage-daemon: it cannot be' >&2; exit 1; }
        exec -a qemu-storage-daemon /usr/bin/qemu-storage-daemon \"$@\"";
    let (server, mut client) = disk.serve_by(script);
    write_all(&mut client, 1);
    let snapshot = disk.lab.path("s.qcow2");
    disk.snapshot_fails(
        &["create", "d", text(&snapshot)],
        &["it cannot be", "as before"],
    );
    flush(&mut client);
    check(&mut client, 1);
    assert_eq!(disk.files(), std::slice::from_ref(&disk.path));
    disk.snapshot(&["create", "d", text(&snapshot)]);
    check(&mut client, 1);
    disk.end(client, server);
}
