//! Packages that are unpacked in the cache, of this Debian release or of newer ones. Nothing on the system changes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use testkit::shell::Shell;

use super::apt::Apt;
use crate::cache;

/// herd7, which says what the kernel's memory model allows, with the C library it was built for.
pub const HERD7: Unpacked = Unpacked {
    name: "herd7",
    suites: &["forky", "sid"],
    packages: &["herdtools7", "libc6", "libgmp10"],
    // Some 25 of 250 megabytes.
    kept: &[
        "usr/bin/herd7",
        "usr/share/herdtools7",
        "usr/lib/x86_64-linux-gnu",
        "usr/lib64",
    ],
};

/// liburing with its headers: the kernel's ublk test server needs a newer one than the oldest
/// supported Debian has.
pub const LIBURING: Unpacked = Unpacked {
    name: "liburing",
    suites: &["trixie", "forky", "sid"],
    packages: &["liburing-dev"],
    kept: &["usr"],
};

/// libvirt's daemon as this release has it, with what it needs beyond what is installed.
pub const LIBVIRT: Unpacked = Unpacked {
    name: "libvirt",
    suites: &[],
    packages: &["libvirt-daemon-system", "libvirt-daemon-driver-qemu"],
    kept: &["etc", "usr", "var"],
};

/// Daemons and programs of Ceph as this release has them, and the headers of its libraries.
pub const CEPH: Unpacked = Unpacked {
    name: "ceph",
    suites: &[],
    packages: &["ceph-mon", "ceph-osd", "ceph-common", "librbd-dev"],
    kept: &["usr"],
};

/// A directory in the cache with files of packages.
#[derive(Debug)]
pub struct Unpacked {
    name: &'static str,
    /// Suites whose packages are new enough, oldest first. All packages come from one suite. Without any, they come
    /// from this release, with what they depend on.
    suites: &'static [&'static str],
    packages: &'static [&'static str],
    kept: &'static [&'static str],
}

impl Unpacked {
    /// The directory, filled if need be.
    pub fn dir(&self) -> Result<PathBuf> {
        let home = cache::dir()?.join(self.name);
        let _one_at_a_time = cache::lock(self.name)?;
        if home.exists() {
            return Ok(home);
        }
        if self.suites.is_empty() {
            self.unpack(&home, |work| {
                let apt = Apt::prepare(self.name, &[])?;
                apt.download_missing(self.packages, work)
            })
            .with_context(|| format!("cannot get {}", self.name))?;
            return Ok(home);
        }
        let mut failed = Vec::new();
        for suite in self.suites {
            let unpacked = self.unpack(&home, |work| {
                let apt = Apt::prepare(&format!("{}-{suite}", self.name), &[suite])?;
                let packages = self.packages.iter();
                packages
                    .map(|package| apt.download(&format!("{package}/{suite}"), work))
                    .collect()
            });
            match unpacked {
                Ok(()) => return Ok(home),
                Err(error) => failed.push(format!("{suite}: {error:#}")),
            }
        }
        bail!("cannot get {}: {}", self.name, failed.join("; "))
    }

    /// Unpacks the package files that `download` puts into a directory.
    fn unpack(
        &self,
        home: &Path,
        download: impl FnOnce(&Path) -> Result<Vec<PathBuf>>,
    ) -> Result<()> {
        let work = tempfile::tempdir_in(cache::dir()?).context("cannot make a directory")?;
        let (all, kept) = (work.path().join("all"), work.path().join("kept"));
        for file in download(work.path())? {
            Shell::new("dpkg-deb").arg("-x").args([&file, &all]).run()?;
        }
        // In packages of older releases, directories that are links to those in usr on a system.
        for old in ["bin", "lib", "lib64", "sbin"].map(|name| all.join(name)) {
            if old.is_dir() {
                let merge = "mkdir -p \"$2\" && cp -a \"$1/.\" \"$2/\" && rm -r \"$1\"";
                let merged = all.join("usr").join(old.file_name().unwrap_or_default());
                Shell::new("sh")
                    .args(["-c", merge, "sh"])
                    .args([&old, &merged])
                    .run()?;
            }
        }
        for part in self.kept {
            let to = kept.join(part);
            fs::create_dir_all(to.parent().context("a part without a parent")?)?;
            fs::rename(all.join(part), &to)
                .with_context(|| format!("the packages have no {part}"))?;
        }
        fs::rename(&kept, home).with_context(|| format!("cannot create {}", home.display()))
    }
}
