//! The ublk door against a real driver.
//!
//! These tests make devices: they need root and `/dev/ublk-control`, so an ordinary `cargo test`
//! shows them as ignored. Where a driver is, run them with `-- --ignored --test-threads=1`.
//! All I/O is done by other processes: a server must not open its own disk.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;
#[path = "ublk/data.rs"]
mod data;
#[path = "ublk/features.rs"]
mod features;
#[path = "ublk/nobody.rs"]
mod nobody;
#[path = "ublk/recovery.rs"]
mod recovery;
#[path = "ublk/replace.rs"]
mod replace;
#[path = "ublk/resize.rs"]
mod resize;
#[path = "ublk/unprivileged.rs"]
mod unprivileged;
#[path = "ublk/upgrade.rs"]
mod upgrade;

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::sandbox;
use libublk::ctrl::UblkCtrl;
use testkit::proc::{context_switches, sleeps};
use testkit::wait::{PATIENCE, wait_for};
use ublkup::door::ublk::{self, DataPath, DoorEnd, UblkConfig, UblkDoor, UblkError};
use ublkup::engine::counters::{Counters, Totals};
use ublkup::engine::{Storage, StorageControl, StorageQueue};
use ublkup::export::name_lock::DeviceNote;
use ublkup::export::remove_stale_device;
use ublkup::export::runtime_dir::RuntimeDir;
use ublkup::io::{Ring, Slot};
use ublkup::request::{Limits, Op, Progress, Request, Serial};
use ublkup::storage::{Memory, Null};

const MIB: u64 = 1 << 20;

/// Set for the copy of this program that is killed.
const VICTIM: &str = "UBLK_TEST_VICTIM";

fn limits() -> Limits {
    Limits {
        capacity: (64 * MIB).into(),
        block_bytes: 512,
        physical_block_bytes: 4096,
        optimal_io_bytes: 1 << 16,
        max_io_bytes: 1 << 19,
        discard_granularity_bytes: 4096,
        max_discard_bytes: 1 << 30,
        max_write_zeroes_bytes: 1 << 29,
        read_only: false,
        write_cache: true,
        serial: Serial::new("test").expect("a plain word"),
    }
}

fn config() -> UblkConfig {
    UblkConfig {
        id: None,
        queues: 4,
        depth: 32,
        threads: ublkup::engine::threads::ThreadOptions::default(),
        affinity: None,
        scan_partitions: true,
        recovery: ublkup::door::ublk::Recovery::Off,
        mark: 1,
        data: DataPath::Auto,
        ring_places: None,
        take_over: None,
        refuse_writes: false,
    }
}

fn no_end(end: DoorEnd) {
    panic!("the device ended by itself: {end:?}");
}

fn serve<B: Storage>(backend: B) -> UblkDoor {
    UblkDoor::start(&config(), &Arc::new(backend), Arc::default, no_end).expect("a device")
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

fn dd(from: &Path, to: &Path, flags: &[&str]) -> Result<String, String> {
    let (from, to) = (
        format!("if={}", from.display()),
        format!("of={}", to.display()),
    );
    run("dd", &[&[from.as_str(), to.as_str()], flags].concat())
}

fn queue_attribute(door: &UblkDoor, name: &str) -> String {
    let path = format!("/sys/block/ublkb{}/queue/{name}", door.id());
    fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{path}: {error}"))
        .trim()
        .to_owned()
}

/// A scratch file of bytes that do not repeat.
fn noise(name: &str, bytes: u64) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ublk-test-{}-{name}", std::process::id()));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = (0..bytes / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_ne_bytes()
    });
    fs::write(&path, words.collect::<Vec<u8>>()).expect("room for a scratch file");
    path
}

fn is_gone(id: u32) -> bool {
    !Path::new(&format!("/dev/ublkc{id}")).exists()
        && !Path::new(&format!("/dev/ublkb{id}")).exists()
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn the_block_device_has_the_attributes_of_the_disk() {
    let door = serve(Null::new(limits()));
    for (name, value) in [
        ("logical_block_size", "512"),
        ("physical_block_size", "4096"),
        ("minimum_io_size", "4096"),
        ("optimal_io_size", "65536"),
        ("max_hw_sectors_kb", "512"),
        ("discard_granularity", "4096"),
        ("discard_max_hw_bytes", "1073741824"),
        ("write_zeroes_max_bytes", "536870912"),
        ("write_cache", "write back"),
        ("fua", "1"),
        ("rotational", "0"),
    ] {
        assert_eq!(queue_attribute(&door, name), value, "{name}");
    }
    let path = door.block_path();
    let sizes = ["--getsize64", "--getss", "--getpbsz", "--getro"];
    let args = [&sizes[..], &[path.to_str().unwrap()]].concat();
    assert_eq!(run("blockdev", &args).unwrap(), "67108864\n512\n4096\n0");
    door.stop().unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_without_cache_and_discard_has_neither() {
    let mut plain = limits();
    plain.block_bytes = 4096;
    plain.write_cache = false;
    plain.max_discard_bytes = 0;
    plain.max_write_zeroes_bytes = 0;
    plain.optimal_io_bytes = 0;
    let door = serve(Null::new(plain));
    for (name, value) in [
        ("logical_block_size", "4096"),
        ("optimal_io_size", "0"),
        ("discard_max_hw_bytes", "0"),
        ("write_zeroes_max_bytes", "0"),
        ("write_cache", "write through"),
    ] {
        assert_eq!(queue_attribute(&door, name), value, "{name}");
    }
    door.stop().unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn what_is_written_is_read_back_and_counted() {
    let counters: [Arc<Counters>; 4] = Default::default();
    let mut queues = counters.iter();
    let backend = Arc::new(Memory::new(limits()).unwrap());
    let next = || Arc::clone(queues.next().expect("no more queues than asked for"));
    let door = UblkDoor::start(&config(), &backend, next, no_end).unwrap();
    let disk = door.block_path();
    let wanted = noise("wanted", 16 * MIB);
    let got = wanted.with_extension("got");
    for block in ["bs=512", "bs=24k", "bs=2M"] {
        // Behind the first 512 bytes, so that nothing is aligned to a page.
        let write = ["oflag=direct,seek_bytes", "seek=512", "conv=fsync", block];
        let read = ["iflag=direct,skip_bytes,count_bytes", "skip=512", "bs=1M"];
        dd(&wanted, &disk, &write).unwrap();
        let count = format!("count={}", 16 * MIB);
        dd(&disk, &got, &[&read[..], &[count.as_str()]].concat()).unwrap();
        run("cmp", &[wanted.to_str().unwrap(), got.to_str().unwrap()]).unwrap();
    }
    let disk = disk.to_str().unwrap();
    run("blkdiscard", &["-f", "-z", "-l", "4194304", disk]).unwrap();
    run("cmp", &["-n", "4194304", "/dev/zero", disk]).unwrap();
    run(
        "blkdiscard",
        &["-f", "-o", "4194304", "-l", "4194304", disk],
    )
    .unwrap();
    door.stop().unwrap();
    let mut totals = Totals::default();
    counters.iter().for_each(|c| c.add_to(&mut totals));
    assert!(totals.write_bytes >= 3 * 16 * MIB, "{totals:?}");
    assert!(totals.read_bytes >= 3 * 16 * MIB, "{totals:?}");
    assert!(totals.flushes >= 3, "{totals:?}");
    assert!(
        totals.discards >= 1 && totals.write_zeroes >= 1,
        "{totals:?}"
    );
    assert_eq!(totals.errors, 0);
    let _ = (fs::remove_file(wanted), fs::remove_file(got));
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_read_only_disk_refuses_writes() {
    let mut read_only = limits();
    read_only.read_only = true;
    let door = serve(Null::new(read_only));
    let disk = door.block_path();
    let ro = run("blockdev", &["--getro", disk.to_str().unwrap()]);
    assert_eq!(ro.unwrap(), "1");
    let write = dd(
        Path::new("/dev/zero"),
        &disk,
        &["bs=4k", "count=1", "oflag=direct"],
    );
    assert!(write.is_err(), "{write:?}");
    door.stop().unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn fifty_starts_and_stops_leave_nothing_behind() {
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = || {
        fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count()
    };
    // The first one makes what stays: heaps of threads, the kernel's worker.
    serve(Null::new(limits())).stop().unwrap();
    let before = (open(), maps());
    for _ in 0..50 {
        let door = serve(Null::new(limits()));
        let id = door.id();
        assert!(!is_gone(id));
        door.stop().unwrap();
        assert!(is_gone(id));
    }
    assert_eq!(open(), before.0);
    assert!(maps() < before.1 + 20, "{} then {}", before.1, maps());
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_taken_id_is_refused_and_its_device_lives_on() {
    let door = serve(Null::new(limits()));
    let same = UblkConfig {
        id: Some(door.id()),
        ..config()
    };
    let second = UblkDoor::start(&same, &Arc::new(Null::new(limits())), Arc::default, no_end);
    assert!(matches!(second, Err(UblkError::IdInUse { id }) if id == door.id()));
    let error = ublk::remove(door.id(), false).unwrap_err();
    assert!(matches!(error, UblkError::Alive { .. }), "{error}");
    assert!(error.to_string().contains(&std::process::id().to_string()));
    assert!(
        ublk::stale_devices()
            .unwrap()
            .iter()
            .all(|l| l.id != door.id())
    );
    let read = ["bs=4k", "count=1", "iflag=direct"];
    dd(&door.block_path(), Path::new("/dev/null"), &read).unwrap();
    door.stop().unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_device_with_a_server_is_not_stale_whatever_is_noted() {
    let door = serve(Null::new(limits()));
    let unmarked = UblkConfig {
        mark: 0,
        ..config()
    };
    let disk = Arc::new(Null::new(limits()));
    let other = UblkDoor::start(&unmarked, &disk, Arc::default, no_end).unwrap();
    let us = format!("process {}", std::process::id());
    let error = ublk::recoverable_device(door.id(), &limits()).unwrap_err();
    assert!(matches!(error, UblkError::Alive { .. }), "{error}");
    assert!(error.to_string().contains(&us), "{error}");
    // Who has no mark cannot be found by it.
    assert_eq!(ublk::marked(config().mark).unwrap(), Some(door.id()));
    assert_eq!(ublk::marked(0).unwrap(), None);

    let lab = sandbox();
    let dir = RuntimeDir::find(Some(lab.path("run"))).unwrap();
    let claim = dir.claim("d").unwrap();
    let noted = DeviceNote {
        id: Some(door.id()),
        disk_sequence: door.disk_sequence(),
        mark: Some(config().mark),
    };
    claim.note_device(&noted).unwrap();
    let error = remove_stale_device(&claim).unwrap_err().to_string();
    assert!(
        error.contains("left alone") && error.contains(&us),
        "{error}"
    );
    assert_eq!(claim.left_device(), Some(noted), "it was forgotten");
    // The number alone, and be it the disk's as well, is not the device.
    let noted = DeviceNote {
        mark: Some(config().mark + 1),
        ..noted
    };
    claim.note_device(&noted).unwrap();
    remove_stale_device(&claim).unwrap();
    assert_eq!(claim.left_device(), None);
    drop(claim);
    let read = ["bs=4k", "count=1", "iflag=direct"];
    for door in [door, other] {
        dd(&door.block_path(), Path::new("/dev/null"), &read).unwrap();
        door.stop().unwrap();
    }
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn impossible_devices_are_refused_in_one_line() {
    let start = |config, disk| {
        let backend = Arc::new(Null::new(disk));
        let door = UblkDoor::start(&config, &backend, Arc::default, no_end);
        door.map(drop).unwrap_err().to_string()
    };
    let far = UblkConfig {
        id: Some(1 << 30),
        ..config()
    };
    let mut coarse = limits();
    coarse.block_bytes = 1 << 20;
    for (text, word) in [
        (start(far, limits()), "1073741824"),
        (
            start(
                UblkConfig {
                    queues: 0,
                    ..config()
                },
                limits(),
            ),
            "queues",
        ),
        (
            start(
                UblkConfig {
                    depth: 5000,
                    ..config()
                },
                limits(),
            ),
            "4096",
        ),
        (start(config(), coarse), "1048576"),
    ] {
        assert!(text.contains(word) && !text.contains('\n'), "{text}");
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_device_stopped_by_somebody_else_is_removed_and_reported() {
    for delete in [false, true] {
        let (sender, ends) = channel();
        let report = move |end| sender.send(end).unwrap();
        let backend = Arc::new(Null::new(limits()));
        let door = UblkDoor::start(&config(), &backend, Arc::default, report).unwrap();
        let id = door.id();
        // A peer that is not ours.
        let other = UblkCtrl::new_simple(i32::try_from(id).unwrap()).unwrap();
        if delete {
            other.del_dev().unwrap();
        } else {
            other.kill_dev().unwrap();
        }
        let end = ends.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(end, DoorEnd::Outside), "{end:?}");
        assert!(is_gone(id));
        door.stop().unwrap();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn stopping_under_load_is_quick_and_clean() {
    let door = serve(Memory::new(limits()).unwrap());
    let of = format!("of={}", door.block_path().display());
    let mut load: Vec<_> = (0..4)
        .map(|_| {
            Command::new("dd")
                .args(["if=/dev/zero", &of, "bs=4k", "oflag=direct"])
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let (id, begin) = (door.id(), Instant::now());
    door.stop().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(is_gone(id));
    for dd in &mut load {
        dd.wait().unwrap();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_that_somebody_has_open_is_taken_away_and_its_id_comes_back_later() {
    let door = serve(Null::new(limits()));
    let (id, begin) = (door.id(), Instant::now());
    let hold = format!(
        "exec 9<{} && echo held && exec cat",
        door.block_path().display()
    );
    let mut holder = Command::new("sh")
        .args(["-c", &hold])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(holder.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    door.stop().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(is_gone(id));
    let again = || {
        let same = UblkConfig {
            id: Some(id),
            ..config()
        };
        UblkDoor::start(&same, &Arc::new(Null::new(limits())), Arc::default, no_end)
    };
    assert!(matches!(again(), Err(UblkError::IdInUse { .. })));
    // The end of its input ends the holder.
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let door = wait_for("the id is free", PATIENCE, || Ok(again().ok()));
    door.unwrap().stop().unwrap();
}

/// A disk whose queues misbehave.
struct Broken {
    limits: Limits,
    no_queue: bool,
}

impl StorageControl for Broken {
    fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Storage for Broken {
    type Queue = BrokenQueue;

    fn queue(&self, _ring: &mut Ring, _slots: u32) -> io::Result<BrokenQueue> {
        if self.no_queue {
            return Err(io::Error::other("no queue today"));
        }
        Ok(BrokenQueue)
    }
}

/// Panics at the first write.
struct BrokenQueue;

impl StorageQueue for BrokenQueue {
    fn start(&mut self, _: &mut Ring, _: Slot, request: &mut Request) -> Progress {
        assert!(
            !matches!(request.op(), Op::Write { .. }),
            "a bug, on purpose"
        );
        Progress::Done(Ok(()))
    }

    fn advance(&mut self, _: &mut Ring, _: Slot, _: &mut Request, _: u16, _: i32) -> Progress {
        unreachable!("nothing is ever pending")
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_queue_that_cannot_start_leaves_no_device() {
    let broken = Arc::new(Broken {
        limits: limits(),
        no_queue: true,
    });
    let config = UblkConfig {
        id: Some(240),
        ..config()
    };
    let error = UblkDoor::start(&config, &broken, Arc::default, no_end).unwrap_err();
    assert!(error.to_string().contains("no queue today"), "{error}");
    assert!(is_gone(240));
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_panic_in_a_queue_thread_fails_the_io_and_removes_the_device() {
    let (sender, ends) = channel();
    let broken = Arc::new(Broken {
        limits: limits(),
        no_queue: false,
    });
    let report = move |end| sender.send(end).unwrap();
    let door = UblkDoor::start(&config(), &broken, Arc::default, report).unwrap();
    let (id, begin) = (door.id(), Instant::now());
    let args = ["bs=4k", "count=1", "oflag=direct"];
    let write = dd(Path::new("/dev/zero"), &door.block_path(), &args);
    assert!(write.unwrap_err().contains("Input/output error"));
    let end = ends.recv_timeout(Duration::from_secs(20)).unwrap();
    let DoorEnd::Failed(error) = end else {
        panic!("{end:?}");
    };
    assert!(error.to_string().contains("panicked"), "{error}");
    assert!(is_gone(id));
    // The other queues did not wait for commands that no cancellation reaches (10 s, in vain).
    assert!(begin.elapsed() < Duration::from_secs(9));
    door.stop().unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_killed_server_leaves_a_dead_device_that_can_be_removed() {
    if std::env::var_os(VICTIM).is_some() {
        let door = serve(Null::new(limits()));
        println!("\nid {}", door.id());
        io::stdout().flush().unwrap();
        loop {
            std::thread::park();
        }
    }
    let name = "a_killed_server_leaves_a_dead_device_that_can_be_removed";
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", name])
        .env(VICTIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let id: u32 = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("id ")?.parse().ok())
        .expect("the victim serves");
    victim.kill().unwrap();
    victim.wait().unwrap();
    ublk::remove(id, false).unwrap();
    assert!(is_gone(id));
    ublk::remove(id, false).unwrap();
    assert!(ublk::stale_devices().unwrap().iter().all(|l| l.id != id));
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_with_both_doors_open_wakes_nobody_while_idle() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "yes", "--vhost", "yes", "d=mem:64M"]);
    let stat = upgrade::stat(&lab);
    let device = PathBuf::from(stat["ublk"]["device"].as_str().unwrap());
    let read = || {
        dd(
            &device,
            Path::new("/dev/null"),
            &["bs=4k", "count=8", "iflag=direct"],
        )
    };
    read().unwrap();
    sleeps(server.pid()).expect("with a block device");
    let connect = || UnixStream::connect(lab.path("run/exports/d/vhost-user-blk")).unwrap();
    let silent = connect();
    sleeps(server.pid()).expect("with a client that never said a word");
    drop(silent);
    let mut driver = common::Driver::running(connect(), upgrade::PLAIN);
    assert_eq!(driver.write(0, &[7; 512]), common::OK);
    sleeps(server.pid()).expect("with a client that has nothing to say");
    // The threads that were watched are the ones that work.
    let before = context_switches(server.pid()).unwrap();
    assert_eq!(driver.write(1, &[8; 512]), common::OK);
    read().unwrap();
    assert!(context_switches(server.pid()).unwrap() > before);
    upgrade::leave(driver);
    server.stop().unwrap();
    lab.is_clean();
}
