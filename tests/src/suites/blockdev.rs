//! What the block layer does to a disk besides reading and writing it: what blktests' group `block`
//! is about, in so far as it concerns a disk like this one. (blktests itself is in no package
//! registry.)

mod load;

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use testkit::process;
use testkit::random::Random;
use testkit::server::Server;
use testkit::shell::sh;
use testkit::wait::{until, wait_for};

use super::io::{open_direct, read_direct, write_direct};
use crate::kit::beside::beside;
use crate::kit::sysfs::Sysfs;
use crate::test;
use crate::test::{Context, Test};

/// For an emulated PC.
pub const TESTS: &[Test] = &[
    test!(load::schedulers_change_under_load),
    test!(load::attributes_of_the_queue_change_under_load),
    test!(load::processors_go_and_come_under_load),
    test!(load::queues_whose_processors_are_away_are_served),
    test!(discards_and_zeroes_are_checked_at_their_ends),
    test!(the_page_cache_follows_what_goes_around_it),
    test!(a_disk_in_use_keeps_its_partitions),
    test!(the_kernels_counters_are_those_of_the_requests),
    test!(a_client_that_is_killed_in_a_request_ends_with_it),
    test!(a_thousand_pieces_of_memory_are_one_request_for_the_disk),
    test!(a_write_protected_disk_refuses_and_recovers),
    test!(openers_race_with_removal),
];

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

fn serve(cx: &Context, spec: &str) -> Result<(Server, PathBuf)> {
    let server = cx.serve().ublk("yes").name("disk").arg(spec).start()?;
    let device = server.block_device()?;
    Ok((server, device))
}

// `_IO(0x12, …)` of include/uapi/linux/fs.h.
const BLKROSET: u64 = 0x125d;
const BLKRRPART: u64 = 0x125f;
const BLKDISCARD: u64 = 0x1277;
const BLKSECDISCARD: u64 = 0x127d;
const BLKZEROOUT: u64 = 0x127f;

/// An ioctl of a block device that takes up to two words; its errno.
fn ioctl(disk: &File, request: u64, words: [u64; 2]) -> Result<(), i32> {
    // SAFETY: these requests read at most two words from the address they are given, and write none.
    let result = unsafe { libc::ioctl(disk.as_raw_fd(), request, words.as_ptr()) };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

fn discards_and_zeroes_are_checked_at_their_ends(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, &cx.file(DISK_BYTES)?)?;
    let disk = OpenOptions::new().read(true).write(true).open(&device)?;
    let end = DISK_BYTES;
    let bad = [
        (1, 512),
        (512, 100),
        (end, 512),
        (end - 512, 1024),
        (0, end + 512),
        (u64::MAX - 511, 512),
        (512, u64::MAX - 511),
    ];
    for request in [BLKDISCARD, BLKZEROOUT] {
        for (at, len) in bad {
            let got = ioctl(&disk, request, [at, len]);
            let what = format!("{request:#x} of {len} bytes at {at}");
            ensure!(got == Err(libc::EINVAL), "{what}: {got:?}");
        }
        let reader = File::open(&device)?;
        let got = ioctl(&reader, request, [0, 512]);
        ensure!(got == Err(libc::EBADF), "of a reader: {got:?}");
    }
    let got = ioctl(&disk, BLKSECDISCARD, [0, 4096]);
    ensure!(got == Err(libc::EOPNOTSUPP), "secure discard: {got:?}");

    let direct = open_direct(&device)?;
    let piece = usize::try_from(MIB)?;
    for at in [0, 3 * MIB + 512, end - MIB] {
        write_direct(&direct, at, &vec![0xa5; piece])?;
        // All of it but one sector at each end.
        let (first, len) = (at + 512, MIB - 1024);
        let got = ioctl(&disk, BLKZEROOUT, [first, len]);
        ensure!(got.is_ok(), "zeroing at {first}: {got:?}");
        let found = read_direct(&direct, at, piece)?;
        let zeroes = found[512..piece - 512].iter().all(|byte| *byte == 0);
        ensure!(zeroes, "zeroed bytes at {first} are not zero");
        let edges_stay = |found: &[u8]| {
            let mut edges = found[..512].iter().chain(&found[piece - 512..]);
            edges.all(|byte| *byte == 0xa5)
        };
        ensure!(edges_stay(&found), "zeroing at {first} went too far");
        let got = ioctl(&disk, BLKDISCARD, [first, len]);
        ensure!(got.is_ok(), "discarding at {first}: {got:?}");
        let found = read_direct(&direct, at, piece)?;
        ensure!(edges_stay(&found), "discarding at {first} went too far");
    }
    for request in [BLKDISCARD, BLKZEROOUT] {
        let got = ioctl(&disk, request, [0, end]);
        ensure!(got.is_ok(), "{request:#x} of all: {got:?}");
    }
    let found = read_direct(&direct, end - MIB, piece)?;
    ensure!(found.iter().all(|byte| *byte == 0), "the end is not zero");
    drop((disk, direct));
    server.stop().map(drop)
}

fn the_page_cache_follows_what_goes_around_it(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, &cx.file(DISK_BYTES)?)?;
    let cached = OpenOptions::new().read(true).write(true).open(&device)?;
    let direct = open_direct(&device)?;
    let len = usize::try_from(MIB)?;
    let mut model = Random(1).bytes(len);
    cached.write_all_at(&model, 0)?;
    let same = |model: &[u8], what: &str| -> Result<()> {
        let mut through = vec![0; len];
        cached.read_exact_at(&mut through, 0)?;
        ensure!(through == model, "{what}: the page cache has other data");
        let around = read_direct(&direct, 0, len)?;
        ensure!(around == model, "{what}: the disk has other data");
        Ok(())
    };
    same(&model, "after a write through the page cache")?;
    let got = ioctl(&cached, BLKZEROOUT, [4096, 65536]);
    ensure!(got.is_ok(), "zeroing: {got:?}");
    model[4096..4096 + 65536].fill(0);
    same(&model, "after zeroing")?;
    write_direct(&direct, 8192, &[7; 16384])?;
    model[8192..8192 + 16384].fill(7);
    same(&model, "after a write around the page cache")?;
    cached.write_all_at(&[9; 1000], 100)?;
    model[100..1100].fill(9);
    same(&model, "after a write of some bytes")?;
    drop((cached, direct));
    server.stop().map(drop)
}

fn a_disk_in_use_keeps_its_partitions(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, &cx.file(DISK_BYTES)?)?;
    let shown = device.display();
    sh(&format!(
        "printf 'label: dos\\nstart=2048, size=16384\\nstart=32768, size=16384\\n' | \
         sfdisk --quiet {shown}"
    ))
    .run()?;
    let partition = PathBuf::from(format!("{shown}p1"));
    let user = wait_for_file(cx, &partition)?;
    let disk = File::open(&device)?;
    let got = ioctl(&disk, BLKRRPART, [0; 2]);
    ensure!(got == Err(libc::EBUSY), "with a partition in use: {got:?}");
    ensure!(partition.exists(), "{} is gone", partition.display());
    drop(user);
    for round in 0..10 {
        let got = ioctl(&disk, BLKRRPART, [0; 2]);
        ensure!(got.is_ok(), "round {round}: {got:?}");
        drop(wait_for_file(cx, &partition)?);
    }
    drop(disk);
    server.stop().map(drop)
}

/// Opens a device node as soon as it is there.
fn wait_for_file(cx: &Context, path: &Path) -> Result<File> {
    let what = format!("{} can be opened", path.display());
    wait_for(&what, cx.patience(10), || Ok(File::open(path).ok()))
}

/// Completed reads, sectors read, reads under way.
fn read_counters(device: &Path) -> Result<(u64, u64, u64)> {
    let disk = Sysfs::of(device)?;
    let numbers = |name: &str| -> Result<Vec<u64>> {
        let text = disk.get(name)?;
        let numbers = text.split_whitespace().map(str::parse);
        numbers.collect::<Result<_, _>>().context("no number")
    };
    let (stat, inflight) = (numbers("stat")?, numbers("inflight")?);
    Ok((stat[0], stat[2], inflight[0]))
}

fn the_kernels_counters_are_those_of_the_requests(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, "fault:read=delay1500@32M-64M;mem:64M")?;
    // What the kernel reads by itself, looking for partitions, is at the beginning.
    thread::sleep(Duration::from_millis(300));
    let before = read_counters(&device)?;
    let disk = open_direct(&device)?;
    thread::scope(|scope| -> Result<()> {
        let reads: Vec<_> = (0..8)
            .map(|index| {
                let disk = &disk;
                scope.spawn(move || read_direct(disk, 32 * MIB + index * 8192, 4096))
            })
            .collect();
        until("8 reads are in flight", cx.patience(10), || {
            Ok(read_counters(&device)?.2 == 8)
        })?;
        for read in reads {
            let got = read.join().map_err(|_| anyhow!("a reader panicked"))?;
            ensure!(got?.len() == 4096, "a short read");
        }
        Ok(())
    })?;
    let after = read_counters(&device)?;
    ensure!(
        (after.0 - before.0, after.1 - before.1, after.2) == (8, 64, 0),
        "8 reads of 8 sectors: {before:?}, then {after:?}"
    );
    drop(disk);
    server.stop().map(drop)
}

fn a_client_that_is_killed_in_a_request_ends_with_it(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, "fault:read=delay1000@32M-64M;mem:64M")?;
    for _ in 0..3 {
        let mut reader = process::spawn_bound(
            Command::new("dd")
                .arg(format!("if={}", device.display()))
                .args([
                    "of=/dev/null",
                    "bs=64k",
                    "count=200",
                    "skip=600",
                    "iflag=direct",
                ])
                .stderr(Stdio::null()),
        )?;
        until("dd reads", cx.patience(10), || {
            Ok(read_counters(&device)?.2 > 0)
        })?;
        reader.kill()?;
        let ended = process::wait_limited(&mut reader, cx.patience(20))?;
        ensure!(ended.is_some(), "dd does not end");
        let left = read_counters(&device)?.2;
        ensure!(left == 0, "{left} reads are still under way");
    }
    server.stop().map(drop)
}

fn a_thousand_pieces_of_memory_are_one_request_for_the_disk(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, &cx.file(DISK_BYTES)?)?;
    let mut disk = open_direct(&device)?;
    let pieces = 1024;
    // Sectors with gaps between them.
    let mut memory = vec![0u8; (pieces + 1) * 1536];
    let start = memory.as_ptr().align_offset(512);
    let data = Random(5).bytes(pieces * 512);
    for (index, sector) in data.chunks(512).enumerate() {
        let at = start + index * 1536;
        memory[at..at + 512].copy_from_slice(sector);
    }
    let slices: Vec<IoSlice<'_>> = (0..pieces)
        .map(|index| start + index * 1536)
        .map(|at| IoSlice::new(&memory[at..at + 512]))
        .collect();
    disk.seek(SeekFrom::Start(512))?;
    let written = disk.write_vectored(&slices)?;
    ensure!(written == data.len(), "{written} bytes were written");
    let back = read_direct(&disk, 512, data.len())?;
    ensure!(back == data, "something else was written");
    memory.fill(0);
    let mut rest = &mut memory[start..];
    let mut slices = Vec::new();
    for _ in 0..pieces {
        let (piece, others) = rest.split_at_mut(1536);
        slices.push(IoSliceMut::new(&mut piece[..512]));
        rest = others;
    }
    disk.seek(SeekFrom::Start(512))?;
    let read = disk.read_vectored(&mut slices)?;
    ensure!(read == data.len(), "{read} bytes were read");
    let got: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
    ensure!(got == data, "something else was read");
    for at in (0..pieces - 1).map(|index| start + index * 1536 + 512) {
        let is_empty = memory[at..at + 1024].iter().all(|byte| *byte == 0);
        ensure!(is_empty, "a gap was filled");
    }
    drop(disk);
    server.stop().map(drop)
}

fn a_write_protected_disk_refuses_and_recovers(cx: &Context) -> Result<()> {
    let (server, device) = serve(cx, &cx.file(DISK_BYTES)?)?;
    let disk = File::open(&device)?;
    let writer = open_direct(&device)?;
    ensure!(ioctl(&disk, BLKROSET, [1, 0]).is_ok(), "BLKROSET");
    let cached = OpenOptions::new().write(true).open(&device)?;
    for (how, file) in [("through", &cached), ("around", &writer)] {
        let written = write_direct(file, 0, &[1; 4096]);
        ensure!(written.is_err(), "written {how} the page cache");
    }
    let discarded = ioctl(&writer, BLKDISCARD, [0, 4096]);
    ensure!(discarded == Err(libc::EPERM), "discard: {discarded:?}");
    ensure!(ioctl(&disk, BLKROSET, [0, 0]).is_ok(), "BLKROSET");
    write_direct(&writer, 0, &[3; 4096])?;
    ensure!(read_direct(&writer, 0, 4096)? == [3; 4096], "not written");
    drop((disk, writer, cached));
    server.stop().map(drop)
}

fn openers_race_with_removal(cx: &Context) -> Result<()> {
    let opener = |over: &AtomicBool| {
        let mut reads = 0u64;
        while !over.load(Ordering::Relaxed) {
            let mut sector = [0; 512];
            let read = File::open("/dev/ublkb0").and_then(|mut disk| disk.read_exact(&mut sector));
            reads += u64::from(read.is_ok());
            thread::sleep(Duration::from_millis(1));
        }
        reads
    };
    let openers = |over: &AtomicBool| {
        thread::scope(|scope| {
            let all = [(); 3].map(|()| scope.spawn(|| opener(over)));
            let reads = all.into_iter().map(|one| one.join());
            let reads = reads.map(|one| one.map_err(|_| anyhow!("an opener panicked")));
            reads.sum::<Result<u64>>()
        })
    };
    let (reads, ()) = beside(openers, || {
        for _ in 0..8 {
            let serve = cx.serve().ublk("yes").args(["--ublk-id", "0"]);
            let server = serve.arg("mem:64M").start()?;
            thread::sleep(Duration::from_millis(30));
            server.stop()?;
        }
        Ok(())
    })?;
    ensure!(reads > 0, "no read succeeded");
    ensure!(!Path::new("/dev/ublkb0").exists(), "a disk is left");
    Ok(())
}
