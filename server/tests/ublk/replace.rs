//! A server is replaced by another one, in order or at the worst moment, and nobody gets an error.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use ublkup::engine::crash;

use super::common::{Driver, OK, eventually};
use super::recovery::Disk;
use super::upgrade::{BLOCK, direct, errno, leave, read_block, stat, write_block};
use super::{MIB, is_gone, run};
use testkit::server::Server;

/// A program that writes to the block device and reads back what it wrote, all the time.
struct Writer {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Writer {
    fn new(device: &Path) -> Self {
        let file = direct(device);
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let thread = std::thread::spawn({
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let round = rounds.load(Ordering::Relaxed);
                    let byte = round.to_le_bytes()[0];
                    write_block(&file, round % 256, byte)?;
                    let got = read_block(&file, round % 256);
                    assert!(got.0.iter().all(|&b| b == byte), "round {round} is lost");
                    rounds.store(round + 1, Ordering::Relaxed);
                }
                Ok(())
            }
        });
        Self {
            stop,
            rounds,
            thread,
        }
    }

    /// Waits until it has done something since.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        eventually("the writer goes on", || {
            assert!(!self.thread.is_finished(), "the writer gave up");
            self.rounds.load(Ordering::Relaxed) > before + 3
        });
    }

    fn end(self) {
        self.goes_on();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap();
    }
}

fn sequence(device: &Path) -> String {
    let name = device.file_name().unwrap().to_str().unwrap();
    fs::read_to_string(format!("/sys/block/{name}/diskseq")).unwrap()
}

fn devices() -> usize {
    fs::read_dir("/sys/class/ublk-char").unwrap().count()
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn nobody_notices_that_servers_are_replaced() {
    let disk = Disk::new();
    let mut server = disk.serve(&["--queues", "2"]);
    let device = disk.device();
    let (writer, disk_sequence) = (Writer::new(&device), sequence(&device));
    for _ in 0..5 {
        writer.goes_on();
        let next = disk.serve(&["--take-over"]);
        assert_eq!(server.exit_code().unwrap(), Some(0));
        assert_eq!(stat(&disk.lab)["pid"], next.pid());
        assert_eq!(disk.device(), device);
        assert_eq!(sequence(&device), disk_sequence);
        server = next;
    }
    writer.end();
    server.stop().unwrap();
    disk.lab.is_clean();
    assert!(!device.exists());
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_signal_leaves_the_disk_to_who_recovers_it() {
    let disk = Disk::new();
    let server = disk.serve(&[]);
    let (device, writer) = (disk.device(), Writer::new(&disk.device()));
    let (status, log) = server.end_by(rustix::process::Signal::USR2).unwrap();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(device.exists());
    disk.lab.fails(
        &["stat", "d"],
        1,
        &["the server of 'd' has died", "recover d"],
    );
    // All that is needed is noted.
    let server = disk.lab.recover(&["d"]);
    assert_eq!(disk.device(), device);
    writer.end();
    // Who lives need not be recovered, unless that is what is wanted.
    disk.lab.fails(&["recover", "d"], 1, &["already served"]);
    let next = disk.lab.recover(&["d", "--take-over"]);
    assert_eq!(server.exit_code().unwrap(), Some(0));
    next.stop().unwrap();
    disk.lab.is_clean();
    disk.lab
        .fails(&["recover", "d"], 1, &["there is no note", "'d'"]);
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_client_that_has_the_disk_keeps_it_when_the_server_is_replaced() {
    let disk = Disk::new();
    let grace = ["--reconnect-grace", "3600"];
    let server = disk.serve(&grace);
    let held = direct(&disk.device());
    let mut driver: Driver = disk.come(&held);
    assert_eq!(driver.write(0, &[b'a'; BLOCK]), OK);
    let next = disk.serve(&[&grace[..], &["--take-over"]].concat());
    assert_eq!(server.exit_code().unwrap(), Some(0));
    // It was hung up on, and nobody else writes until it is back.
    drop(driver);
    assert_eq!(disk.access(), "waiting");
    assert_eq!(errno(write_block(&held, 0, b'x')), Some(libc::EBADE));
    let mut driver = disk.come(&held);
    assert_eq!(driver.read(0, BLOCK), (OK, vec![b'a'; BLOCK]));
    assert_eq!(disk.access(), "upgraded");
    leave(driver);
    eventually("the client leaves", || disk.access() == "block");
    drop(held);
    next.stop().unwrap();
    disk.lab.is_clean();
}

/// The points at which the server dies that is asked to leave; the others are the new one's.
const OLD: [&str; 4] = [
    "asked-to-leave",
    "quiesced",
    "block-door-left",
    "doors-left",
];

/// Serves with a server that dies on its way, as is seen.
fn serve_and_die(disk: &Disk, args: &[&str], point: &str) {
    let spec = format!("file:{}", disk.image.display());
    let args = [&["serve", "--ublk", "yes", "--name", "d", &spec], args].concat();
    let output = disk.lab.finish(&args, &[(crash::VARIABLE, point)]);
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(
        output.status.signal(),
        Some(libc::SIGKILL),
        "{point}: {output:?}"
    );
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn whenever_one_of_two_servers_dies_the_next_one_goes_on() {
    let disk = Disk::new();
    let mut server = disk.serve(&[]);
    let (device, writer) = (disk.device(), Writer::new(&disk.device()));
    for point in crash::POINTS {
        // Passed when a device is made, and this one stays.
        if ["device-recorded", "mark-noted"].contains(&point) {
            continue;
        }
        let next = if OLD.contains(&point) {
            server.kill().unwrap();
            server = disk.serve_with(&[], &[(crash::VARIABLE, point)]);
            let next = disk.serve(&["--take-over"]);
            assert_eq!(server.exit_code().unwrap(), None, "{point}: it was to die");
            next
        } else {
            serve_and_die(&disk, &["--take-over"], point);
            assert_eq!(server.exit_code().unwrap(), Some(0));
            disk.lab.recover(&["d"])
        };
        assert_eq!(disk.device(), device, "{point}");
        writer.goes_on();
        server = next;
    }
    writer.end();
    server.stop().unwrap();
    disk.lab.is_clean();
    assert_eq!(devices(), 0);
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn whenever_a_server_dies_that_makes_a_device_it_is_found_and_no_second_one_is_left() {
    let disk = Disk::new();
    for point in crash::POINTS {
        if OLD.contains(&point) {
            continue;
        }
        serve_and_die(&disk, &[], point);
        let server = disk.serve(&[]);
        assert_eq!(devices(), 1, "{point}");
        write_block(&direct(&disk.device()), 0, b'1').unwrap();
        server.stop().unwrap();
        disk.lab.is_clean();
        // And it can be removed.
        serve_and_die(&disk, &[], point);
        disk.lab.ok(&["doctor", "--clean"]);
        disk.lab.is_clean();
        assert_eq!(devices(), 0, "{point}");
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_does_not_leave_to_one_that_could_not_go_on() {
    let disk = Disk::new();
    let server = disk.serve(&[]);
    let writer = Writer::new(&disk.device());
    let smaller = disk.lab.image("smaller.img", 32 * MIB);
    let spec = format!("d=file:{}", disk.image.display());
    let smaller = format!("d=file:{}", smaller.display());
    for (args, word) in [
        (
            &["--ublk", "no", &spec][..],
            "the ublk door would be closed",
        ),
        (&["--ublk-id", "77", &spec], "not /dev/ublkb77"),
        (&["--read-only", &spec], "read-only"),
        (&["d=file:/nowhere"], "cannot open /nowhere"),
        (&["d=mem:64M"], "goes with its server"),
        (&[&smaller], "is not the one that was served"),
        (&["--block-size", "4096", &spec], "blocks of 512 bytes"),
    ] {
        let args = [&["--take-over"], args].concat();
        disk.lab.serve_fails(&args, 1, &[word]);
        writer.goes_on();
    }
    writer.end();
    server.stop().unwrap();
    disk.lab.is_clean();
    let memory = disk.lab.serve(&["m=mem:1M"]);
    disk.lab
        .serve_fails(&["--take-over", "m=null:1M"], 1, &["goes with its server"]);
    memory.stop().unwrap();
    disk.lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_that_cannot_serve_leaves_all_that_is_noted() {
    let disk = Disk::new();
    let server = disk.serve(&["--reconnect-grace", "3600"]);
    let held = direct(&disk.device());
    let mut driver = disk.come(&held);
    assert_eq!(driver.write(0, &[b'a'; BLOCK]), OK);
    server.kill().unwrap();
    drop(driver);
    let spec = format!("d=file:{}", disk.image.display());
    let other = format!("other=file:{}", disk.image.display());
    let other = disk.lab.serve(&["--ublk", "no", &other]);
    let serve = ["--ublk", "yes", &spec];
    disk.lab.serve_fails(&serve, 1, &["in use"]);
    other.stop().unwrap();
    for (options, why) in [
        (["--ublk-id", "77"], "option ublk-id"),
        (["--ublk", "no"], "option ublk"),
    ] {
        let take_over = [&["--take-over", spec.as_str()][..], &options].concat();
        disk.lab.serve_fails(&take_over, 1, &["recover d", why]);
    }
    // Neither that a client has the disk nor how it is served was forgotten.
    let server = disk.lab.recover(&["d"]);
    assert_eq!(disk.access(), "waiting");
    assert_eq!(errno(write_block(&held, 0, b'x')), Some(libc::EBADE));
    let mut driver = disk.come(&held);
    assert_eq!(driver.read(0, BLOCK), (OK, vec![b'a'; BLOCK]));
    leave(driver);
    eventually("the client leaves", || disk.access() == "block");
    drop(held);
    server.stop().unwrap();
    disk.lab.is_clean();
}

/// A server that takes over from another, and fails when it has done so.
fn fails_late(disk: &Disk, server: Server, why: &[&str]) {
    let spec = format!("d=file:{}", disk.image.display());
    let args = ["--take-over", "--ublk", "yes", &spec];
    disk.lab.serve_fails(&args, 1, why);
    assert_eq!(server.exit_code().unwrap(), Some(0));
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn whatever_a_server_fails_at_that_took_over_the_device_waits() {
    let disk = Disk::new();
    // A runtime directory that can be full.
    let run_dir = disk.lab.path("run");
    fs::create_dir(&run_dir).unwrap();
    let mount = ["-t", "tmpfs", "-o", "mode=755,size=256k", "none"];
    run(
        "mount",
        &[&mount[..], &[run_dir.to_str().unwrap()]].concat(),
    )
    .unwrap();
    let server = disk.serve(&[]);
    let (device, writer) = (disk.device(), Writer::new(&disk.device()));
    let disk_sequence = sequence(&device);

    // The device cannot be noted.
    let full = run_dir.join("full");
    fs::write(&full, vec![1u8; 1 << 20]).unwrap_err();
    fails_late(&disk, server, &["No space", "recover d"]);
    fs::remove_file(&full).unwrap();
    let server = disk.lab.recover(&["d"]);
    writer.goes_on();

    // What is served cannot.
    let served = run_dir.join("exports/d/served");
    fs::remove_file(&served).unwrap();
    fs::create_dir(&served).unwrap();
    fails_late(&disk, server, &["cannot write to", "recover d"]);
    fs::remove_dir(&served).unwrap();
    let server = disk.serve(&[]);
    writer.goes_on();

    // Nor where it is served.
    let output = Command::new(env!("CARGO_BIN_EXE_ublkup"))
        .args(["serve", "--take-over", "--ublk", "yes"])
        .arg(format!("d=file:{}", disk.image.display()))
        .env("UBLKUP_RUNTIME_DIR", &run_dir)
        .stdout(File::options().write(true).open("/dev/full").unwrap())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("standard output"), "{said}");
    assert_eq!(
        (output.status.code(), server.exit_code().unwrap()),
        (Some(1), Some(0))
    );
    let server = disk.lab.recover(&["d"]);
    writer.goes_on();

    // Nor the other exports of the same server.
    let two = [
        "--take-over",
        "--ublk",
        "yes",
        &format!("d=file:{}", disk.image.display()),
        "e=file:/nowhere",
    ];
    disk.lab.serve_fails(&two, 1, &["e: ", "/nowhere"]);
    assert_eq!(server.exit_code().unwrap(), Some(0));
    let server = disk.lab.recover(&["d"]);

    writer.end();
    assert_eq!(disk.device(), device);
    assert_eq!(sequence(&device), disk_sequence);
    server.stop().unwrap();
    disk.lab.is_clean();
    run("umount", &[run_dir.to_str().unwrap()]).unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn requests_fail_or_wait_or_the_device_goes_as_was_asked() {
    let disk = Disk::new();
    let server = disk.serve(&["--ublk-recovery", "fail-io"]);
    let (device, held) = (disk.device(), direct(&disk.device()));
    assert!(has(&disk, "USER_RECOVERY_FAIL_IO") && !has(&disk, "USER_RECOVERY_REISSUE"));
    server.kill().unwrap();
    eventually("requests fail", || {
        errno(write_block(&held, 1, b'1')) == Some(libc::EIO)
    });
    let server = disk.serve(&[]);
    assert_eq!(disk.device(), device);
    write_block(&held, 1, b'2').unwrap();
    assert!(read_block(&held, 1).0.iter().all(|&b| b == b'2'));
    // Between two servers they fail as well; afterwards all is as before.
    let next = disk.serve(&["--take-over"]);
    assert_eq!(server.exit_code().unwrap(), Some(0));
    write_block(&held, 1, b'3').unwrap();
    drop(held);
    next.stop().unwrap();
    disk.lab.is_clean();
    let server = disk.serve(&["--ublk-recovery", "off"]);
    assert!(!has(&disk, "USER_RECOVERY"));
    disk.lab.serve_fails(
        &[&format!("d=file:{}", disk.image.display()), "--take-over"],
        1,
        &["goes with its server"],
    );
    server.kill().unwrap();
    eventually("the disk goes", || !disk_exists(&device));
    disk.lab.ok(&["doctor", "--clean"]);
    assert!(is_gone(0));
    disk.lab.is_clean();
}

fn disk_exists(device: &Path) -> bool {
    let name = device.file_name().unwrap();
    Path::new("/sys/block").join(name).exists()
}

fn has(disk: &Disk, feature: &str) -> bool {
    let features = stat(&disk.lab)["ublk"]["features"].clone();
    features
        .as_array()
        .unwrap()
        .iter()
        .any(|one| one == feature)
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_that_somebody_uses_is_not_stopped_without_force() {
    let disk = Disk::new();
    let serve = || -> (Server, PathBuf) {
        let server = disk.serve(&[]);
        (server, disk.device())
    };
    let (server, device) = serve();
    let held: File = direct(&device);
    let us = format!("process {}", std::process::id());
    let stop = ["stop", "d"];
    disk.lab.fails(
        &stop,
        1,
        &["in use", device.to_str().unwrap(), &us, "--force"],
    );
    write_block(&held, 1, b'1').unwrap();
    // A client that has the disk counts as well.
    let driver = disk.come(&held);
    drop(held);
    disk.lab.fails(&stop, 1, &["in use", &us]);
    leave(driver);
    eventually("the client leaves", || disk.access() == "block");
    disk.lab.ok(&stop);
    assert_eq!(server.exit_code().unwrap(), Some(0));
    disk.lab.is_clean();
    assert!(!device.exists());
    // A file system is named by its mount point.
    let (server, device) = serve();
    let name = device.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", name]).unwrap();
    let mount = disk.lab.path("mnt");
    fs::create_dir(&mount).unwrap();
    let mount = mount.to_str().unwrap();
    run("mount", &[name, mount]).unwrap();
    disk.lab.fails(&stop, 1, &["in use", mount]);
    run("umount", &[mount]).unwrap();
    disk.lab.ok(&stop);
    server.wait().unwrap();
    let (server, device) = serve();
    let held = direct(&device);
    disk.lab.ok(&["stop", "d", "--force"]);
    assert_eq!(server.exit_code().unwrap(), Some(0));
    assert!(write_block(&held, 1, b'1').is_err());
    drop(held);
    // What a service manager sends needs no force.
    let (server, device) = serve();
    let held = direct(&device);
    server.stop().unwrap();
    drop(held);
    disk.lab.is_clean();
}
