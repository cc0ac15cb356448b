//! Snapshots of an image that is served.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::server::Server;
use ublkup::engine::{SnapshotProgress, SnapshotStep};
use ublkup::export::admin;
use ublkup::storage::{LockedOfImage, lock_qemu_image};

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

    /// A step without the command.
    fn step(&self, step: SnapshotStep) -> Result<SnapshotProgress, String> {
        let control = self.lab.path("run/exports/d/control");
        let done = admin::snapshot(&control, step, LIMIT);
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

    /// Its server, whose daemon does not start at one of the attempts, counted from 1, and a client.
    fn serve_failing(&self, attempt: u32) -> (Server, Client) {
        let script = format!(
            "echo >>starts
            [ $(wc -l <starts) = {attempt} ] && {{ echo 'qemu-storage-daemon: it cannot be' >&2; exit 1; }}
            exec -a qemu-storage-daemon /usr/bin/qemu-storage-daemon \"$@\""
        );
        let folder = self.lab.path("bin");
        fs::create_dir(&folder).unwrap();
        let program = folder.join("qemu-storage-daemon");
        fs::write(
            &program,
            format!("#!/bin/bash\ncd {}\n{script}\n", folder.display()),
        )
        .unwrap();
        let mode = fs::Permissions::from_mode(0o755);
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
    fs::set_permissions(&disk.path, fs::Permissions::from_mode(0o600)).unwrap();
    disk.snapshot(&["backup", "d", text(&backup)]);
    assert_eq!(backup.metadata().unwrap().mode() & 0o777, 0o600);
    write_all(&mut client, 2);
    shows(&backup, &disk.lab.path("raw"), 1);
    disk.snapshot_fails(
        &["backup", "d", text(&backup)],
        &["is there already", "backup-10:30.qcow2"],
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
        disk.step(SnapshotStep::Begin)
            .unwrap_err()
            .contains("qcow2:")
    );
    plain.stop().unwrap();
    let spec = format!("d={},read-only", disk.spec.strip_prefix("d=").unwrap());
    let read_only = disk.lab.serve(&["--ublk", "no", &spec]);
    assert!(
        disk.step(SnapshotStep::Begin)
            .unwrap_err()
            .contains("without writes")
    );
    read_only.stop().unwrap();
}

/// What a process can lock that may not write.
fn lock_for_reading(file: &File) {
    // SAFETY: all zeroes is a valid `flock`.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    (range.l_type, range.l_len) = (i16::try_from(libc::F_RDLCK).unwrap(), 0);
    // SAFETY: it lives through the call.
    let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    assert_eq!(locked, 0);
}

/// A guest that has taken a server over can ask for any step.
#[test]
fn merging_takes_the_right_to_write_what_is_merged_into() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_client();
    let snapshot = disk.lab.path("s.qcow2");
    disk.snapshot(&["create", "d", text(&snapshot)]);
    write_all(&mut client, 1);
    let refused = || {
        let why = disk.step(SnapshotStep::Merge).unwrap_err();
        assert!(why.contains("takes a lock on"), "{why}");
    };
    refused();
    let inode = disk.path.metadata().unwrap().ino();
    let other = lock_qemu_image(&disk.path, LockedOfImage::Merge(inode)).unwrap();
    refused();
    // For another image over the same one.
    let another = lock_qemu_image(&snapshot, LockedOfImage::Merge(inode + 1)).unwrap();
    refused();
    drop((other, another));
    // Who can only read it has no such lock: this one is for reading.
    let reader = File::open(&snapshot).unwrap();
    lock_for_reading(&reader);
    refused();
    drop(reader);
    for step in [SnapshotStep::Finish, SnapshotStep::Resume] {
        disk.step(step).unwrap_err();
    }
    // No image lies where the new one has to be.
    let why = disk.step(SnapshotStep::Begin).unwrap_err();
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
    disk.step(SnapshotStep::Begin).unwrap();
    assert!(daemons(&disk.lab).is_empty());
    // It waits for what does not come, and is served then.
    let ended = write(&mut client, 16);
    finish(&mut client, ended);
    flush(&mut client);
    check(&mut client, 16);
    let why = disk.step(SnapshotStep::Resume).unwrap_err();
    assert!(why.contains("took too long"), "{why}");
    // An image of another size, as if the disk was made larger meanwhile.
    qemu_img(&["create", "-q", "-f", "qcow2", text(&new), "8M"]);
    let why = disk.step(SnapshotStep::Begin).unwrap_err();
    assert!(why.contains("another size"), "{why}");
    flush(&mut client);
    // What was left is no obstacle.
    let snapshot = disk.lab.path("s.qcow2");
    disk.snapshot(&["create", "d", text(&snapshot)]);
    // Of a daemon that dies while it merges.
    let inode = disk.path.metadata().unwrap().ino();
    let lock = lock_qemu_image(&snapshot, LockedOfImage::Merge(inode)).unwrap();
    disk.step(SnapshotStep::Merge).unwrap();
    kill(disk.daemon());
    check(&mut client, 16);
    disk.step(SnapshotStep::Merge).unwrap();
    drop(lock);
    disk.snapshot(&["cancel", "d"]);
    disk.step(SnapshotStep::Finish).unwrap_err();
    disk.snapshot(&["commit", "d", text(&snapshot)]);
    check(&mut client, 16);
    assert_eq!(disk.files(), std::slice::from_ref(&disk.path));
    disk.end(client, server);
}

#[test]
fn a_new_image_that_cannot_be_served_is_taken_back() {
    let Some(disk) = Disk::new() else { return };
    let (server, mut client) = disk.serve_failing(2);
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

#[test]
fn files_that_would_be_lost_or_found_elsewhere_are_refused() {
    let Some(lab) = crate::lab() else { return };
    let folder = |name: &str| {
        fs::create_dir(lab.path(name)).unwrap();
        lab.path(name)
    };
    let (here, there) = (folder("here"), folder("there"));
    let (base, path) = (here.join("base.qcow2"), here.join("disk.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", text(&base), "16M"]);
    let over = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu_img(&[&over[..], &[text(&base), text(&path)]].concat());
    // By a link.
    let link = lab.path("link.qcow2");
    symlink(&path, &link).unwrap();
    let spec = format!("d=qcow2:{}", link.display());
    let disk = Disk { lab, path, spec };
    let (server, mut client) = disk.serve_client();
    write_all(&mut client, 1);
    for suffix in [".ublkup-old", ".ublkup-new"] {
        let own = format!("{}{suffix}", disk.path.display());
        for command in ["create", "backup"] {
            disk.snapshot_fails(&[command, "d", &own], &["use that name themselves"]);
        }
    }
    // On the same file system: the new image names the snapshot by its whole path.
    let elsewhere = there.join("s.qcow2");
    disk.snapshot(&["create", "d", text(&elsewhere)]);
    check(&mut client, 1);
    let to_it = disk.lab.path("to-it");
    symlink(&elsewhere, &to_it).unwrap();
    disk.snapshot(&["commit", "d", text(&to_it)]);
    assert!(!elsewhere.exists() && !disk.path.is_symlink());
    check(&mut client, 1);
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
    let output = disk
        .lab
        .command(&["snapshot", "create", "d"])
        .arg(odd)
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("UTF-8"));
    // Two commands at once.
    let names = lock_qemu_image(&disk.path, LockedOfImage::Names).unwrap();
    let beside = here.join("s.qcow2");
    disk.snapshot_fails(
        &["create", "d", text(&beside)],
        &["another command is at work"],
    );
    drop(names);
    // A command that was killed when the image had both names.
    fs::hard_link(&disk.path, &beside).unwrap();
    disk.snapshot(&["create", "d", text(&beside)]);
    check(&mut client, 1);
    disk.snapshot(&["commit", "d", text(&beside)]);
    check(&mut client, 1);
    flush(&mut client);
    disk.end(client, server);
    assert_eq!(disk.files(), [base, disk.path.clone()]);
}

/// An image over a template in another folder, which names what it lies over from there.
#[test]
fn a_template_that_would_find_another_file_is_not_moved() {
    let Some(lab) = crate::lab() else { return };
    let template = lab.path("template");
    fs::create_dir(&template).unwrap();
    let [base, middle] = ["base.qcow2", "middle.qcow2"].map(|name| template.join(name));
    let path = lab.path("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&base), "16M"]);
    let over = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    qemu_img(&[&over[..], &["base.qcow2", text(&middle)]].concat());
    qemu_img(&[&over[..], &[text(&middle), text(&path)]].concat());
    let spec = format!("d=qcow2:{}", path.display());
    let disk = Disk { lab, path, spec };
    let (server, mut client) = disk.serve_client();
    write_all(&mut client, 1);
    disk.snapshot_fails(
        &["commit", "d", text(&middle)],
        &["as seen from its own folder"],
    );
    // An image that names it so must not go elsewhere, either.
    let beside = disk.lab.path("s.qcow2");
    disk.snapshot(&["create", "d", text(&beside)]);
    let elsewhere = template.join("s2.qcow2");
    disk.snapshot_fails(
        &["create", "d", text(&elsewhere)],
        &["as seen from its own folder"],
    );
    check(&mut client, 1);
    disk.snapshot(&["commit", "d", text(&beside)]);
    assert!(middle.exists());
    disk.end(client, server);
}

#[test]
fn a_merged_image_that_cannot_be_served_is_taken_back() {
    let Some(disk) = Disk::new() else { return };
    // That after the merge.
    let (server, mut client) = disk.serve_failing(3);
    let snapshot = disk.lab.path("s.qcow2");
    disk.snapshot(&["create", "d", text(&snapshot)]);
    write_all(&mut client, 1);
    disk.snapshot_fails(
        &["commit", "d", text(&snapshot)],
        &["it cannot be", "as before"],
    );
    check(&mut client, 1);
    disk.snapshot(&["commit", "d", text(&snapshot)]);
    check(&mut client, 1);
    flush(&mut client);
    assert_eq!(disk.files(), std::slice::from_ref(&disk.path));
    disk.end(client, server);
}
