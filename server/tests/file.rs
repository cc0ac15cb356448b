//! The file backend through its public face, on real files and on loop devices.
//!
//! Loop devices and mounts need root and a kernel that has them: those tests are ignored in plain
//! view, and the lab's guests run them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "file/claims.rs"]
mod claims;
#[path = "file/client.rs"]
mod client;
mod common;
#[path = "file/devices.rs"]
mod devices;
#[path = "file/model.rs"]
mod model;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use client::{Client, Shape};
use common::file_options;
use devices::{Loop, Mounted};
use model::model;
use testkit::random::Random;
use ublkup::engine::StorageControl;
use ublkup::request::{IoError, Op};
use ublkup::storage::{CacheMode, File, FileOptions};

const PUNCH: Op = Op::Discard;
const UNMAP: Op = Op::WriteZeroes {
    unmap: true,
    fua: false,
};
const ZERO: Op = Op::WriteZeroes {
    unmap: false,
    fua: true,
};

fn open(path: &Path) -> File {
    File::open(file_options(path, CacheMode::Auto)).unwrap()
}

fn claims_later(path: &Path) -> FileOptions {
    FileOptions {
        claim_later: true,
        ..file_options(path, CacheMode::Auto)
    }
}

fn claimed_later(path: &Path) -> File {
    File::open(claims_later(path)).unwrap()
}

fn is_in_use(path: &Path) -> bool {
    refusal(file_options(path, CacheMode::Auto)).contains("in use")
}

/// What a file takes of its file system.
fn used_bytes(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn read_only(path: &Path) -> FileOptions {
    FileOptions {
        read_only: true,
        ..file_options(path, CacheMode::Auto)
    }
}

/// A scratch directory on the file system of the target directory (a real one, with `O_DIRECT`).
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn sparse(dir: &Path, len_bytes: u64) -> PathBuf {
    let path = dir.join("disk.img");
    fs::File::create(&path).unwrap().set_len(len_bytes).unwrap();
    path
}

fn refusal(options: FileOptions) -> String {
    let message = File::open(options)
        .expect_err("must be refused")
        .to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// Runs a program that must do well; what it prints.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("cannot run {program}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn random_requests_on_a_file_end_as_on_a_copy_in_memory() {
    let dir = scratch();
    for (cache, seed) in [(CacheMode::Direct, 1), (CacheMode::Buffered, 2)] {
        model(&sparse(dir.path(), 8 << 20), cache, seed);
    }
}

#[test]
fn random_requests_on_tmpfs_without_zero_range_end_as_on_a_copy_in_memory() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (cache, seed) in [(CacheMode::Auto, 3), (CacheMode::Buffered, 4)] {
        model(&sparse(dir.path(), 8 << 20), cache, seed);
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn random_requests_on_a_device_with_4096_byte_sectors_end_as_on_a_copy_in_memory() {
    let device = Loop::new(16 << 20, &["--sector-size", "4096", "--direct-io=on"]);
    for (cache, seed) in [(CacheMode::Direct, 5), (CacheMode::Buffered, 6)] {
        let disk = File::open(file_options(&device.device, cache)).unwrap();
        assert_eq!(disk.limits().block_bytes, 4096);
        drop(disk);
        model(&device.device, cache, seed);
        let small = FileOptions {
            block_bytes: Some(512),
            ..file_options(&device.device, cache)
        };
        assert!(refusal(small).contains("4096"));
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn discards_reach_what_is_below_a_device() {
    let device = Loop::new(16 << 20, &[]);
    let disk = open(&device.device);
    assert!(disk.limits().max_discard_bytes > 0);
    let mut client = Client::new(&disk, 1);
    let used = || used_bytes(&device.backing);
    client.write(0, &vec![1; 8 << 20], Shape::Aligned).unwrap();
    let full = used();
    client.range(PUNCH, 0, 4 << 20).unwrap();
    client.range(Op::Flush, 0, 0).unwrap();
    assert!(used() <= full - (4 << 20), "{} of {full}", used());
}

#[test]
#[ignore = "needs root and loop devices"]
fn flushes_and_forced_writes_reach_the_device_and_plain_writes_do_not_wait_for_it() {
    let device = Loop::new(1 << 20, &[]);
    let name = device.device.file_name().unwrap().to_str().unwrap();
    let stat = PathBuf::from(format!("/sys/block/{name}/stat"));
    // The 16th field (Documentation/block/stat.rst): flush requests done.
    let flushes = || -> u64 {
        let text = fs::read_to_string(&stat).unwrap();
        text.split_whitespace().nth(15).unwrap().parse().unwrap()
    };
    let forced_zeroes = Op::WriteZeroes {
        unmap: true,
        fua: true,
    };
    for cache in [CacheMode::Direct, CacheMode::Buffered] {
        let disk = File::open(file_options(&device.device, cache)).unwrap();
        assert!(disk.limits().write_cache);
        let mut client = Client::new(&disk, 1);
        let mut data = vec![1; 4096];
        for (op, durable) in [
            (Op::Write { fua: false }, false),
            (Op::Flush, true),
            (Op::Write { fua: true }, true),
            (UNMAP, false),
            (forced_zeroes, true),
            (ZERO, true),
        ] {
            let before = flushes();
            match op.has_data() {
                true => client.one(op, 0, &mut data, Shape::Odd).unwrap(),
                false if op == Op::Flush => client.range(op, 0, 0).unwrap(),
                false => client.range(op, 0, 4096).unwrap(),
            }
            assert_eq!(flushes() > before, durable, "{cache:?}, {op:?}");
        }
    }
}

#[test]
fn holes_are_punched_also_after_an_empty_request() {
    let dir = scratch();
    let path = sparse(dir.path(), 8 << 20);
    for op in [PUNCH, UNMAP] {
        let disk = open(&path);
        let mut client = Client::new(&disk, 1);
        client.write(0, &vec![1; 8 << 20], Shape::Aligned).unwrap();
        let full = used_bytes(&path);
        client.range(op, 4096, 0).unwrap();
        client.range(op, 0, 4 << 20).unwrap();
        let left = used_bytes(&path);
        assert!(left <= full - (4 << 20), "{op:?}: {left} of {full}");
    }
}

#[test]
fn more_buffers_than_a_system_call_takes_are_one_request() {
    let dir = scratch();
    let path = sparse(dir.path(), 8 << 20);
    for cache in [CacheMode::Direct, CacheMode::Buffered] {
        let disk = File::open(file_options(&path, cache)).unwrap();
        let mut client = Client::new(&disk, 1);
        let data = Random(7).bytes(2500 * 512);
        client.write(512, &data, Shape::Sectors).unwrap();
        let back = client.read(512, data.len(), Shape::Sectors);
        assert!(back == data, "{cache:?}");
    }
}

#[test]
fn more_bounced_requests_than_bounce_buffers_all_end() {
    let dir = scratch();
    let disk = File::open(file_options(
        sparse(dir.path(), 32 << 20),
        CacheMode::Direct,
    ))
    .unwrap();
    let mut client = Client::new(&disk, 64);
    let data = Random(8).bytes(300 << 10);
    let (write, len) = (Op::Write { fua: false }, 300 << 10);
    for slot in 0..64 {
        client.submit(slot, write, slot * (400 << 10), len, &data, Shape::Odd);
    }
    assert!(client.backlog_was_used(), "the pool has no bound");
    assert!(client.finish_all().iter().all(|end| end.outcome.is_ok()));
    for slot in 0..64 {
        let back = client.read(slot * (400 << 10), data.len(), Shape::Aligned);
        assert!(back == data, "slot {slot}");
    }
}

#[test]
fn what_somebody_cut_off_reads_as_zeroes() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    for cache in [CacheMode::Direct, CacheMode::Buffered] {
        for shape in [Shape::Aligned, Shape::Odd] {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(1 << 20).unwrap();
            let disk = File::open(file_options(&path, cache)).unwrap();
            let mut client = Client::new(&disk, 1);
            client.write(0, &vec![1; 1 << 20], Shape::Aligned).unwrap();
            file.set_len(10_000).unwrap();
            let back = client.read(0, 64 << 10, shape);
            assert!(back[..10_000].iter().all(|&byte| byte == 1), "{cache:?}");
            assert!(back[10_000..].iter().all(|&byte| byte == 0), "{cache:?}");
            let back = client.read(512 << 10, 64 << 10, shape);
            assert!(back.iter().all(|&byte| byte == 0), "{cache:?}");
        }
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_full_file_system_is_no_space_and_only_for_that_request() {
    let mounted = Mounted::new(&["-t", "tmpfs", "-o", "size=1M", "ublkup-test"]);
    let image = sparse(mounted.0.path(), 64 << 20);
    let disk = open(&image);
    let mut client = Client::new(&disk, 1);
    let data = vec![1; 4 << 20];
    let full = client.write(0, &data, Shape::Aligned);
    assert_eq!(full, Err(IoError::NoSpace));
    client.range(UNMAP, 0, 4 << 20).unwrap();
    client.write(0, &data[..4096], Shape::Aligned).unwrap();
    drop((client, disk));
}

#[test]
#[ignore = "needs root and loop devices"]
fn direct_is_refused_for_a_file_whose_data_are_journalled() {
    let dir = tempfile::tempdir().unwrap();
    let below = sparse(dir.path(), 32 << 20);
    let below = below.to_str().unwrap();
    run("mkfs.ext4", &["-q", below]);
    let mounted = Mounted::new(&["-o", "loop,data=journal", below]);
    let image = sparse(mounted.0.path(), 1 << 20);
    let message = refusal(file_options(&image, CacheMode::Direct));
    assert!(message.contains("cache=auto"), "{message}");
    // Left to itself it goes through the page cache, with the alignment of any file there.
    let disk = open(&image);
    assert_eq!(direct_descriptors_of(&image), [false]);
    drop(disk);
}

/// Of each descriptor of this process on `path`: whether it is for direct I/O.
fn direct_descriptors_of(path: &Path) -> Vec<bool> {
    let flags_of = |entry: fs::DirEntry| {
        let info = Path::new("/proc/self/fdinfo").join(entry.file_name());
        let info = (fs::read_link(entry.path()).ok()? == path).then_some(info)?;
        let text = fs::read_to_string(info).ok()?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
        u32::from_str_radix(flags.trim(), 8).ok()
    };
    let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
    entries
        .filter_map(flags_of)
        .map(|flags| flags & libc::O_DIRECT.cast_unsigned() != 0)
        .collect()
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_write_protected_device_is_refused_unless_read_only() {
    let device = Loop::new(1 << 20, &["--read-only"]);
    let message = refusal(file_options(&device.device, CacheMode::Auto));
    assert!(message.contains("--read-only"), "{message}");
    let disk = File::open(read_only(&device.device)).unwrap();
    assert!(disk.limits().read_only);
    let data = Client::new(&disk, 1).read(0, 4096, Shape::Odd);
    assert!(data.iter().all(|&byte| byte == 0));
}

#[test]
fn what_is_not_made_of_blocks_is_refused_at_once() {
    let dir = scratch();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let begin = Instant::now();
    for (path, kind) in [
        (fifo, "FIFO"),
        (dir.path().join("socket"), "socket"),
        (dir.path().to_owned(), "directory"),
        ("/dev/zero".into(), "character device"),
    ] {
        for mode in [file_options(&path, CacheMode::Auto), read_only(&path)] {
            let message = refusal(mode);
            assert!(message.contains(kind), "{message}");
            assert!(message.contains(path.to_str().unwrap()), "{message}");
        }
    }
    assert!(begin.elapsed() < Duration::from_secs(2));
}

#[test]
fn sizes_are_whole_blocks_and_one_at_least() {
    let dir = scratch();
    let path = sparse(dir.path(), 511);
    assert!(refusal(file_options(&path, CacheMode::Auto)).contains("511"));
    for (len, block, capacity) in [(512, 512, 512), (10_000, 512, 9728), (10_000, 4096, 8192)] {
        let disk = File::open(FileOptions {
            block_bytes: Some(block),
            ..file_options(sparse(dir.path(), len), CacheMode::Buffered)
        })
        .unwrap();
        assert_eq!(disk.limits().capacity.bytes(), capacity);
    }
}

#[test]
fn the_end_of_a_sparse_file_of_many_tebibytes_can_be_written_and_read() {
    let (disk, memory) = (scratch(), tempfile::tempdir_in("/dev/shm").unwrap());
    for (dir, len) in [(disk, (16 << 40) - (1 << 20)), (memory, 15 << 40)] {
        let path = sparse(dir.path(), len);
        let disk = open(&path);
        assert_eq!(disk.limits().capacity.bytes(), len);
        assert!(disk.limits().max_discard_bytes > 0);
        let mut client = Client::new(&disk, 1);
        let (data, last) = (vec![7; 4096], len - 4096);
        client.write(last, &data, Shape::Odd).unwrap();
        let mut back = vec![0; 4096];
        let file = fs::File::open(&path).unwrap();
        file.read_exact_at(&mut back, last).unwrap();
        assert_eq!(back, data);
        assert_eq!(client.read(last, 4096, Shape::Odd), data);
    }
}

#[test]
fn opening_a_disk_leaves_its_content_alone() {
    let dir = scratch();
    let path = dir.path().join("disk.img");
    let content = Random(9).bytes(10_000);
    fs::write(&path, &content).unwrap();
    for cache in [CacheMode::Auto, CacheMode::Buffered] {
        File::open(file_options(&path, cache)).unwrap();
        assert!(fs::read(&path).unwrap() == content);
    }
}
