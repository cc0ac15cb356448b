//! The ways of data between a block device's requests and the storage.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ublkup::door::ublk::{DataPath, UblkConfig, UblkDoor};
use ublkup::engine::counters::{Counters, Totals};
use ublkup::storage::{CacheMode, File};

use crate::common::{Sandbox, file_options, sandbox};
use crate::{MIB, config, dd, no_end, noise, run};
use testkit::server::Server;

/// Serves a disk through the ublk door; its server and its device.
pub fn serve(lab: &Sandbox, name: &str, spec: &str, args: &[&str]) -> (Server, PathBuf) {
    let doors = ["--ublk", "yes", "--vhost", "no", "--name", name];
    let server = lab.serve(&[&doors, args, &[spec]].concat());
    let stat = stat(lab, name);
    let device = stat["ublk"]["device"].as_str().unwrap().into();
    (server, device)
}

pub fn stat(lab: &Sandbox, name: &str) -> serde_json::Value {
    serde_json::from_str(&lab.ok(&["stat", name, "--json"])).unwrap()
}

/// Storage that takes data without a copy: a block device of another server, in memory.
fn storage(lab: &Sandbox, name: &str) -> (Server, PathBuf) {
    serve(lab, name, "mem:64M", &[])
}

fn same(one: &Path, other: &Path, skip: u64, bytes: u64) {
    let (skip, bytes) = (format!("{skip}:0"), bytes.to_string());
    let files = [one.to_str().unwrap(), other.to_str().unwrap()];
    run("cmp", &[&["-i", &skip, "-n", &bytes], &files[..]].concat()).unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn data_arrives_whole_whoever_moves_it() {
    let lab = sandbox();
    for mode in ["copy", "user-copy", "zero-copy", "auto"] {
        let (lower, storage) = storage(&lab, "lower");
        let spec = format!("file:{}", storage.display());
        let (upper, disk) = serve(&lab, "upper", &spec, &["--ublk-data", mode]);
        let used = if mode == "auto" { "zero-copy" } else { mode };
        assert_eq!(stat(&lab, "upper")["ublk"]["data"], used);
        let wanted = noise("data", 16 * MIB);
        let got = wanted.with_extension("back");
        for block in ["bs=512", "bs=24k", "bs=2M"] {
            let write = ["oflag=direct,seek_bytes", "seek=512", "conv=fsync", block];
            dd(&wanted, &disk, &write).unwrap();
            let count = format!("count={}", 16 * MIB);
            let read = [
                "iflag=direct,skip_bytes,count_bytes",
                "skip=512",
                "bs=1M",
                &count,
            ];
            dd(&disk, &got, &read).unwrap();
            same(&wanted, &got, 0, 16 * MIB);
        }
        // Through the page cache, whose pages come in all orders.
        dd(
            &wanted,
            &disk,
            &["oflag=seek_bytes", "seek=20M", "bs=3k", "conv=fsync"],
        )
        .unwrap();
        run("blockdev", &["--flushbufs", disk.to_str().unwrap()]).unwrap();
        dd(
            &disk,
            &got,
            &[
                "iflag=skip_bytes,count_bytes",
                "skip=20M",
                "bs=7k",
                "count=16M",
            ],
        )
        .unwrap();
        same(&wanted, &got, 0, 16 * MIB);
        let counters = stat(&lab, "upper")["ublk"]["counters"].clone();
        assert_eq!(counters["errors"], 0);
        upper.stop().unwrap();
        // What the other one served is what is there.
        same(&storage, &wanted, 512, 16 * MIB);
        lower.stop().unwrap();
        let _ = (fs::remove_file(wanted), fs::remove_file(got));
    }
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_that_must_reach_its_data_gets_a_copy_or_says_so() {
    let lab = sandbox();
    let (memory, _) = storage(&lab, "memory");
    assert_eq!(stat(&lab, "memory")["ublk"]["data"], "copy");
    memory.stop().unwrap();
    let zero_copy = ["--ublk", "yes", "--vhost", "no", "--ublk-data", "zero-copy"];
    let refused = [&zero_copy[..], &["mem:1M"]].concat();
    lab.serve_fails(&refused, 1, &["without a copy", "--ublk-data"]);
    // Nobody fills what a null disk is to read: only for who asks.
    let (null, _) = serve(&lab, "null", "null:1M", &[]);
    assert_eq!(stat(&lab, "null")["ublk"]["data"], "copy");
    null.stop().unwrap();
    let (null, disk) = serve(&lab, "null", "null:1M", &["--ublk-data", "zero-copy"]);
    assert_eq!(stat(&lab, "null")["ublk"]["data"], "zero-copy");
    dd(&disk, Path::new("/dev/null"), &["bs=64k", "iflag=direct"]).unwrap();
    dd(
        Path::new("/dev/zero"),
        &disk,
        &["bs=64k", "count=16", "oflag=direct"],
    )
    .unwrap();
    null.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_device_without_copies_outlives_its_server() {
    let lab = sandbox();
    let (lower, storage) = storage(&lab, "lower");
    let spec = format!("file:{}", storage.display());
    let (upper, disk) = serve(&lab, "upper", &spec, &[]);
    assert_eq!(stat(&lab, "upper")["ublk"]["data"], "zero-copy");
    let wanted = noise("outlives", 8 * MIB);
    dd(&wanted, &disk, &["bs=64k", "oflag=direct"]).unwrap();
    upper.kill().unwrap();
    // However the next one is told to do it, the device stays as it was made.
    let (upper, again) = serve(&lab, "upper", &spec, &["--ublk-data", "copy"]);
    assert_eq!(again, disk);
    assert_eq!(stat(&lab, "upper")["ublk"]["data"], "zero-copy");
    run("blockdev", &["--flushbufs", disk.to_str().unwrap()]).unwrap();
    same(&disk, &wanted, 0, 8 * MIB);
    upper.stop().unwrap();
    lower.stop().unwrap();
    let _ = fs::remove_file(wanted);
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn what_the_driver_cannot_register_is_copied() {
    let lab = sandbox();
    let (lower, storage) = storage(&lab, "lower");
    let backend = File::open(file_options(storage.clone(), CacheMode::Auto));
    let counters = Arc::<Counters>::default();
    // The tags take turns: some have a place, some have none.
    let config = UblkConfig {
        queues: 1,
        depth: 8,
        data: DataPath::ZeroCopy,
        ring_places: Some(3),
        ..config()
    };
    let next = || Arc::clone(&counters);
    let door = UblkDoor::start(&config, &Arc::new(backend.unwrap()), next, no_end).unwrap();
    assert_eq!(door.facts().data, DataPath::ZeroCopy);
    let disk = door.block_path();
    let wanted = noise("unregistered", 4 * MIB);
    let got = wanted.with_extension("back");
    for (direct, block) in [(true, "bs=512"), (true, "bs=2M"), (false, "bs=64k")] {
        let (write, read) = match direct {
            true => (
                "oflag=direct,seek_bytes",
                "iflag=direct,skip_bytes,count_bytes",
            ),
            false => ("oflag=seek_bytes", "iflag=skip_bytes,count_bytes"),
        };
        dd(&wanted, &disk, &[write, "seek=512", "conv=fsync", block]).unwrap();
        run("blockdev", &["--flushbufs", disk.to_str().unwrap()]).unwrap();
        let count = format!("count={}", 4 * MIB);
        dd(&disk, &got, &[read, "skip=512", "bs=1M", &count]).unwrap();
        same(&wanted, &got, 0, 4 * MIB);
    }
    door.stop().unwrap();
    let mut totals = Totals::default();
    counters.add_to(&mut totals);
    assert_eq!(totals.errors, 0, "{totals:?}");
    same(&storage, &wanted, 512, 4 * MIB);
    lower.stop().unwrap();
    let _ = (fs::remove_file(wanted), fs::remove_file(got));
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_device_whose_data_lies_anywhere_is_not_gone_on_with_by_a_disk_that_minds() {
    let lab = sandbox();
    // A loop device takes direct I/O of whole sectors only, in memory as on the disk.
    let image = lab.image("disk.img", 16 * MIB);
    let storage = run("losetup", &["--find", "--show", image.to_str().unwrap()]).unwrap();
    let spec = |cache: &str| format!("file:{storage},cache={cache}");
    let zero_copy = ["--ublk-data", "zero-copy"];
    let (upper, disk) = serve(&lab, "upper", &spec("buffered"), &zero_copy);
    upper.kill().unwrap();
    let named = format!("upper={}", spec("direct"));
    for take_over in [&[][..], &["--take-over"]] {
        let args = [&["--ublk", "yes", "--vhost", "no", &named], take_over].concat();
        let why = ["at multiples of 4 bytes", "of 512", "cache=buffered"];
        lab.serve_fails(&args, 1, &why);
    }
    // It waits for one that does not.
    let (upper, again) = serve(&lab, "upper", &spec("buffered"), &[]);
    assert_eq!(again, disk);
    dd(
        Path::new("/dev/zero"),
        &disk,
        &["bs=4k", "count=4", "oflag=direct"],
    )
    .unwrap();
    upper.stop().unwrap();
    run("losetup", &["-d", &storage]).unwrap();
    lab.is_clean();
}
