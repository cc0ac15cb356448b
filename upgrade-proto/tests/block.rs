//! The block device's step, on a real block device. These tests overwrite the device named by
//! `UPGRADE_TEST_DEVICE` (loop, brd, ublk: any scratch disk with a volatile write cache), use the route
//! named by `UPGRADE_TEST_WAY` (`registry`, or `kernel` on a kernel with fd addresses) and need root.
//! `cargo test` shows them as ignored; the lab's guests run them with `-- --ignored`, both routes.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{major, minor};
use rustix::io::Errno;
use rustix::ioctl::{self, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use tempfile::TempDir;
use upgrade_proto::{
    Answer, BlockUpgrade, DiskClaim, Error, Key, Listener, Lookup, Name, NoService, Options, Route,
    connect,
};

/// One device, so one test at a time.
static DEVICE: Mutex<()> = Mutex::new(());

struct Disk {
    path: PathBuf,
    route: Route,
    dir: TempDir,
    name: Name,
    _turn: MutexGuard<'static, ()>,
}

impl Disk {
    fn take() -> Self {
        let path = std::env::var_os("UPGRADE_TEST_DEVICE")
            .expect("UPGRADE_TEST_DEVICE names a block device that may be overwritten");
        let route = match std::env::var("UPGRADE_TEST_WAY").as_deref() {
            Ok("kernel") => Route::Kernel,
            Ok("registry") | Err(_) => Route::Registry,
            Ok(other) => panic!("UPGRADE_TEST_WAY is kernel or registry, not {other}"),
        };
        let turn = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
        // Not the name a real server of the same disk uses.
        let name = Name::new("upgrade-test").expect("a name");
        Self {
            path: path.into(),
            route,
            dir: tempfile::tempdir().expect("a directory"),
            name,
            _turn: turn,
        }
    }

    fn plain(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.path)
            .expect("opened")
    }

    fn key(&self) -> Key {
        let number = self.number();
        Key::of_disk(major(number), minor(number)).expect("a key from sysfs")
    }

    /// A server that is found by the route under test.
    fn serve(&self) -> Listener {
        match self.route {
            Route::Kernel => {
                let options = Options {
                    runtime_dir: None,
                    ..Options::default()
                };
                Listener::bind(self.plain(), &self.name, &options).expect("bound")
            }
            Route::Registry => self.publish(self.key()),
        }
    }

    /// A server in the registry, as ublk's is on a kernel without fd addresses: it holds another
    /// descriptor than the disk's and gives the key itself.
    fn publish(&self, key: Key) -> Listener {
        let own = File::open("/dev/null").expect("opened");
        let options = Options {
            kernel: false,
            runtime_dir: Some(self.dir.path().to_owned()),
            key: Some(key),
            ..Options::default()
        };
        Listener::bind(&own, &self.name, &options).expect("bound")
    }

    fn lookup(&self) -> Lookup {
        Lookup {
            kernel: self.route == Route::Kernel,
            runtime_dirs: vec![self.dir.path().to_owned()],
            ..Lookup::default()
        }
    }

    fn upgrade(&self) -> Result<Answer<BlockUpgrade>, Error> {
        BlockUpgrade::open(&self.path, &self.name, &self.lookup())
    }

    fn upgraded(&self) -> BlockUpgrade {
        let answer = self.upgrade().expect("an answer");
        answer.found().expect("upgraded")
    }

    fn number(&self) -> u64 {
        std::fs::metadata(&self.path).expect("examined").rdev()
    }

    fn set_read_only(&self, read_only: i32) {
        const BLKROSET: ioctl::Opcode = opcode::none(0x12, 93);
        let disk = File::open(&self.path).expect("opened");
        // SAFETY: BLKROSET reads one int, which `Setter` owns during the call.
        unsafe { ioctl::ioctl(&disk, ioctl::Setter::<BLKROSET, i32>::new(read_only)) }
            .expect("set");
    }
}

/// Whether the first page of the device is in the page cache. A read that must not wait is no way to
/// ask: it starts reading ahead, and a quick disk has the page there before the answer.
fn is_cached(disk: &File) -> bool {
    let page_bytes = rustix::param::page_size();
    let mut resident = 0;
    // SAFETY: a mapping at an address of the kernel's choice, which nothing else refers to
    // or reads: it ends in this block.
    unsafe {
        let map = mmap(
            ptr::null_mut(),
            page_bytes,
            ProtFlags::READ,
            MapFlags::SHARED,
            disk,
            0,
        )
        .expect("mapped");
        assert_eq!(libc::mincore(map, page_bytes, &raw mut resident), 0);
        munmap(map, page_bytes).expect("unmapped");
    }
    resident & 1 == 1
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn sysfs_and_the_open_device_give_the_same_key() {
    let disk = Disk::take();
    assert_eq!(Key::of(disk.plain()).expect("a key"), disk.key());
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn a_disk_is_claimed_while_the_upgrade_lives_and_free_afterwards() {
    let disk = Disk::take();
    let listener = disk.serve();
    let upgrade = disk.upgraded();
    assert_eq!(upgrade.connection().route(), disk.route);
    assert!(!upgrade.is_read_only());
    assert!(listener.accept().expect("accepted").is_some());
    let exclusive = || {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_EXCL)
            .open(&disk.path)
    };
    assert_eq!(
        exclusive().expect_err("claimed").raw_os_error(),
        Some(libc::EBUSY)
    );
    let error = disk.upgrade().expect_err("claimed");
    assert!(error.to_string().contains("claimed exclusively"), "{error}");
    upgrade.release().expect("released");
    exclusive().expect("free");
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn a_claim_that_is_given_up_leaves_a_descriptor_that_leads_to_the_service() {
    let disk = Disk::take();
    let _listener = disk.serve();
    let kept = DiskClaim::open(&disk.path).expect("claimed");
    assert!(DiskClaim::open(&disk.path).is_err(), "claimed twice");
    let kept = kept.give_up().expect("given up");
    let _other = DiskClaim::open(&disk.path).expect("free");
    let answer = connect(&kept, &disk.name, &disk.lookup()).expect("an answer");
    assert_eq!(answer.found().expect("connected").route(), disk.route);
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn the_page_cache_is_dropped_before_the_upgrade_and_at_its_end() {
    let disk = Disk::take();
    let _listener = disk.serve();
    let plain = disk.plain();
    plain.write_all_at(&[0x5a; 4096], 0).expect("written");
    assert!(is_cached(&plain), "what was just written is in the cache");
    let upgrade = BlockUpgrade::from_fd(&plain, &disk.name, &disk.lookup()).expect("an answer");
    let upgrade = upgrade.found().expect("upgraded");
    assert!(!is_cached(&plain), "dropped before the upgrade");
    plain.read_exact_at(&mut [0; 4096], 0).expect("read");
    assert!(is_cached(&plain), "read meanwhile");
    upgrade.release().expect("released");
    assert!(!is_cached(&plain), "dropped at the end");
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn the_disks_own_write_cache_is_flushed_before_the_upgrade() {
    let disk = Disk::take();
    let number = disk.number();
    let sysfs = format!("/sys/dev/block/{}:{}", major(number), minor(number));
    let read = |file: &str| std::fs::read_to_string(format!("{sysfs}/{file}")).expect("read");
    assert_eq!(
        read("queue/write_cache").trim(),
        "write back",
        "this test needs a disk with a volatile write cache"
    );
    // Field 16 counts completed flushes; the kernel describes it in Documentation/block/stat.rst.
    let flushes = || -> u64 {
        let stat = read("stat");
        let flushes = stat.split_whitespace().nth(15).expect("16 fields");
        flushes.parse().expect("a number")
    };
    let _listener = disk.serve();
    disk.plain().write_all_at(&[1; 4096], 0).expect("written");
    let before = flushes();
    let _upgrade = disk.upgraded();
    assert!(flushes() > before);
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn half_a_descriptor_of_a_writable_disk_gets_nothing() {
    let disk = Disk::take();
    let _listener = disk.serve();
    let reader = File::open(&disk.path).expect("opened");
    let writer = File::options().write(true).open(&disk.path);
    let halves = [
        (reader, NoService::ReadOnlyDescriptor),
        (writer.expect("opened"), NoService::WriteOnlyDescriptor),
    ];
    for (half, why) in halves {
        match BlockUpgrade::from_fd(&half, &disk.name, &disk.lookup()).expect("an answer") {
            Answer::NoService(told) => assert_eq!(told, why),
            Answer::Found(_) => panic!("upgraded in spite of {why}"),
        }
        // Here the kernel itself refuses, or the library that asks the registry.
        let expected = match disk.route {
            Route::Kernel => NoService::Refused(Errno::ACCESS),
            Route::Registry => why,
        };
        match upgrade_proto::connect(half.as_fd(), &disk.name, &disk.lookup()).expect("an answer") {
            Answer::NoService(told) => assert_eq!(told, expected),
            Answer::Found(_) => panic!("connected in spite of {expected}"),
        }
    }
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn a_disk_made_read_only_is_shared_by_the_registry_and_refused_by_the_kernel() {
    let disk = Disk::take();
    let _listener = disk.serve();
    disk.set_read_only(1);
    let both = (disk.upgrade(), disk.upgrade());
    disk.set_read_only(0);
    if disk.route == Route::Kernel {
        // What counts there is the driver's flag, not the administrator's wish.
        let refused = |answer: &Result<Answer<BlockUpgrade>, Error>| {
            matches!(
                answer,
                Ok(Answer::NoService(NoService::Refused(Errno::ACCESS)))
            )
        };
        assert!(refused(&both.0) && refused(&both.1), "{both:?}");
        return;
    }
    let (Ok(Answer::Found(first)), Ok(Answer::Found(second))) = both else {
        panic!("{both:?}")
    };
    assert!(first.is_read_only() && second.is_read_only());
    first.connection().stream().write_all(b"!").expect("sent");
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn an_entry_of_the_numbers_earlier_disk_is_not_found() {
    let disk = Disk::take();
    let Key::Block {
        major,
        minor,
        diskseq,
    } = disk.key()
    else {
        panic!("a disk's key")
    };
    let _listener = disk.publish(Key::Block {
        major,
        minor,
        diskseq: diskseq - 1,
    });
    let answer = disk.upgrade().expect("an answer");
    assert!(
        matches!(answer, Answer::NoService(NoService::NotOffered)),
        "{answer:?}"
    );
}

#[test]
#[ignore = "needs root and UPGRADE_TEST_DEVICE, a scratch disk"]
fn a_mounted_disk_is_refused_and_the_message_names_the_place() {
    let disk = Disk::take();
    let _listener = disk.serve();
    let run = |program: &str, args: &[&Path]| {
        let status = Command::new(program).args(args).status();
        assert!(status.expect("it runs").success(), "{program}");
    };
    let place = tempfile::tempdir().expect("a directory");
    run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), &disk.path]);
    run("mount", &[&disk.path, place.path()]);
    let answer = disk.upgrade();
    run("umount", &[place.path()]);
    let error = answer.expect_err("in use");
    assert_eq!(error.errno(), Errno::BUSY);
    assert!(
        error
            .to_string()
            .contains(&format!("mounted at {}", place.path().display())),
        "{error}"
    );
}
