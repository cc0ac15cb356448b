//! The block device's step, on a real block device. These tests overwrite the device named by
//! `UPGRADE_TEST_DEVICE` (loop, brd, ublk: any scratch disk) and need root; without it they are skipped.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{major, minor};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::ioctl::{self, opcode};
use tempfile::TempDir;
use upgrade_proto::{
    Answer, BlockUpgrade, Error, Key, Listener, Lookup, Name, NoService, Options, Way,
};

/// One device, so one test at a time.
static DEVICE: Mutex<()> = Mutex::new(());

struct Disk {
    path: PathBuf,
    dir: TempDir,
    name: Name,
    _turn: MutexGuard<'static, ()>,
}

impl Disk {
    fn take() -> Option<Self> {
        let Some(path) = std::env::var_os("UPGRADE_TEST_DEVICE") else {
            eprintln!("SKIPPED: set UPGRADE_TEST_DEVICE to a block device that may be overwritten");
            return None;
        };
        let turn = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
        let name = Name::new("vhost-user-blk").expect("a name");
        Some(Self {
            path: path.into(),
            dir: tempfile::tempdir().expect("a directory"),
            name,
            _turn: turn,
        })
    }

    fn plain(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.path)
            .expect("opened")
    }

    fn key(&self) -> Key {
        let number = std::fs::metadata(&self.path).expect("examined").rdev();
        Key::of_disk(major(number), minor(number)).expect("a key from sysfs")
    }

    /// A server as ublk's is: it holds another descriptor than the disk's and gives the key itself.
    fn serve(&self, key: Key) -> Listener {
        let own = File::open("/dev/null").expect("opened");
        let runtime_dir = Some(self.dir.path().to_owned());
        let options = Options {
            kernel: false,
            runtime_dir,
            key: Some(key),
            backlog: 4,
        };
        Listener::bind(&own, &self.name, &options).expect("bound")
    }

    fn lookup(&self) -> Lookup {
        Lookup {
            kernel: false,
            runtime_dirs: vec![self.dir.path().to_owned()],
            ..Lookup::default()
        }
    }

    fn upgrade(&self) -> Result<Answer<BlockUpgrade>, Error> {
        BlockUpgrade::open(&self.path, &self.name, &self.lookup())
    }

    fn set_read_only(&self, read_only: i32) {
        const BLKROSET: ioctl::Opcode = opcode::none(0x12, 93);
        let disk = File::open(&self.path).expect("opened");
        // SAFETY: BLKROSET reads one int, which `Setter` owns during the call.
        unsafe { ioctl::ioctl(&disk, ioctl::Setter::<BLKROSET, i32>::new(read_only)) }
            .expect("set");
    }
}

/// Whether the first page of the device is in the page cache.
fn is_cached(disk: &File) -> bool {
    let mut page = [0; 512];
    match preadv2(
        disk,
        &mut [IoSliceMut::new(&mut page)],
        0,
        ReadWriteFlags::NOWAIT,
    ) {
        Ok(len_bytes) => len_bytes > 0,
        Err(Errno::AGAIN) => false,
        Err(errno) => panic!("preadv2: {errno}"),
    }
}

#[test]
fn sysfs_and_the_open_device_give_the_same_key() {
    let Some(disk) = Disk::take() else { return };
    assert_eq!(Key::of(disk.plain()).expect("a key"), disk.key());
}

#[test]
fn a_disk_is_claimed_while_the_upgrade_lives_and_free_afterwards() {
    let Some(disk) = Disk::take() else { return };
    let listener = disk.serve(disk.key());
    let upgrade = disk
        .upgrade()
        .expect("an answer")
        .found()
        .expect("upgraded");
    assert_eq!(upgrade.connection().way(), Way::Registry);
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
fn the_page_cache_is_dropped_before_the_upgrade_and_at_its_end() {
    let Some(disk) = Disk::take() else { return };
    let _listener = disk.serve(disk.key());
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
fn the_disks_own_write_cache_is_flushed_before_the_upgrade() {
    let Some(disk) = Disk::take() else { return };
    let number = std::fs::metadata(&disk.path).expect("examined").rdev();
    let sysfs = format!("/sys/dev/block/{}:{}", major(number), minor(number));
    let read = |file: &str| std::fs::read_to_string(format!("{sysfs}/{file}")).expect("read");
    if read("queue/write_cache").trim() != "write back" {
        eprintln!("SKIPPED: the device has no volatile write cache");
        return;
    }
    // Field 16 counts completed flushes; the kernel describes it in Documentation/block/stat.rst.
    let flushes = || -> u64 {
        let stat = read("stat");
        stat.split_whitespace()
            .nth(15)
            .expect("16 fields")
            .parse()
            .expect("a number")
    };
    let _listener = disk.serve(disk.key());
    disk.plain().write_all_at(&[1; 4096], 0).expect("written");
    let before = flushes();
    let _upgrade = disk
        .upgrade()
        .expect("an answer")
        .found()
        .expect("upgraded");
    assert!(flushes() > before);
}

#[test]
fn a_read_only_descriptor_of_a_writable_disk_gets_nothing() {
    let Some(disk) = Disk::take() else { return };
    let _listener = disk.serve(disk.key());
    let reader = File::open(&disk.path).expect("opened");
    let refused = [
        BlockUpgrade::from_fd(&reader, &disk.name, &disk.lookup()).map(|answer| match answer {
            Answer::NoService(why) => Some(why),
            Answer::Found(_) => None,
        }),
        upgrade_proto::connect(reader.as_fd(), &disk.name, &disk.lookup()).map(
            |answer| match answer {
                Answer::NoService(why) => Some(why),
                Answer::Found(_) => None,
            },
        ),
    ];
    for answer in refused {
        assert_eq!(
            answer.expect("an answer"),
            Some(NoService::ReadOnlyDescriptor)
        );
    }
}

#[test]
fn a_read_only_disk_is_shared() {
    let Some(disk) = Disk::take() else { return };
    let _listener = disk.serve(disk.key());
    disk.set_read_only(1);
    let both = (disk.upgrade(), disk.upgrade());
    disk.set_read_only(0);
    let (Ok(Answer::Found(first)), Ok(Answer::Found(second))) = both else {
        panic!("{both:?}")
    };
    assert!(first.is_read_only() && second.is_read_only());
    first.connection().stream().write_all(b"!").expect("sent");
}

#[test]
fn an_entry_of_the_numbers_earlier_disk_is_not_found() {
    let Some(disk) = Disk::take() else { return };
    let Key::Block {
        major,
        minor,
        diskseq,
    } = disk.key()
    else {
        panic!("a disk's key")
    };
    let _listener = disk.serve(Key::Block {
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
fn a_mounted_disk_is_refused_and_the_message_names_the_place() {
    let Some(disk) = Disk::take() else { return };
    let _listener = disk.serve(disk.key());
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&disk.path)
        .status();
    let Ok(made) = made else {
        eprintln!("SKIPPED: no mkfs.ext4: install e2fsprogs");
        return;
    };
    assert!(made.success());
    let place = tempfile::tempdir().expect("a directory");
    assert!(
        Command::new("mount")
            .arg(&disk.path)
            .arg(place.path())
            .status()
            .expect("mount runs")
            .success()
    );
    let answer = disk.upgrade();
    assert!(
        Command::new("umount")
            .arg(place.path())
            .status()
            .expect("umount runs")
            .success()
    );
    let error = answer.expect_err("in use");
    assert_eq!(error.errno(), Errno::BUSY);
    assert!(
        error
            .to_string()
            .contains(&format!("mounted at {}", place.path().display())),
        "{error}"
    );
}
