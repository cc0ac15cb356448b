//! From the block device's descriptor to the vhost door, and who may write meanwhile.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use upgrade_proto::{Answer, BlockUpgrade, Lookup, Name, NoService, Route, connect};
use vhost::VhostBackend;

use super::common::{self, Driver, INDIRECT, OK, PATIENCE, PROTOCOL, VERSION_1, eventually};
use super::common::{Sandbox, sandbox};
use super::{read_page, run};
use testkit::proc::{context_switches, sleeps};
use testkit::server::Server;

pub const BLOCK: usize = 4096;

/// What a driver of a read-only disk in memory may accept.
pub const PLAIN: u64 = VERSION_1 | INDIRECT | PROTOCOL;

/// A block of memory that O_DIRECT takes.
#[repr(align(4096))]
#[derive(Clone)]
pub struct Block(pub [u8; BLOCK]);

impl Block {
    fn of(byte: u8) -> Box<Self> {
        Box::new(Self([byte; BLOCK]))
    }
}

/// A server with a disk of 64 MiB in memory, and ways to look at it.
pub struct Export {
    pub lab: Sandbox,
    pub server: Server,
    pub disk: PathBuf,
}

pub fn serve(args: &[&str]) -> Export {
    serve_in(sandbox(), "mem:64M", args)
}

pub fn serve_in(lab: Sandbox, spec: &str, args: &[&str]) -> Export {
    let server = lab.serve(&[&["--ublk", "yes", "--name", "d", spec], args].concat());
    let stat = stat(&lab);
    let disk = stat["ublk"]["device"].as_str().unwrap().into();
    assert_eq!(
        stat["vhost"]["upgrade"],
        serde_json::json!(["kernel", "registry"])
    );
    Export { lab, server, disk }
}

pub fn stat(lab: &Sandbox) -> serde_json::Value {
    serde_json::from_str(&lab.ok(&["stat", "d", "--json"])).unwrap()
}

impl Export {
    pub fn access(&self) -> String {
        stat(&self.lab)["access"].as_str().unwrap().to_owned()
    }

    pub fn lookup(&self, route: Route) -> Lookup {
        match route {
            Route::Kernel => Lookup {
                runtime_dirs: Vec::new(),
                ..Lookup::default()
            },
            Route::Registry => Lookup {
                kernel: false,
                runtime_dirs: vec![self.lab.path("run")],
                ..Lookup::default()
            },
        }
    }

    pub fn answer(&self, fd: &File, route: Route) -> Answer<upgrade_proto::Connection> {
        connect(fd, &service(), &self.lookup(route)).unwrap()
    }

    /// A client that holds nothing but the descriptor of the disk.
    pub fn come(&self, route: Route) -> UnixStream {
        match self.answer(&direct(&self.disk), route) {
            Answer::Found(found) => {
                assert_eq!(found.route(), route);
                found.into_stream()
            }
            Answer::NoService(why) => panic!("no service by {route:?}: {why}"),
        }
    }

    pub fn expect_access(&self, wanted: &str) {
        eventually(&format!("the access is {wanted}"), || {
            self.access() == wanted
        });
    }

    pub fn end(self) {
        self.server.stop().unwrap();
        self.lab.is_clean();
    }
}

pub fn service() -> Name {
    Name::new("vhost-user-blk").unwrap()
}

pub fn direct(disk: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(disk)
        .unwrap()
}

pub fn errno(result: std::io::Result<()>) -> Option<i32> {
    result.err().map(|error| error.raw_os_error().unwrap())
}

pub fn write_block(file: &File, number: u64, byte: u8) -> std::io::Result<()> {
    file.write_all_at(&Block::of(byte).0, number * BLOCK as u64)
}

pub fn read_block(file: &File, number: u64) -> Box<Block> {
    let mut block = Block::of(0);
    file.read_exact_at(&mut block.0, number * BLOCK as u64)
        .unwrap();
    block
}

/// BLKDISCARD or BLKZEROOUT of a block.
fn erase(file: &File, request: libc::Ioctl, number: u64) -> Option<i32> {
    let range = [number * BLOCK as u64, BLOCK as u64];
    // SAFETY: both requests read two 64-bit numbers.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, &range) };
    (result < 0).then(|| std::io::Error::last_os_error().raw_os_error().unwrap())
}

const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;

/// Stops all vrings and hangs up: the client leaves.
pub fn leave(driver: Driver) {
    for index in 0..driver.vrings.len() {
        driver.frontend.get_vring_base(index).unwrap();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn while_a_client_has_the_disk_the_block_door_reads_and_does_not_write() {
    for route in [Route::Kernel, Route::Registry] {
        let export = serve(&[]);
        let block = direct(&export.disk);
        write_block(&block, 7, b'b').unwrap();
        // Looking does not take the disk.
        let looking = Driver::connect(export.come(route), PLAIN);
        assert_eq!(export.access(), "block");
        write_block(&block, 8, b'b').unwrap();
        drop(looking);

        let mut driver = Driver::running(export.come(route), PLAIN);
        assert_eq!(export.access(), "upgraded");
        assert_eq!(driver.read(7 * 8, BLOCK), (OK, vec![b'b'; BLOCK]));
        assert_eq!(driver.write(7 * 8, &[b'v'; BLOCK]), OK);
        assert_eq!(errno(write_block(&block, 9, b'x')), Some(libc::EBADE));
        assert_eq!(erase(&block, BLKDISCARD, 8), Some(libc::EBADE));
        assert_eq!(erase(&block, BLKZEROOUT, 8), Some(libc::EBADE));
        assert!(read_block(&block, 7).0.iter().all(|&b| b == b'v'));
        assert!(read_block(&block, 8).0.iter().all(|&b| b == b'b'));
        assert!(read_block(&block, 9).0.iter().all(|&b| b == 0));
        block.sync_all().unwrap();

        leave(driver);
        export.expect_access("block");
        write_block(&block, 9, b'c').unwrap();
        assert_eq!(erase(&block, BLKZEROOUT, 8), None);
        assert!(read_block(&block, 8).0.iter().all(|&b| b == 0));
        drop(block);
        let log = export.server.stop().unwrap();
        for refused in [
            "write of 4096 bytes at 36864",
            "discard of 4096 bytes at 32768",
        ] {
            let told =
                format!("{refused} was refused: a client of the vhost-user socket has the disk");
            assert!(log.contains(&told), "{log}");
        }
        export.lab.is_clean();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn the_disk_is_kept_for_a_client_that_died_until_the_grace_is_over() {
    let export = serve(&["--reconnect-grace", "3600"]);
    let block = direct(&export.disk);
    let mut driver = Driver::running(export.come(Route::Kernel), PLAIN);
    assert_eq!(driver.write(0, &[b'v'; BLOCK]), OK);
    drop(driver);
    export.expect_access("waiting");
    assert_eq!(errno(write_block(&block, 0, b'x')), Some(libc::EBADE));
    let mut again = Driver::running(export.come(Route::Registry), PLAIN);
    assert_eq!(export.access(), "upgraded");
    assert_eq!(again.read(0, BLOCK), (OK, vec![b'v'; BLOCK]));
    leave(again);
    export.expect_access("block");
    drop(block);
    export.end();

    let export = serve(&["--reconnect-grace", "1"]);
    let block = direct(&export.disk);
    drop(Driver::running(export.come(Route::Kernel), PLAIN));
    export.expect_access("block");
    write_block(&block, 0, b'c').unwrap();
    drop(block);
    export.end();
}

/// Counts upwards in a block of its own until it is refused.
fn count_until_refused(disk: &Path, number: u64, told: &AtomicU64) {
    let block = direct(disk);
    let deadline = Instant::now() + PATIENCE;
    let mut count = told.load(Ordering::SeqCst);
    let mut data = Block::of(0);
    while Instant::now() < deadline {
        count += 1;
        data.0[..8].copy_from_slice(&count.to_le_bytes());
        match block.write_all_at(&data.0, number * BLOCK as u64) {
            Ok(()) => told.store(count, Ordering::SeqCst),
            Err(error) => return assert_eq!(error.raw_os_error(), Some(libc::EBADE)),
        }
    }
    panic!("the writer was never refused");
}

/// What writers at the block device were told is written must be what a client finds: no more,
/// since nothing may change after it has come, and no less.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn every_write_of_the_block_door_is_complete_before_a_client_has_the_disk() {
    let export = serve(&[]);
    let acknowledged: [Arc<AtomicU64>; 4] = Default::default();
    let counts = || {
        acknowledged
            .iter()
            .map(|count| count.load(Ordering::SeqCst))
    };
    for round in 1..=10 {
        let before: u64 = counts().sum();
        let writers: Vec<_> = (0..)
            .zip(&acknowledged)
            .map(|(number, told)| {
                let (disk, told) = (export.disk.clone(), Arc::clone(told));
                std::thread::spawn(move || count_until_refused(&disk, number, &told))
            })
            .collect();
        eventually("they write", || counts().sum::<u64>() >= before + 20);
        let mut driver = Driver::running(export.come(Route::Kernel), PLAIN);
        let found: Vec<u64> = (0..4)
            .map(|number| {
                let (status, data) = driver.read(number * 8, BLOCK);
                assert_eq!(status, OK);
                u64::from_le_bytes(data[..8].try_into().unwrap())
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        assert_eq!(found, counts().collect::<Vec<_>>(), "round {round}");
        leave(driver);
        export.expect_access("block");
    }
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_mounted_disk_is_not_taken_from_its_file_system() {
    let export = serve(&[]);
    let disk = export.disk.to_str().unwrap();
    run("mkfs.ext4", &["-q", disk]).unwrap();
    let place = export.lab.path("mnt");
    fs::create_dir(&place).unwrap();
    run("mount", &[disk, place.to_str().unwrap()]).unwrap();
    // The library's claim notices it first …
    let refused = BlockUpgrade::open(&export.disk, &service(), &export.lookup(Route::Kernel));
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("mounted at"), "{message}");
    // … and a client without manners is refused by the server when it starts a vring.
    let mut rude = Driver::connect(export.come(Route::Kernel), PLAIN);
    let started = common::attempt(|| rude.add_vring(128));
    assert!(started.is_err(), "the vring of a mounted disk was started");
    drop(rude);
    export.expect_access("block");
    fs::write(place.join("file"), "still writable").unwrap();
    run("sync", &["-f", place.to_str().unwrap()]).unwrap();
    run("umount", &[place.to_str().unwrap()]).unwrap();
    leave(Driver::running(export.come(Route::Kernel), PLAIN));
    export.expect_access("block");
    run("fsck.ext4", &["-fn", disk]).unwrap();
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn what_is_dirty_in_the_page_cache_is_written_before_the_client_reads() {
    let export = serve(&[]);
    let cached = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&export.disk)
        .unwrap();
    cached.write_all_at(&[b'd'; BLOCK], 0).unwrap();
    let upgrade = BlockUpgrade::open(&export.disk, &service(), &export.lookup(Route::Kernel));
    let Answer::Found(upgrade) = upgrade.unwrap() else {
        panic!("no service");
    };
    let stream = upgrade.connection().stream().try_clone().unwrap();
    let mut driver = Driver::running(stream, PLAIN);
    assert_eq!(driver.read(0, BLOCK), (OK, vec![b'd'; BLOCK]));
    assert_eq!(driver.write(0, &[b'v'; BLOCK]), OK);
    // A reader meanwhile fills the page cache with what will be stale.
    assert_eq!(driver.write(8, &[b'1'; BLOCK]), OK);
    let mut seen = vec![0; BLOCK];
    cached.read_exact_at(&mut seen, BLOCK as u64).unwrap();
    assert_eq!(seen, vec![b'1'; BLOCK]);
    assert_eq!(driver.write(8, &[b'2'; BLOCK]), OK);
    leave(driver);
    upgrade.release().unwrap();
    cached.read_exact_at(&mut seen, BLOCK as u64).unwrap();
    assert_eq!(seen, vec![b'2'; BLOCK], "the page cache is stale");
    cached.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, vec![b'v'; BLOCK]);
    drop(cached);
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn who_may_not_write_to_the_disk_gets_no_client_of_it() {
    let export = serve(&[]);
    let reader = File::open(&export.disk).unwrap();
    for (route, wanted) in [
        (Route::Kernel, NoService::Refused(rustix::io::Errno::ACCESS)),
        (Route::Registry, NoService::ReadOnlyDescriptor),
    ] {
        match export.answer(&reader, route) {
            Answer::NoService(why) => assert_eq!(why, wanted),
            Answer::Found(_) => panic!("a reader came in by {route:?}"),
        }
    }
    drop(reader);
    // One disk's clients do not get to another's.
    let other = serve(&["--ublk-id", "77"]);
    assert_eq!(other.disk, Path::new("/dev/ublkb77"));
    let mut driver = Driver::running(other.come(Route::Kernel), PLAIN);
    assert_eq!(driver.write(0, &[b'o'; BLOCK]), OK);
    assert_eq!(
        (export.access(), other.access()),
        ("block".into(), "upgraded".into())
    );
    assert!(
        read_block(&direct(&export.disk), 0)
            .0
            .iter()
            .all(|&b| b == 0)
    );
    leave(driver);
    other.end();
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn one_client_at_a_time_has_a_writable_disk_and_many_a_read_only_one() {
    let export = serve(&[]);
    let first = Driver::running(export.come(Route::Kernel), PLAIN);
    let mut second = common::attempt(|| Driver::running(export.come(Route::Registry), PLAIN));
    assert!(second.is_err(), "two clients have the disk");
    leave(first);
    export.expect_access("block");
    second = common::attempt(|| Driver::running(export.come(Route::Registry), PLAIN));
    leave(second.unwrap());
    export.end();

    let export = serve(&["--read-only"]);
    assert_eq!(export.access(), "shared");
    let disk = File::open(&export.disk).unwrap();
    let clients: Vec<_> = [Route::Kernel, Route::Registry, Route::Kernel]
        .into_iter()
        .map(|route| match export.answer(&disk, route) {
            Answer::Found(found) => Driver::running(found.into_stream(), PLAIN),
            Answer::NoService(why) => panic!("{why}"),
        })
        .collect();
    for mut client in clients {
        assert_eq!(client.read(0, BLOCK), (OK, vec![0; BLOCK]));
        assert_ne!(client.write(0, &[1; BLOCK]), OK);
        assert_eq!(export.access(), "shared");
    }
    drop(disk);
    export.end();
}

/// The offer must not keep the device: neither a server that stops nor clients that hang about.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_that_stops_takes_its_offer_along() {
    let export = serve(&[]);
    let looking = Driver::connect(export.come(Route::Kernel), PLAIN);
    let running = Driver::running(export.come(Route::Kernel), PLAIN);
    let held = direct(&export.disk);
    let lookups = [export.lookup(Route::Kernel), export.lookup(Route::Registry)];
    let started = Instant::now();
    let Export { lab, server, .. } = export;
    server.stop().unwrap();
    assert!(started.elapsed() < Duration::from_secs(60));
    for lookup in lookups {
        let answer = connect(&held, &service(), &lookup);
        assert!(
            !matches!(answer, Ok(Answer::Found(_))),
            "a disk without a server offers a service"
        );
    }
    drop((looking, running, held));
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_with_both_doors_open_wakes_nobody_while_idle() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "yes", "--vhost", "yes", "d=mem:64M"]);
    let stat = stat(&lab);
    let device = PathBuf::from(stat["ublk"]["device"].as_str().unwrap());
    let read = || read_page(&device);
    read().unwrap();
    sleeps(server.pid()).expect("with a block device");
    let silent = lab.connect("d");
    sleeps(server.pid()).expect("with a client that never said a word");
    drop(silent);
    let mut driver = Driver::running(lab.connect("d"), PLAIN);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    sleeps(server.pid()).expect("with a client that has nothing to say");
    // The threads that were watched are the ones that work.
    let before = context_switches(server.pid()).unwrap();
    assert_eq!(driver.write(1, &[8; 512]), OK);
    read().unwrap();
    assert!(context_switches(server.pid()).unwrap() > before);
    leave(driver);
    server.stop().unwrap();
    lab.is_clean();
}
