//! A vhost-user-blk server on the host, an emulated guest that uses its disk.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::images::{self, KnownFiles};
use testkit::wait::until;
use testkit::{proc, process};

use super::guest::{DiskFacts, FilesOnDisk};
use crate::kernel::Kernel;
use crate::machine::{Board, Hypervisor, Machine, Qemu, Uml};
use crate::packages::apt;
use crate::packages::guest_kernel::GuestKernel;
use crate::test::{Context, Test};
use crate::{skip, test};

/// On the host.
pub const TESTS: &[Test] = &[
    test!(a_q35_guest_finds_the_files_on_a_vhost_user_disk).limit_s(400),
    test!(a_guest_with_debians_kernel_finds_the_files_on_a_vhost_user_disk).limit_s(400),
    test!(a_microvm_guest_finds_the_files_on_a_vhost_user_disk).limit_s(400),
    test!(a_uml_guest_finds_the_files_on_a_vhost_user_disk).limit_s(200),
];

/// The same inside User Mode Linux, where a ublk device can be the other door.
pub const NESTED: &[Test] =
    &[test!(a_microvm_guest_finds_the_files_on_a_vhost_user_disk).limit_s(400)];

fn a_q35_guest_finds_the_files_on_a_vhost_user_disk(cx: &Context) -> Result<()> {
    guest_finds_files(cx, 4, |socket| {
        Ok(Qemu::client(cx.paths.kernel(Kernel::X86)?, socket).processors(4))
    })
}

/// As in the demo.
fn a_guest_with_debians_kernel_finds_the_files_on_a_vhost_user_disk(cx: &Context) -> Result<()> {
    if apt::codename().is_none() {
        skip!("the kernel comes from Debian's packages, and this is not Debian");
    }
    let kernel = match GuestKernel::get() {
        Ok(kernel) => kernel,
        Err(error) => skip!("{error:#}"),
    };
    guest_finds_files(cx, 1, |socket| {
        Ok(Qemu::client(&kernel.image, socket).initramfs(&kernel.initramfs))
    })
}

fn a_microvm_guest_finds_the_files_on_a_vhost_user_disk(cx: &Context) -> Result<()> {
    guest_finds_files(cx, 1, |socket| {
        Ok(Qemu::client(cx.paths.kernel(Kernel::X86)?, socket).board(Board::Microvm))
    })
}

fn a_uml_guest_finds_the_files_on_a_vhost_user_disk(cx: &Context) -> Result<()> {
    guest_finds_files(cx, 1, |socket| {
        let kernel = cx.paths.kernel(Kernel::Uml)?;
        Ok(Uml::new(kernel).vhost_disk(socket))
    })
}

/// The reference: QEMU's own storage daemon serves the disk. What holds with it
/// must hold with ours.
fn guest_finds_files<H: Hypervisor>(
    cx: &Context,
    queues: u32,
    guest: impl FnOnce(&Path) -> Result<H>,
) -> Result<()> {
    let size_bytes = 64 << 20;
    let image = cx.scratch().join("disk.ext4");
    let known = images::ext4_with_known_files(&image, size_bytes, 1)?;
    let socket = cx.scratch().join("disk.sock");
    let daemon = StorageDaemon::start(&image, &socket, queues)?;

    let hypervisor = guest(&socket)?;
    let log = format!("reference-{}", hypervisor.name());
    let mut machine = Machine::boot(&hypervisor, &cx.paths, &log)?;
    let disk: DiskFacts = machine.run_step("describe_disk", &"vda")?;
    ensure!(
        disk.size_bytes == size_bytes && !disk.read_only,
        "the guest sees another disk: {disk:?}"
    );
    let files = FilesOnDisk {
        device: PathBuf::from("/dev/vda"),
        known,
        seed: 2,
    };
    let new: KnownFiles = machine.run_step("add_files_to_disk", &files)?;
    let all = files.known.clone().and(new.clone());
    ensure!(
        all.len() == files.known.len() + new.len() && !new.is_empty(),
        "the guest wrote no new files"
    );
    let both = FilesOnDisk {
        known: all,
        ..files
    };
    let () = machine.run_step("check_files_on_disk", &both)?;
    machine.power_off();
    drop(daemon);

    // What the guest wrote is in the image.
    images::fsck(&image)
}

/// `qemu-storage-daemon` serving an image on a vhost-user-blk socket.
struct StorageDaemon {
    child: Child,
}

impl StorageDaemon {
    fn start(image: &Path, socket: &Path, queues: u32) -> Result<Self> {
        let mut child = process::spawn_bound(
            Command::new("qemu-storage-daemon")
                .arg("--blockdev")
                .arg(format!(
                    "driver=file,node-name=disk,filename={}",
                    image.display()
                ))
                .args(["--object", "iothread,id=io"])
                .arg("--export")
                .arg(format!(
                    "type=vhost-user-blk,id=door,node-name=disk,writable=on,iothread=io,\
                     num-queues={queues},addr.type=unix,addr.path={}",
                    socket.display()
                ))
                .stdin(Stdio::null()),
        )?;
        until(
            "qemu-storage-daemon listens",
            Duration::from_secs(20),
            || {
                let ended = child.try_wait().context("cannot look at the daemon")?;
                ensure!(ended.is_none(), "qemu-storage-daemon ended with {ended:?}");
                proc::is_listened_on(socket)
            },
        )?;
        Ok(StorageDaemon { child })
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        // It may have ended by itself when the guest left.
        let _gone = self.child.kill();
        let _stuck = process::wait_limited(&mut self.child, Duration::from_secs(5));
    }
}
