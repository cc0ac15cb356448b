//! Programs that use a block device and go, in every state: none leaves anything in the server. And
//! one whose disk grows under it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{ptr, thread};

use anyhow::{Context as _, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use testkit::images::{self, KnownFiles};
use testkit::proc::Holdings;
use testkit::process;
use testkit::random::Random;
use testkit::shell::{Shell, sh};

use crate::kit::sysfs::Sysfs;
use crate::test;
use crate::test::{Context, Test};

/// Inside User Mode Linux.
pub const TESTS: &[Test] = &[
    test!(
        clients_of_the_block_door_leave_nothing_in_the_server,
        |cx| { leave_nothing(cx, 120) }
    )
    .limit_s(120),
    test!(
        a_thousand_clients_of_the_block_door_leave_nothing_in_the_server,
        |cx| { leave_nothing(cx, 1000) }
    )
    .limit_s(1200)
    .full(),
    test!(a_mounted_file_system_grows_with_its_disk_and_outlives_the_server),
];

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 64 * MIB;

/// How a client uses the disk before it goes.
#[derive(Clone, Copy, Debug)]
enum Use {
    /// It opens it and reads a sector.
    Opens,
    /// It opens it for itself alone, writes a page and does not ask for it to be on the disk.
    WritesThroughTheCache,
    /// It maps a part of it, reads and writes there.
    Maps,
    /// It has the kernel look for partitions.
    LooksForPartitions,
    /// It reads around the page cache and is killed.
    DiesReading,
    /// It writes around the page cache and is killed.
    DiesWriting,
}

const USES: [Use; 6] = [
    Use::Opens,
    Use::WritesThroughTheCache,
    Use::Maps,
    Use::LooksForPartitions,
    Use::DiesReading,
    Use::DiesWriting,
];

impl Use {
    fn run(self, device: &Path, random: &mut Random) -> Result<()> {
        let open = || OpenOptions::new().read(true).write(true).open(device);
        let at = random.below(DISK_BYTES / MIB) * MIB;
        match self {
            Use::Opens => open()?.read_exact_at(&mut [0; 512], at)?,
            Use::WritesThroughTheCache => open()?.write_all_at(&random.bytes(4096), at)?,
            Use::Maps => touch(&open()?, at)?,
            Use::LooksForPartitions => {
                Shell::new("blockdev").arg("--rereadpt").arg(device).run()?;
            }
            Use::DiesReading => {
                let from = format!("if={}", device.display());
                die([&from, "of=/dev/null", "iflag=direct"], random)?;
            }
            Use::DiesWriting => {
                let to = format!("of={}", device.display());
                die(["if=/dev/zero", &to, "oflag=direct"], random)?;
            }
        }
        Ok(())
    }
}

/// A page of a mapping, read and written.
fn touch(disk: &File, at: u64) -> Result<()> {
    let len = 64 << 10;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page = unsafe { mmap(ptr::null_mut(), len, access, MapFlags::SHARED, disk, at) }?;
    let byte = page.cast::<u8>();
    // SAFETY: the mapping is `len` bytes long and exists until it is unmapped here; the disk does not
    // shrink. Nobody else has the address.
    unsafe {
        byte.write_volatile(byte.read_volatile().wrapping_add(1));
        munmap(page, len)?;
    }
    Ok(())
}

/// dd works for some milliseconds and is killed, whatever it does then.
fn die(words: [&str; 3], random: &mut Random) -> Result<()> {
    let mut dd: Child = process::spawn_bound(
        Command::new("dd")
            .args(words)
            .arg("bs=256k")
            .stderr(Stdio::null()),
    )?;
    thread::sleep(Duration::from_millis(random.below(20)));
    // It may be at the end of the disk already.
    let _is_killed = dd.kill();
    let ended = process::wait_limited(&mut dd, Duration::from_secs(60))?;
    ensure!(ended.is_some(), "a client that was killed does not end");
    Ok(())
}

fn come_and_go(device: &Path, clients: u64, random: &mut Random) -> Result<()> {
    for client in 0..clients {
        let place = usize::try_from(client % USES.len() as u64)?;
        let how = USES[place];
        how.run(device, random)
            .with_context(|| format!("client {client}, {how:?}"))?;
    }
    Ok(())
}

fn leave_nothing(cx: &Context, clients: u64) -> Result<()> {
    let storage = cx.file(DISK_BYTES)?;
    let server = cx.serve().ublk("yes").arg(storage).start()?;
    let device = server.block_device()?;
    let threads = Holdings::of(server.pid())?.threads;
    let mut random = Random(clients);
    // The first ones make what stays.
    come_and_go(&device, 30, &mut random)?;
    let before = Holdings::at_rest(server.pid(), threads, cx.patience(20))?;
    come_and_go(&device, clients, &mut random)?;
    let after = Holdings::at_rest(server.pid(), threads, cx.patience(20))?;
    println!("{clients} clients: {before:?}, then {after:?}");
    after.are_no_more_than(&before)?;
    server.stop().map(drop)
}

/// The disk grows, the file system on it with it, a server dies, and the next one knows the new size.
fn a_mounted_file_system_grows_with_its_disk_and_outlives_the_server(cx: &Context) -> Result<()> {
    let image = cx.scratch().join("disk.img");
    let known = images::ext4_with_known_files(&image, 32 * MIB, 1)?;
    let serve = || {
        cx.serve()
            .ublk("yes")
            .name("disk")
            .arg(format!("file:{}", image.display()))
            .start()
    };
    let server = serve()?;
    let device = server.block_device()?;
    let mounted = images::mount_ext4(&device, &cx.scratch().join("mnt"), false)?;
    cx.ublkup(&["resize", "disk", "96M"]).run()?;
    ensure!(Sysfs::of(&device)?.size_bytes()? == 96 * MIB);
    sh(&format!("resize2fs {}", device.display())).run()?;
    // More than there was room for.
    let big = mounted.dir().join("big");
    fs::write(&big, Random(2).bytes(48 << 20))?;
    let new = KnownFiles::generate(mounted.dir(), 3)?;
    server.kill()?;
    let server = serve()?;
    ensure!(server.block_device()? == device, "another device");
    ensure!(Sysfs::of(&device)?.size_bytes()? == 96 * MIB);
    known.and(new).verify(mounted.dir())?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    ensure!(
        fs::read(&big)? == Random(2).bytes(48 << 20),
        "the big file is damaged"
    );
    mounted.unmount()?;
    images::fsck(&device)?;
    server.stop().map(drop)
}
