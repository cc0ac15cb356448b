//! Programs of others that the ublk door is measured against, where they can be had.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::kernel::build::{self, Product};
use crate::packages::crates::RUBLK;

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
    RUBLK.program()
}
