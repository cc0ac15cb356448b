//! A server dies, the block device stays, and the next server recovers it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use upgrade_proto::{Answer, Lookup, connect};

use super::common::{Driver, OK, eventually};
use super::common::{Sandbox, sandbox};
use super::upgrade::{BLOCK, PLAIN, direct, errno, leave, read_block, service, stat, write_block};
use testkit::images::{Mounted, mount};
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

/// ext4 on the block device of a server that is dead, and a write to it that waits.
struct Mount {
    disk: Disk,
    device: PathBuf,
    mounted: Mounted,
    writer: JoinHandle<std::io::Result<()>>,
}

impl Mount {
    fn new(disk: Disk) -> Self {
        let server = disk.serve(&[]);
        let device = disk.device();
        // Half of the disk, so that what is behind it can be cut off and come back.
        let args = ["-q", device.to_str().unwrap(), "32M"];
        super::run("mkfs.ext4", &args).unwrap();
        let mounted = mount(&device, "ext4", &disk.lab.path("mnt"), false).unwrap();
        std::fs::write(mounted.dir().join("before"), "text").unwrap();
        server.kill().unwrap();
        let path = mounted.dir().join("after");
        let writer = std::thread::spawn(move || {
            let mut file = File::create(path)?;
            file.write_all(&[7; 100_000])?;
            file.sync_all()
        });
        Self {
            disk,
            device,
            mounted,
            writer,
        }
    }

    /// A server that is started like this refuses, and the file system waits as before.
    fn is_left(&self, args: &[&str], why: &str) {
        let words = [
            self.device.to_str().unwrap(),
            "left as it is",
            "--replace",
            why,
        ];
        self.disk.lab.fails(args, 1, &words);
        assert!(
            !self.writer.is_finished(),
            "{args:?}: the write did not wait"
        );
    }

    /// All is as it was: the next server goes on, and what waited is done.
    fn goes_on(self, args: &[&str]) {
        let server = match args {
            ["serve", args @ ..] => self.disk.lab.serve(args),
            _ => self.disk.lab.recover(&["d"]),
        };
        assert_eq!(self.disk.device(), self.device);
        self.writer.join().unwrap().unwrap();
        let mut got = Vec::new();
        let after = self.mounted.dir().join("after");
        File::open(after).unwrap().read_to_end(&mut got).unwrap();
        assert!(got.len() == 100_000 && got.iter().all(|&byte| byte == 7));
        self.mounted.unmount().unwrap();
        super::run("fsck.ext4", &["-fn", self.device.to_str().unwrap()]).unwrap();
        server.stop().unwrap();
        self.disk.lab.is_clean();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_restart_that_finds_something_else_leaves_the_mounted_file_system_waiting() {
    let mount = Mount::new(Disk::new());
    let image = mount.disk.image.clone();
    let spec = format!("d=file:{}", image.display());
    let serve = |more: &[&'static str]| [&["serve", spec.as_str()][..], more].concat();
    for (options, why) in [
        (&["--read-only"][..], "read-only"),
        (&["--block-size", "4096"], "block-size"),
        (&["--ublk", "no"], "option ublk"),
        (&["--ublk-id", "77"], "ublk-id"),
        (&["--take-over", "--read-only"], "read-only"),
    ] {
        mount.is_left(&serve(options), why);
    }
    let len = |bytes| {
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .set_len(bytes)
            .unwrap()
    };
    len(48 << 20);
    for args in [&["recover", "d"][..], &serve(&[])] {
        mount.is_left(args, "has 48M");
    }
    len(64 << 20);
    // Another file, the old one beside it.
    let kept = image.with_extension("kept");
    std::fs::rename(&image, &kept).unwrap();
    let args = ["recover", "d"];
    mount.disk.lab.fails(&args, 1, &["No such file"]);
    let other = File::create(&image).unwrap();
    other.set_len(64 << 20).unwrap();
    mount.is_left(&args, "not the one that was served");
    std::fs::rename(&kept, &image).unwrap();
    mount.goes_on(&args);
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_waiting_device_is_removed_when_a_person_says_so() {
    let disk = Disk::new();
    let spec = format!("file:{}", disk.image.display());
    for how in [
        "--replace",
        "stop",
        "doctor",
        "without its folder",
        "by name",
    ] {
        disk.serve(&[]).kill().unwrap();
        let (id, name) = (0, "/dev/ublkb0");
        assert!(!super::is_gone(id), "it does not wait");
        disk.lab.fails(
            &["stop", "d"],
            1,
            &["has died", "recover d", "stop --force d"],
        );
        let list = disk.lab.finish(&["list", "--json"], &[]);
        assert_eq!(list.status.code(), Some(1), "{list:?}");
        let listed: serde_json::Value = serde_json::from_str(&list.stdout).unwrap();
        assert_eq!(listed, serde_json::json!([{"name": "d", "state": "dead"}]));
        match how {
            "--replace" => {
                let sequence = std::fs::read_to_string("/sys/block/ublkb0/diskseq").unwrap();
                let server = disk.serve(&["--replace"]);
                let path = "/sys/block/ublkb0/diskseq";
                assert_ne!(std::fs::read_to_string(path).unwrap(), sequence);
                server.stop().unwrap();
            }
            "stop" => drop(disk.lab.ok(&["stop", "--force", "d"])),
            "doctor" => {
                let problem = disk.lab.finish(&["doctor"], &[]);
                assert_eq!(problem.status.code(), Some(1), "{problem:?}");
                disk.lab.ok(&["doctor", "--clean"]);
            }
            "without its folder" => {
                let folder = disk.lab.path("run/exports/d");
                std::fs::remove_dir_all(&folder).unwrap();
                // A server that cannot recover it does not make it a device of no known export.
                let refused = [
                    "serve",
                    "--ublk",
                    "yes",
                    "--read-only",
                    &format!("d={spec}"),
                ];
                disk.lab.fails(&refused, 1, &[name, "waits for a server"]);
                let advice = disk.lab.finish(&["doctor"], &[]);
                assert_eq!(advice.status.code(), Some(1), "{advice:?}");
                assert!(advice.stdout.contains("'ublkup recover d'"), "{advice:?}");
                assert!(!advice.stdout.contains("doctor --remove"), "{advice:?}");
                disk.lab.recover(&["d"]).kill().unwrap();
                std::fs::remove_dir_all(&folder).unwrap();
                let whose = "made for the export 'd'";
                disk.lab
                    .fails(&["doctor", "--remove", name], 1, &["--yes", whose]);
                disk.lab.ok(&["doctor", "--clean"]);
            }
            _ => {
                // Nothing is known of it.
                for lost in ["exports", "devices"] {
                    let lost = disk.lab.path(&format!("run/{lost}/d"));
                    let lost = [std::fs::remove_dir_all(&lost), std::fs::remove_file(&lost)];
                    assert!(lost.iter().any(Result::is_ok), "{lost:?}");
                }
                let seen = disk.lab.finish(&["doctor", "--clean"], &[]);
                assert_eq!(seen.status.code(), Some(1), "{seen:?}");
                assert!(seen.stdout.contains(name), "{seen:?}");
                disk.lab.fails(&["doctor", "--remove", name], 1, &["--yes"]);
                assert!(!super::is_gone(id), "it went without a word");
                disk.lab.ok(&["doctor", "--remove", name, "--yes"]);
            }
        }
        assert!(super::is_gone(id), "{how}: the device is left");
        disk.lab.is_clean();
    }
    disk.serve(&[]).kill().unwrap();
    // The driver is there, and where only its control device is hidden nothing is known.
    let hidden = format!(
        "mount -t tmpfs none /dev && exec {} --runtime-dir {} serve --ublk no d={spec}",
        env!("CARGO_BIN_EXE_ublkup"),
        disk.lab.path("run").display()
    );
    let hidden = std::process::Command::new("timeout")
        .args(["60", "unshare", "-m", "sh", "-c", &hidden])
        .output();
    let hidden = hidden.unwrap();
    assert_eq!(hidden.status.code(), Some(1), "{hidden:?}");
    assert!(!super::is_gone(0), "{hidden:?}");
    disk.lab.recover(&["d"]).stop().unwrap();
    let server = disk.lab.serve(&["--ublk", "yes", &spec]);
    let living = disk
        .lab
        .finish(&["doctor", "--remove", "/dev/ublkb0", "--yes"], &[]);
    assert_eq!(living.status.code(), Some(1), "{living:?}");
    server.stop().unwrap();
}

/// What a guest could write that has taken the server of `d` over: that the block device of another export is its own.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_note_that_names_the_device_of_another_export_gets_nothing_done_to_it() {
    let disk = Disk::new();
    let lab = &disk.lab;
    let other = lab.image("other.img", 64 << 20);
    let spec = format!("other=file:{}", other.display());
    let device = |name: &str| -> PathBuf {
        let stat = lab.ok(&["stat", name, "--json"]);
        let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
        stat["ublk"]["device"].as_str().unwrap().into()
    };
    let server = lab.serve(&["--ublk", "yes", &spec]);
    let others = device("other");
    server.kill().unwrap();
    let server = disk.serve(&[]);
    let own = device("d");
    server.kill().unwrap();
    let note = |name: &str| lab.path(&format!("run/exports/{name}/ublk-id"));
    let record = lab.path("run/devices/d");
    let notes = ["d", "other"].map(|name| std::fs::read_to_string(note(name)).unwrap());
    let words = notes[1]
        .split(' ')
        .take(3)
        .chain(notes[0].split(' ').skip(3));
    let forged = words.collect::<Vec<_>>().join(" ");
    std::fs::write(note("d"), &forged).unwrap();
    // The record says which one it is.
    let server = lab.recover(&["d"]);
    assert_eq!(device("d"), own);
    server.kill().unwrap();
    std::fs::write(note("d"), &forged).unwrap();
    // Without a record nothing does.
    std::fs::remove_file(&record).unwrap();
    let refused = [
        "no record that it was made for this export",
        others.to_str().unwrap(),
    ];
    lab.fails(&["recover", "d"], 1, &refused);
    lab.fails(&["stop", "--force", "d"], 1, &refused);
    assert!(others.exists(), "the device of another export was removed");
    std::fs::remove_file(note("d")).unwrap();
    lab.ok(&["stop", "--force", "d"]);
    let server = lab.recover(&["other"]);
    assert_eq!(device("other"), others);
    server.stop().unwrap();
    assert!(!others.exists() && own.exists());
    lab.ok(&["doctor", "--remove", own.to_str().unwrap(), "--yes"]);
    lab.is_clean();
}

/// An image on XFS that was copied by reference while it was served: statx(2) now names larger blocks.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn an_image_that_shares_extents_with_a_copy_is_served_as_before() {
    // The lab's User Mode Linux has XFS, and its configuration is checked for it.
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !known.lines().any(|line| line.trim() == "xfs") {
        let machine = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        assert!(!machine.contains("User Mode Linux"), "it has no XFS");
        return;
    }
    let mut disk = Disk::new();
    let host = disk.lab.image("xfs.img", 500 << 20);
    super::run(
        "mkfs.xfs",
        &["-q", "-m", "reflink=1", host.to_str().unwrap()],
    )
    .unwrap();
    let looped = super::run("losetup", &["-f", "--show", host.to_str().unwrap()]).unwrap();
    let looped = Path::new(looped.trim());
    let xfs = mount(looped, "xfs", &disk.lab.path("xfs"), false).unwrap();
    disk.image = xfs.dir().join("disk.img");
    File::create(&disk.image)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    for args in [&["recover"][..], &["serve"]] {
        let mount = Mount::new(Disk {
            lab: sandbox(),
            image: disk.image.clone(),
        });
        let copy = xfs.dir().join("copy");
        let files = [disk.image.to_str().unwrap(), copy.to_str().unwrap()];
        super::run("cp", &[&["--reflink=always"][..], &files].concat()).unwrap();
        let spec = format!("d=file:{}", disk.image.display());
        let args = [args, &["--ublk", "yes", spec.as_str()]].concat();
        mount.goes_on(&args);
    }
    xfs.unmount().unwrap();
    super::run("losetup", &["-d", looped.to_str().unwrap()]).unwrap();
}
