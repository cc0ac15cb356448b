//! The story: one image, served through the ublk door to one Linux and through the vhost door to
//! another, and both find the same files.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use testkit::images::{self, KnownFiles};

use super::guest::FilesOnDisk;
use crate::kernel::Kernel;
use crate::machine::{Board, Machine, Qemu, Uml};
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] =
    &[test!(a_block_device_and_a_guest_find_the_same_files_in_both_directions).limit_s(900)];

const IMAGE_BYTES: u64 = 96 << 20;

fn a_block_device_and_a_guest_find_the_same_files_in_both_directions(cx: &Context) -> Result<()> {
    let name = "disk.ext4";
    let image = cx.exchange().join(name);
    let known = images::ext4_with_known_files(&image, IMAGE_BYTES, 1)?;
    println!(
        "made an ext4 image of 96 MiB with {} known files",
        known.len()
    );

    let mut linux = boot_uml(cx, "story-block")?;
    println!("booted User Mode Linux {} with ublk", linux.kernel());
    let on_block = |known: KnownFiles, seed| FilesOnDisk {
        device: name.into(),
        known,
        seed,
    };
    // The image has to be seen by the guest: its exchange directory is another.
    std::fs::rename(&image, linux.exchange().join(name)).context("cannot hand the image over")?;
    let first: KnownFiles = linux.run_step("serve_and_add_files", &on_block(known.clone(), 2))?;
    println!(
        "ublk door: mounted /dev/ublkb0, found them all, added {} files, file system clean",
        first.len()
    );
    std::fs::rename(linux.exchange().join(name), &image).context("cannot take the image back")?;
    linux.power_off();

    let both = known.and(first);
    let second = in_guest(cx, Board::Q35, &image, both.clone(), 3)?;
    println!(
        "vhost door: a stock QEMU guest (q35) mounted its /dev/vda, found all {}, added {}",
        both.len(),
        second.len()
    );
    let all = both.and(second);
    let third = in_guest(cx, Board::Microvm, &image, all.clone(), 4)?;
    println!(
        "vhost door: a microvm found all {}, added {}",
        all.len(),
        third.len()
    );

    let all = all.and(third);
    let mut linux = boot_uml(cx, "story-back")?;
    std::fs::rename(&image, linux.exchange().join(name)).context("cannot hand the image over")?;
    let () = linux.run_step("serve_and_check_files", &on_block(all.clone(), 0))?;
    println!(
        "ublk door again: all {} files are there, file system clean",
        all.len()
    );
    linux.power_off();
    Ok(())
}

fn boot_uml(cx: &Context, log: &str) -> Result<Machine> {
    let kernel = cx.paths.kernel(Kernel::Uml)?;
    Machine::boot(&Uml::new(kernel), &cx.paths, log)
}

/// A guest mounts the image through the vhost door, compares, adds files; the new ones.
fn in_guest(
    cx: &Context,
    board: Board,
    image: &Path,
    known: KnownFiles,
    seed: u64,
) -> Result<KnownFiles> {
    let socket = cx.scratch().join("story.sock");
    let serve = cx.serve().ublk("no").name("disk").vhost_socket(&socket);
    let server = serve.arg(format!("file:{}", image.display())).start()?;
    let guest = Qemu::client(cx.paths.kernel(Kernel::X86)?, &socket).board(board);
    let mut guest = Machine::boot(&guest, &cx.paths, &format!("story-{board:?}"))?;
    let files = FilesOnDisk {
        device: PathBuf::from("/dev/vda"),
        known,
        seed,
    };
    let new: KnownFiles = guest.run_step("add_files_to_disk", &files)?;
    guest.power_off();
    server.stop()?;
    Ok(new)
}
