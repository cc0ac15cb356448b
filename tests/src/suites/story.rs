//! The story: one image, served through the ublk door to one Linux and through the vhost door to
//! another, and both find the same files.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use testkit::images::{self, KnownFiles};

use super::guest::{FilesInImage, FilesOnDisk};
use crate::kernel::Kernel;
use crate::machine::{Board, Machine, Qemu, Uml};
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] =
    &[test!(a_block_device_and_a_guest_find_the_same_files_in_both_directions).limit_s(900)];

const IMAGE_BYTES: u64 = 96 << 20;

/// Tells the story to `say` while it happens.
fn tell(cx: &Context, say: &dyn Fn(&str)) -> Result<()> {
    let name = "disk.ext4";
    let image = cx.exchange().join(name);
    let known = images::ext4_with_known_files(&image, IMAGE_BYTES, 1)?;
    say(&format!(
        "made an ext4 image of 96 MiB with {} known files",
        known.len()
    ));

    let mut linux = boot_uml(cx, "story-block")?;
    say(&format!(
        "booted User Mode Linux {} with ublk",
        linux.kernel()
    ));
    let on_block = |known: KnownFiles, seed| FilesInImage {
        image: name.to_owned(),
        known,
        seed,
    };
    // The image has to be seen by the guest: its exchange directory is another.
    std::fs::rename(&image, linux.exchange().join(name)).context("cannot hand the image over")?;
    let first: KnownFiles = linux.run_step(
        &cx.paths,
        "serve_and_add_files",
        &on_block(known.clone(), 2),
    )?;
    say(&format!(
        "ublk door: mounted /dev/ublkb0, found them all, added {} files, file system clean",
        first.len()
    ));
    std::fs::rename(linux.exchange().join(name), &image).context("cannot take the image back")?;
    linux.power_off();

    let both = known.and(first);
    let second = in_guest(cx, Board::Q35, &image, both.clone(), 3)?;
    say(&format!(
        "vhost door: a stock QEMU guest (q35) mounted its /dev/vda, found all {}, added {}",
        both.len(),
        second.len()
    ));
    let all = both.and(second);
    let third = in_guest(cx, Board::Microvm, &image, all.clone(), 4)?;
    say(&format!(
        "vhost door: a microvm found all {}, added {}",
        all.len(),
        third.len()
    ));

    let all = all.and(third);
    let mut linux = boot_uml(cx, "story-back")?;
    std::fs::rename(&image, linux.exchange().join(name)).context("cannot hand the image over")?;
    let () = linux.run_step(
        &cx.paths,
        "serve_and_check_files",
        &on_block(all.clone(), 0),
    )?;
    say(&format!(
        "ublk door again: all {} files are there, file system clean",
        all.len()
    ));
    linux.power_off();
    Ok(())
}

fn a_block_device_and_a_guest_find_the_same_files_in_both_directions(cx: &Context) -> Result<()> {
    tell(cx, &|line| println!("{line}"))
}

fn boot_uml(cx: &Context, log: &str) -> Result<Machine> {
    let kernel = cx.paths.kernel(Kernel::Uml)?;
    Machine::boot(&Uml::new(kernel), &cx.paths, log)
}

fn boot_guest(cx: &Context, board: Board, socket: &Path) -> Result<Machine> {
    let kernel = cx.paths.kernel(Kernel::X86)?;
    let guest = Qemu::client(kernel, socket).board(board);
    Machine::boot(&guest, &cx.paths, &format!("story-{board:?}"))
}

fn serve(cx: &Context, spec: &str, socket: &Path) -> Result<testkit::server::Server> {
    cx.serve()
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .ublk("no")
        .name("disk")
        .vhost_socket(socket)
        .arg(spec)
        .start()
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
    let server = serve(cx, &format!("file:{}", image.display()), &socket)?;
    let mut guest = boot_guest(cx, board, &socket)?;
    let files = FilesOnDisk {
        device: PathBuf::from("/dev/vda"),
        known,
        seed,
    };
    let new: KnownFiles = guest.run_step(&cx.paths, "add_files_to_disk", &files)?;
    guest.power_off();
    server.stop()?;
    Ok(new)
}
