//! Programs of others that the block door is measured against, where they can be had.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cache;
use crate::kernel::build::{self, Product};
use crate::progress;

/// The release that is measured; a newer one is another comparison.
const RUBLK_VERSION: &str = "0.2.15";

/// The kernel's own ublk server, of the same source as the kernel.
///
/// # Errors
/// It cannot be built.
pub fn kublk(repo: &Path, yes: bool) -> Result<PathBuf> {
    let made = build::ensure(repo, &[Product::Kublk], yes)?;
    made.into_iter().next().context("nothing was built")
}

/// rublk, of crates.io.
///
/// # Errors
/// It cannot be built.
pub fn rublk() -> Result<PathBuf> {
    let cache = cache::dir()?;
    let root = cache.join(format!("rublk-{RUBLK_VERSION}"));
    let program = root.join("bin/rublk");
    if program.exists() {
        return Ok(program);
    }
    let _one_at_a_time = cache::lock("rublk")?;
    let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    install
        .args(["install", "--locked", "--version", RUBLK_VERSION])
        .arg("--root")
        .arg(&root)
        .arg("--target-dir")
        .arg(root.join("target"))
        .arg("rublk")
        // Settings of an outer cargo are not meant for this one.
        .env_remove("CARGO_MANIFEST_DIR");
    let log = cache.join("rublk.log");
    progress::run("building rublk", install, &log, Duration::from_secs(3600))?;
    std::fs::remove_dir_all(root.join("target")).context("cannot remove rublk's objects")?;
    ensure!(program.exists(), "cargo built no {}", program.display());
    Ok(program)
}
