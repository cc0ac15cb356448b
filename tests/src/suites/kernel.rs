//! What every kernel of the lab must be able to do.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::kit::fio::Fio;
use crate::test;
use crate::test::{Context, Test};

/// For every guest.
pub const TESTS: &[Test] = &[
    test!(the_kernel_has_ublk_control),
    test!(io_uring_works),
    test!(the_root_file_system_is_read_only),
    test!(the_exchange_directory_takes_files),
];

/// For guests with more than one processor.
pub const SMP_TESTS: &[Test] = &[test!(there_are_four_processors)];

fn the_kernel_has_ublk_control(_cx: &Context) -> Result<()> {
    let node = Path::new("/dev/ublk-control");
    let kind = fs::metadata(node)
        .with_context(|| format!("cannot look at {}", node.display()))?
        .file_type();
    ensure!(
        kind.is_char_device(),
        "{} is no character device",
        node.display()
    );
    Ok(())
}

fn io_uring_works(cx: &Context) -> Result<()> {
    let file = cx.scratch().join("file");
    let report = Fio::new(&file)
        .option("rw", "randrw")
        .option("direct", 0)
        .depth(8)
        .size("4m")
        .verify()
        .limit(cx.patience(30))
        .run()?;
    ensure!(report.writes() > 0, "no write was made: {report:?}");
    ensure!(
        report.reads() >= report.writes(),
        "fewer blocks were verified than written: {report:?}"
    );
    Ok(())
}

fn the_root_file_system_is_read_only(_cx: &Context) -> Result<()> {
    let error = fs::File::create("/lab-must-not-write-here")
        .and_then(|mut file| file.write_all(b"x"))
        .expect_err("the host's file system must not be written to");
    ensure!(error.kind() == std::io::ErrorKind::ReadOnlyFilesystem);
    Ok(())
}

fn the_exchange_directory_takes_files(cx: &Context) -> Result<()> {
    let file = cx.exchange().join("written-in-the-guest");
    fs::write(&file, b"guest").with_context(|| format!("cannot write {}", file.display()))?;
    let back = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    ensure!(back == b"guest", "read back {back:?}");
    Ok(())
}

fn there_are_four_processors(_cx: &Context) -> Result<()> {
    let count = std::thread::available_parallelism().context("cannot count processors")?;
    ensure!(count.get() == 4, "{count} processors instead of 4");
    Ok(())
}
