//! The ublk door against a real driver.
//!
//! These tests make devices: they need root and `/dev/ublk-control`, so an ordinary `cargo test`
//! shows them as ignored. Where a driver is, run them with `-- --ignored --test-threads=1`.
//! All I/O is done by other processes: a server must not open its own disk.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[path = "ublk/added.rs"]
mod added;
#[path = "ublk/broken.rs"]
mod broken;
mod common;
#[path = "ublk/confined.rs"]
mod confined;
#[path = "ublk/data.rs"]
mod data;
#[path = "common/escape.rs"]
mod escape;
#[path = "ublk/failing.rs"]
mod failing;
#[path = "ublk/features.rs"]
mod features;
#[path = "ublk/intruders.rs"]
mod intruders;
#[path = "ublk/large.rs"]
mod large;
#[path = "ublk/log.rs"]
mod log;
#[path = "common/logs.rs"]
mod logs;
#[path = "ublk/many.rs"]
mod many;
#[path = "ublk/memory.rs"]
mod memory;
#[path = "ublk/mounts.rs"]
mod mounts;
#[path = "ublk/owner.rs"]
mod owner;
#[path = "common/recorded.rs"]
mod recorded;
#[path = "ublk/recovery.rs"]
mod recovery;
#[path = "ublk/replace.rs"]
mod replace;
#[path = "ublk/resize.rs"]
mod resize;
#[path = "ublk/rings.rs"]
mod rings;
#[path = "ublk/stopped.rs"]
mod stopped;
#[path = "ublk/stuck.rs"]
mod stuck;
#[path = "ublk/unprivileged.rs"]
mod unprivileged;
#[path = "ublk/upgrade.rs"]
mod upgrade;
#[path = "ublk/vhost_user.rs"]
mod vhost_user;

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::sandbox;
use testkit::proc::Holdings;
use testkit::random::Random;
use ublkup::door::ublk::{self, DataPath, DoorEnd, UblkConfig, UblkDoor, UblkError};
use ublkup::engine::Storage;
use ublkup::engine::counters::{Counters, Totals};
use ublkup::export::name_lock::DeviceNote;
use ublkup::export::remove_left_device;
use ublkup::export::runtime_dir::RuntimeDir;
use ublkup::request::{Limits, Serial};
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
        throttle: std::sync::Arc::default(),
        affinity: None,
        scan_partitions: true,
        recovery: ublkup::door::ublk::Recovery::Off,
        mark: 1,
        data: DataPath::Auto,
        ring_places: None,
        take_over: None,
        refuse_writes: false,
        elsewhere: None,
    }
}

fn with_id(id: u32) -> UblkConfig {
    UblkConfig {
        id: Some(id),
        ..config()
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

/// Reads a page around the page cache.
fn read_page(disk: &Path) -> Result<String, String> {
    dd(
        disk,
        Path::new("/dev/null"),
        &["bs=4k", "count=1", "iflag=direct"],
    )
}

/// Writes a page of zeroes around the page cache.
fn write_page(disk: &Path) -> Result<String, String> {
    dd(
        Path::new("/dev/zero"),
        disk,
        &["bs=4k", "count=1", "oflag=direct"],
    )
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
    let bytes = Random(1).bytes(usize::try_from(bytes).unwrap());
    fs::write(&path, bytes).expect("room for a scratch file");
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
    let write = write_page(&disk);
    assert!(write.is_err(), "{write:?}");
    door.stop().unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn fifty_starts_and_stops_leave_nothing_behind() {
    // The first one makes what stays: heaps of threads, the kernel's worker.
    serve(Null::new(limits())).stop().unwrap();
    let before = Holdings::of(std::process::id()).unwrap();
    for _ in 0..50 {
        let door = serve(Null::new(limits()));
        let id = door.id();
        assert!(!is_gone(id));
        door.stop().unwrap();
        assert!(is_gone(id));
    }
    let after = Holdings::of(std::process::id()).unwrap();
    assert_eq!(after.descriptors, before.descriptors);
    assert!(
        after.mappings < before.mappings + 20,
        "{before:?}, {after:?}"
    );
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_taken_id_is_refused_and_its_device_lives_on() {
    let door = serve(Null::new(limits()));
    let same = with_id(door.id());
    let second = UblkDoor::start(&same, &Arc::new(Null::new(limits())), Arc::default, no_end);
    assert!(matches!(second, Err(UblkError::IdInUse { id, .. }) if id == door.id()));
    let error = ublk::remove(door.id(), false).unwrap_err();
    assert!(matches!(error, UblkError::Alive { .. }), "{error}");
    assert!(error.to_string().contains(&std::process::id().to_string()));
    let stale = ublk::stale_devices().unwrap();
    assert!(stale.iter().all(|id| *id != door.id()));
    read_page(&door.block_path()).unwrap();
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
    let error = ublk::device_state(door.id()).unwrap_err();
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
        mark: Some(config().mark),
        storage: None,
    };
    claim.note_device(&noted).unwrap();
    let record = lab.path("run/devices/d");
    let folder = record.parent().unwrap();
    std::fs::DirBuilder::new()
        .mode(0o755)
        .create(folder)
        .unwrap();
    std::fs::write(&record, format!("{}\n", config().mark)).unwrap();
    let error = remove_left_device(&dir, &claim).unwrap_err().to_string();
    assert!(
        error.contains("left alone") && error.contains(&us),
        "{error}"
    );
    assert_eq!(
        claim.left_device().unwrap(),
        Some(noted.clone()),
        "it was forgotten"
    );
    // A note alone says nothing, and neither does the number.
    for (noted, recorded) in [(config().mark, ""), (config().mark + 1, "7\n")] {
        let noted = DeviceNote {
            id: Some(door.id()),
            mark: Some(noted),
            storage: None,
        };
        claim.note_device(&noted).unwrap();
        std::fs::write(&record, recorded).unwrap();
        assert_eq!(remove_left_device(&dir, &claim).unwrap(), None);
        assert!(!claim.has_device());
    }
    assert_eq!(claim.left_device().unwrap(), None);
    drop(claim);
    for door in [door, other] {
        read_page(&door.block_path()).unwrap();
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
    let mut coarse = limits();
    coarse.block_bytes = 1 << 20;
    let no_queue = UblkConfig {
        queues: 0,
        ..config()
    };
    let deep = UblkConfig {
        depth: 5000,
        ..config()
    };
    for (config, limits, word) in [
        (with_id(1 << 30), limits(), "1073741824"),
        (no_queue, limits(), "queues"),
        (deep, limits(), "4096"),
        (config(), coarse, "1048576"),
    ] {
        let text = start(config, limits);
        assert!(text.contains(word) && !text.contains('\n'), "{text}");
    }
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
    assert!(
        ublk::stale_devices()
            .unwrap()
            .iter()
            .all(|left| *left != id)
    );
}
