//! herd7, which says what the kernel's memory model allows, unpacked in the cache with the C library
//! it was built for: only newer Debians have it. Nothing on the system changes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::apt::{Apt, Release};
use crate::cache;
use crate::kit::shell::Shell;

/// Suites that have it, oldest first. The libraries are of the same suite.
const SUITES: [&str; 2] = ["forky", "sid"];

/// What it takes to run it: the program, and the libraries it is linked with.
const PACKAGES: [&str; 3] = ["herdtools7", "libc6", "libgmp10"];

/// What is kept of the packages, some 25 of 250 megabytes.
const KEPT: [&str; 4] = [
    "usr/bin/herd7",
    "usr/share/herdtools7",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib64",
];

/// The directory where it is unpacked, see [`command`].
///
/// # Errors
/// This is not Debian, or no suite has it.
pub fn unpacked() -> Result<PathBuf> {
    let home = cache::dir()?.join("herd7");
    if home.exists() {
        return Ok(home);
    }
    let release = Release::of_this_system().context("not Debian: no herd7 to be had")?;
    let _one_at_a_time = cache::lock("herd7")?;
    if home.exists() {
        return Ok(home);
    }
    for suite in SUITES {
        let extra: &[&str] = if suite == release.codename {
            &[]
        } else {
            &[suite]
        };
        let Ok(apt) = Apt::prepare(&release, &format!("herd7-{suite}"), extra) else {
            continue;
        };
        let work = tempfile::tempdir_in(cache::dir()?).context("cannot make a directory")?;
        let all = work.path().join("all");
        if !unpack(&apt, work.path(), &all)? {
            continue;
        }
        let kept = work.path().join("kept");
        for part in KEPT {
            let to = kept.join(part);
            fs::create_dir_all(to.parent().context("a part without a parent")?)
                .context("cannot make a directory")?;
            fs::rename(all.join(part), &to)
                .with_context(|| format!("the packages have no {part}"))?;
        }
        fs::rename(&kept, &home).with_context(|| format!("cannot create {}", home.display()))?;
        return Ok(home);
    }
    bail!("no suite of {} has herdtools7", SUITES.join(", "))
}

/// Whether all packages were there.
fn unpack(apt: &Apt, work: &Path, into: &Path) -> Result<bool> {
    for name in PACKAGES {
        let Some(version) = apt.version(name)? else {
            return Ok(false);
        };
        let package = apt.download(name, &version, work)?;
        Shell::new("dpkg-deb")
            .arg("-x")
            .arg(&package)
            .arg(into)
            .run()?;
    }
    Ok(true)
}

/// herd7 with its own loader and libraries, `home` being [`unpacked`].
#[must_use]
pub fn command(home: &Path) -> Shell {
    Shell::new(home.join("usr/lib64/ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(home.join("usr/lib/x86_64-linux-gnu"))
        .arg(home.join("usr/bin/herd7"))
        .arg("-set-libdir")
        .arg(home.join("usr/share/herdtools7/herd"))
}
