//! liburing with its headers, unpacked in the cache: the kernel's ublk test server needs a newer one
//! than the oldest supported Debian has. Nothing on the system changes.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::apt::{Apt, Release};
use crate::cache;
use crate::kit::shell::Shell;

/// Suites whose liburing is new enough, oldest first.
const SUITES: [&str; 3] = ["trixie", "forky", "sid"];

/// A directory with `usr/include/liburing.h`, and `liburing.a` below `usr/lib`.
///
/// # Errors
/// This is not Debian, or no suite has it.
pub fn unpacked() -> Result<PathBuf> {
    let home = cache::dir()?.join("liburing");
    if home.exists() {
        return Ok(home);
    }
    let release = Release::of_this_system().context("not Debian: no newer liburing to be had")?;
    let _one_at_a_time = cache::lock("liburing")?;
    for suite in SUITES {
        let extra: &[&str] = if suite == release.codename {
            &[]
        } else {
            &[suite]
        };
        let Ok(apt) = Apt::prepare(&release, &format!("liburing-{suite}"), extra) else {
            continue;
        };
        let versions = apt.versions("liburing-dev")?;
        let Some((name, version)) = versions.iter().find(|(name, _)| name == "liburing-dev") else {
            continue;
        };
        let work = tempfile::tempdir_in(cache::dir()?).context("cannot make a directory")?;
        let package = apt.download(name, version, work.path())?;
        let tree = work.path().join("tree");
        fs::create_dir(&tree).context("cannot make a directory")?;
        Shell::new("dpkg-deb")
            .arg("-x")
            .arg(&package)
            .arg(&tree)
            .run()?;
        fs::rename(&tree, &home).with_context(|| format!("cannot create {}", home.display()))?;
        return Ok(home);
    }
    bail!("no suite of {} has liburing-dev", SUITES.join(", "))
}
