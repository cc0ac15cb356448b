//! The lab's cache: outside the checkout, safe to delete, safe to share between
//! concurrent runs.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

/// The cache directory, created if needed: `$UBLKUP_LAB_CACHE`, or `ublkup-lab`
/// in `$XDG_CACHE_HOME` or `~/.cache`.
pub fn dir() -> Result<PathBuf> {
    let from = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let dir = match from("UBLKUP_LAB_CACHE") {
        Some(dir) => dir,
        None => from("XDG_CACHE_HOME")
            .or_else(|| from("HOME").map(|home| home.join(".cache")))
            .context("no cache directory: set UBLKUP_LAB_CACHE or HOME")?
            .join("ublkup-lab"),
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    dir.canonicalize()
        .with_context(|| format!("cannot use {}", dir.display()))
}

/// The right to change one part of the cache; released when dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Takes a lock by name, waiting for another run that holds it.
pub fn lock(name: &str) -> Result<Lock> {
    let path = dir()?.join(format!("{name}.lock"));
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("lab: waiting for another run that holds {}", path.display());
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}
