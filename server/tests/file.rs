//! The file backend through its public face, on real files and on loop devices.
//!
//! Loop devices and mounts need root and a kernel that has them: those tests are ignored in plain
//! view, and the lab's guests run them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "file/client.rs"]
mod client;

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use client::{Client, Shape};
use testkit::random::Random;
use ublkup::engine::StorageControl;
use ublkup::request::{IoError, Op, Serial};
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

fn options(path: &Path, cache: CacheMode) -> FileOptions {
    FileOptions {
        path: path.to_owned(),
        cache,
        read_only: false,
        block_bytes: None,
        serial: Serial::new("test").unwrap(),
        claim_later: false,
    }
}

fn read_only(path: &Path) -> FileOptions {
    FileOptions {
        read_only: true,
        ..options(path, CacheMode::Auto)
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

/// A loop device over a new file; gone with the value.
struct Loop {
    device: PathBuf,
    backing: PathBuf,
    _dir: tempfile::TempDir,
}

impl Loop {
    fn new(len_bytes: u64, arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let backing = sparse(dir.path(), len_bytes);
        let to_backing = [arguments, &[backing.to_str().unwrap()]].concat();
        let device = run(
            "losetup",
            &[&["--find", "--show"], &to_backing[..]].concat(),
        );
        Self {
            device: device.into(),
            backing,
            _dir: dir,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup").arg("-d").arg(&self.device).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// Random requests of all kinds, several at once, against a disk of which a copy is kept.
fn model(path: &Path, cache: CacheMode, seed: u64) {
    let disk = File::open(options(path, cache)).unwrap();
    let name = format!("{}, {cache:?}, seed {seed}", path.display());
    let mut client = Client::new(&disk, 16);
    let block = u64::from(disk.limits().block_bytes);
    let blocks = disk.limits().capacity.bytes() / block;
    let mut copy = vec![0; usize::try_from(disk.limits().capacity.bytes()).unwrap()];
    // It may hold anything.
    client
        .one(Op::Write { fua: false }, 0, &mut copy, Shape::Aligned)
        .unwrap();
    let mut random = Random(seed);
    for round in 0..60 {
        // Neighbours share no block: each gets a range of its own.
        let share = blocks / 16;
        let mut expected = Vec::new();
        for slot in 0..16u64 {
            let first = slot * share + random.below(share);
            let count = 1 + random.below((slot + 1) * share - first).min(300);
            let (at, len) = (first * block, count * block);
            let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
            let shape = Shape::any(&mut random);
            let op = match random.below(10) {
                0..4 => Op::Read,
                4..7 => Op::Write {
                    fua: random.below(4) == 0,
                },
                7 => Op::Flush,
                8 => ZERO,
                _ => UNMAP,
            };
            let mut data = vec![0; range.len()];
            match op {
                Op::Write { .. } => {
                    random.fill(&mut data);
                    copy[range.clone()].copy_from_slice(&data);
                }
                Op::Read => expected.push((slot, range)),
                Op::Flush | Op::Discard => {}
                Op::WriteZeroes { .. } => copy[range].fill(0),
            }
            client.submit(slot, op, at, len, &data, shape);
        }
        let mut ended = client.finish_all();
        for (slot, outcome) in ended.iter().map(|end| (end.slot, end.outcome)) {
            assert_eq!(outcome, Ok(()), "{name}, round {round}, slot {slot}");
        }
        for (slot, range) in expected {
            let end = ended
                .iter_mut()
                .find(|end| u64::from(end.slot) == slot)
                .unwrap();
            assert!(
                *end.data() == copy[range],
                "{name}, round {round}, slot {slot} read wrong"
            );
        }
    }
    let mut all = vec![1; copy.len()];
    client.one(Op::Read, 0, &mut all, Shape::Odd).unwrap();
    assert!(all == copy, "{name}: the disk is not what it should be");
}

/// Storage that is claimed when a guest wants it: two servers open it, one at a time has it.
fn one_at_a_time(path: &Path) {
    let open = || {
        let options = FileOptions {
            claim_later: true,
            ..options(path, CacheMode::Auto)
        };
        File::open(options).unwrap()
    };
    let (source, target) = (open(), open());
    let soon = Duration::from_millis(100);
    assert_eq!(source.claim(soon), Ok(()));
    assert_eq!(source.claim(soon), Ok(()), "it has it");
    assert!(target.claim(soon).unwrap_err().contains("in use"));
    // Nor does it go with servers whose guests do not move.
    assert!(refusal(options(path, CacheMode::Auto)).contains("in use"));
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| target.claim(Duration::from_secs(60)));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        source.release();
        waiting.join().unwrap()
    });
    assert_eq!(waiting, Ok(()));
    assert!(source.claim(soon).is_err());
    drop(target);
    assert_eq!(source.claim(soon), Ok(()));
    source.release();
    source.release();
    File::open(options(path, CacheMode::Auto)).unwrap();
}

#[test]
fn a_file_that_is_claimed_later_is_had_by_one_server_at_a_time() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    one_at_a_time(&path);
    // A disk that others cut short is not the one that the guest knows.
    let disk = File::open(FileOptions {
        claim_later: true,
        ..options(&path, CacheMode::Auto)
    })
    .unwrap();
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1 << 19)
        .unwrap();
    let refused = disk.claim(Duration::ZERO).unwrap_err();
    assert!(refused.contains("shorter"), "{refused}");
    File::open(options(&path, CacheMode::Auto)).unwrap();
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_device_that_is_claimed_later_is_had_by_one_server_or_mount_at_a_time() {
    let device = Loop::new(16 << 20, &[]);
    one_at_a_time(&device.device);
    let name = device.device.to_str().unwrap();
    run("mkfs.ext4", &["-q", "-F", name]);
    let dir = tempfile::tempdir().unwrap();
    let mount = || Command::new("mount").arg(name).arg(dir.path()).output();
    let mounts = || mount().unwrap().status.success();
    let unmount = || run("umount", &[dir.path().to_str().unwrap()]);
    let disk = File::open(FileOptions {
        claim_later: true,
        ..options(&device.device, CacheMode::Auto)
    })
    .unwrap();
    assert!(mounts(), "it is nobody's yet");
    let refused = disk.claim(Duration::ZERO).unwrap_err();
    assert!(
        refused.contains(name) && refused.contains("in use"),
        "{refused}"
    );
    unmount();
    assert_eq!(disk.claim(Duration::ZERO), Ok(()));
    assert!(!mounts(), "it is the disk's");
    disk.release();
    assert!(mounts(), "it is nobody's again");
    unmount();
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
        let disk = File::open(options(&device.device, cache)).unwrap();
        assert_eq!(disk.limits().block_bytes, 4096);
        drop(disk);
        model(&device.device, cache, seed);
        let small = FileOptions {
            block_bytes: Some(512),
            ..options(&device.device, cache)
        };
        assert!(refusal(small).contains("4096"));
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn discards_reach_what_is_below_a_device() {
    let device = Loop::new(16 << 20, &[]);
    let disk = File::open(options(&device.device, CacheMode::Auto)).unwrap();
    assert!(disk.limits().max_discard_bytes > 0);
    let mut client = Client::new(&disk, 1);
    let used = || fs::metadata(&device.backing).unwrap().blocks() * 512;
    let mut ones = vec![1; 8 << 20];
    client
        .one(Op::Write { fua: true }, 0, &mut ones, Shape::Aligned)
        .unwrap();
    let full = used();
    client.range(PUNCH, 0, 4 << 20).unwrap();
    client.range(Op::Flush, 0, 0).unwrap();
    assert!(
        used() <= full - (4 << 20),
        "{} of {full} still used",
        used()
    );
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
        let disk = File::open(options(&device.device, cache)).unwrap();
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
        let disk = File::open(options(&path, CacheMode::Auto)).unwrap();
        let mut client = Client::new(&disk, 1);
        let mut ones = vec![1; 8 << 20];
        client
            .one(Op::Write { fua: true }, 0, &mut ones, Shape::Aligned)
            .unwrap();
        let full = fs::metadata(&path).unwrap().blocks() * 512;
        client.range(op, 4096, 0).unwrap();
        client.range(op, 0, 4 << 20).unwrap();
        let left = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(
            left <= full - (4 << 20),
            "{op:?}: {left} of {full} still used"
        );
    }
}

#[test]
fn more_buffers_than_a_system_call_takes_are_one_request() {
    let dir = scratch();
    let path = sparse(dir.path(), 8 << 20);
    for cache in [CacheMode::Direct, CacheMode::Buffered] {
        let disk = File::open(options(&path, cache)).unwrap();
        let mut client = Client::new(&disk, 1);
        let mut data = vec![0; 2500 * 512];
        Random(7).fill(&mut data);
        let wanted = data.clone();
        client
            .one(Op::Write { fua: false }, 512, &mut data, Shape::Sectors)
            .unwrap();
        data.fill(0);
        client
            .one(Op::Read, 512, &mut data, Shape::Sectors)
            .unwrap();
        assert!(data == wanted, "{cache:?}");
    }
}

#[test]
fn more_bounced_requests_than_bounce_buffers_all_end() {
    let dir = scratch();
    let disk = File::open(options(&sparse(dir.path(), 32 << 20), CacheMode::Direct)).unwrap();
    let mut client = Client::new(&disk, 64);
    let mut data = vec![0; 300 << 10];
    Random(8).fill(&mut data);
    for slot in 0..64 {
        let at = slot * (400 << 10);
        client.submit(
            slot,
            Op::Write { fua: false },
            at,
            300 << 10,
            &data,
            Shape::Odd,
        );
    }
    assert!(client.backlog_was_used(), "the pool has no bound");
    assert!(client.finish_all().iter().all(|end| end.outcome.is_ok()));
    for slot in 0..64 {
        let mut back = vec![0; data.len()];
        client
            .one(Op::Read, slot * (400 << 10), &mut back, Shape::Aligned)
            .unwrap();
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
            let disk = File::open(options(&path, cache)).unwrap();
            let mut client = Client::new(&disk, 1);
            let mut ones = vec![1; 1 << 20];
            client
                .one(Op::Write { fua: true }, 0, &mut ones, Shape::Aligned)
                .unwrap();
            file.set_len(10_000).unwrap();
            let mut back = vec![2; 64 << 10];
            client.one(Op::Read, 0, &mut back, shape).unwrap();
            assert!(back[..10_000].iter().all(|&byte| byte == 1), "{cache:?}");
            assert!(back[10_000..].iter().all(|&byte| byte == 0), "{cache:?}");
            client.one(Op::Read, 512 << 10, &mut back, shape).unwrap();
            assert!(back.iter().all(|&byte| byte == 0), "{cache:?}");
        }
    }
}

/// A mounted file system; unmounted with the value.
struct Mounted(tempfile::TempDir);

impl Mounted {
    /// `mount ARGUMENTS DIRECTORY`
    fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_str().unwrap();
        run("mount", &[arguments, &[place]].concat());
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.0.path()).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_full_file_system_is_no_space_and_only_for_that_request() {
    let mounted = Mounted::new(&["-t", "tmpfs", "-o", "size=1M", "ublkup-test"]);
    let image = sparse(mounted.0.path(), 64 << 20);
    let disk = File::open(options(&image, CacheMode::Auto)).unwrap();
    let mut client = Client::new(&disk, 1);
    let mut data = vec![1; 4 << 20];
    let full = client.one(Op::Write { fua: false }, 0, &mut data, Shape::Aligned);
    assert_eq!(full, Err(IoError::NoSpace));
    client.range(UNMAP, 0, 4 << 20).unwrap();
    client
        .one(
            Op::Write { fua: false },
            0,
            &mut data[..4096],
            Shape::Aligned,
        )
        .unwrap();
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
    let message = refusal(options(&image, CacheMode::Direct));
    assert!(message.contains("cache=auto"), "{message}");
    // Left to itself it goes through the page cache, with the alignment of any file there.
    let disk = File::open(options(&image, CacheMode::Auto)).unwrap();
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
fn a_file_has_one_writer_or_many_readers() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    let reader = File::open(read_only(&path)).unwrap();
    let other = File::open(read_only(&path)).unwrap();
    assert!(refusal(options(&path, CacheMode::Auto)).contains("in use"));
    drop((reader, other));
    let writer = File::open(options(&path, CacheMode::Auto)).unwrap();
    assert!(refusal(options(&path, CacheMode::Auto)).contains("in use"));
    assert!(refusal(read_only(&path)).contains("in use"));
    drop(writer);
    File::open(options(&path, CacheMode::Auto)).unwrap();
}

/// Locks one byte for reading as QEMU does with the images it has open.
fn lock_byte(file: &fs::File, byte: i64) {
    // SAFETY: all zeroes is a valid `flock`.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::c_short::try_from(libc::F_RDLCK).unwrap();
    (range.l_start, range.l_len) = (byte, 1);
    // SAFETY: `range` lives through the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) };
    assert_eq!(result, 0);
}

#[test]
fn an_image_that_a_virtual_machine_has_open_is_in_use() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    let image = fs::File::open(&path).unwrap();
    lock_byte(&image, 100);
    assert!(refusal(options(&path, CacheMode::Auto)).contains("in use"));
    File::open(read_only(&path)).unwrap();
}

#[test]
fn a_file_that_is_released_in_a_moment_is_waited_for() {
    let dir = scratch();
    let path = sparse(dir.path(), 1 << 20);
    let writer = File::open(options(&path, CacheMode::Auto)).unwrap();
    let other = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(writer);
    });
    File::open(options(&path, CacheMode::Auto)).unwrap();
    other.join().unwrap();
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_device_has_one_writer_and_udev_may_look_at_it() {
    let device = Loop::new(1 << 20, &[]);
    let udev = fs::File::open(&device.device).unwrap();
    rustix::fs::flock(&udev, rustix::fs::FlockOperation::NonBlockingLockShared).unwrap();
    let writer = File::open(options(&device.device, CacheMode::Auto)).unwrap();
    assert!(refusal(options(&device.device, CacheMode::Auto)).contains("in use"));
    drop(writer);
    File::open(options(&device.device, CacheMode::Auto)).unwrap();
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_write_protected_device_is_refused_unless_read_only() {
    let device = Loop::new(1 << 20, &["--read-only"]);
    let message = refusal(options(&device.device, CacheMode::Auto));
    assert!(message.contains("--read-only"), "{message}");
    let disk = File::open(read_only(&device.device)).unwrap();
    assert!(disk.limits().read_only);
    let mut data = vec![1; 4096];
    Client::new(&disk, 1)
        .one(Op::Read, 0, &mut data, Shape::Odd)
        .unwrap();
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
        for mode in [options(&path, CacheMode::Auto), read_only(&path)] {
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
    assert!(refusal(options(&path, CacheMode::Auto)).contains("511"));
    for (len, block, capacity) in [(512, 512, 512), (10_000, 512, 9728), (10_000, 4096, 8192)] {
        let disk = File::open(FileOptions {
            block_bytes: Some(block),
            ..options(&sparse(dir.path(), len), CacheMode::Buffered)
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
        let disk = File::open(options(&path, CacheMode::Auto)).unwrap();
        assert_eq!(disk.limits().capacity.bytes(), len);
        assert!(disk.limits().max_discard_bytes > 0);
        let mut client = Client::new(&disk, 1);
        let mut data = vec![7; 4096];
        let last = len - 4096;
        client
            .one(Op::Write { fua: true }, last, &mut data, Shape::Odd)
            .unwrap();
        let mut file = fs::File::open(&path).unwrap();
        file.seek(SeekFrom::Start(last)).unwrap();
        let mut back = vec![0; 4096];
        std::io::Read::read_exact(&mut file, &mut back).unwrap();
        assert_eq!(back, data);
        back.fill(0);
        client.one(Op::Read, last, &mut back, Shape::Odd).unwrap();
        assert_eq!(back, data);
    }
}

#[test]
fn opening_a_disk_leaves_its_content_alone() {
    let dir = scratch();
    let path = dir.path().join("disk.img");
    let mut content = vec![0; 10_000];
    Random(9).fill(&mut content);
    fs::File::create(&path)
        .unwrap()
        .write_all(&content)
        .unwrap();
    for cache in [CacheMode::Auto, CacheMode::Buffered] {
        File::open(options(&path, cache)).unwrap();
        assert!(fs::read(&path).unwrap() == content);
    }
}
