//! Fresh Debian systems, each in a folder.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::server::Server;
use testkit::shell::{Finished, Shell};

use crate::cache;
use crate::packages::apt::Apt;
use crate::test::Context;

/// What a system is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To be entered by chroot(2).
    Minimal,
    /// To be booted, with systemd.
    Bootable,
}

/// A Debian system in a folder, as it is before the package comes.
pub(super) struct Tree(PathBuf);

impl Tree {
    /// A file in it.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    /// Unpacks a release that the cache has, or gets, as an archive.
    pub(super) fn new(cx: &Context, suite: &str, kind: Kind) -> Result<Self> {
        let (suffix, packages) = match kind {
            Kind::Minimal => ("", "apt"),
            Kind::Bootable => ("-boots", "systemd-sysv,udev,kmod,dbus,e2fsprogs"),
        };
        let archive = cache::dir()?.join(format!("debian-{suite}{suffix}.tar"));
        let _one_at_a_time = cache::lock("debian")?;
        if !archive.exists() {
            let apt = Apt::prepare(&format!("tree-{suite}"), &[suite])?;
            let new = archive.with_extension("new.tar");
            Shell::new("mmdebstrap")
                .args(["--variant=minbase", "--quiet"])
                .arg(format!("--include={packages}"))
                .args([suite.as_ref(), new.as_os_str()])
                .arg(apt.sources_of(suite)?)
                .limit(Duration::from_secs(900))
                .run()?;
            fs::rename(&new, &archive).context("cannot keep the archive")?;
        }
        let tree = Tree(cx.scratch().join("d"));
        fs::create_dir(&tree.0)?;
        Shell::new("tar")
            .args(["--numeric-owner", "-xpf"])
            .arg(&archive)
            .arg("-C")
            .arg(&tree.0)
            .limit(Duration::from_secs(300))
            .run()?;
        Ok(tree)
    }

    /// A command in it, with what a system has in /proc.
    fn words(&self, command: &[&str]) -> Vec<String> {
        let enter = "mount -t proc proc \"$1/proc\" && exec chroot \"$@\"";
        let root = self.0.display().to_string();
        let outside = ["unshare", "--mount", "sh", "-c", enter, "sh", &root];
        let words = outside.iter().chain(command);
        words.map(|word| (*word).to_owned()).collect()
    }

    pub(super) fn finish(&self, command: &[&str]) -> Result<Finished> {
        let words = self.words(command);
        Shell::new(&words[0])
            .args(&words[1..])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C")
            .limit(Duration::from_secs(300))
            .finish()
    }

    pub(super) fn run(&self, command: &[&str]) -> Result<String> {
        let finished = self.finish(command)?;
        let Finished {
            status,
            stdout,
            stderr,
        } = finished;
        ensure!(status.success(), "{command:?}: {stdout}{stderr}");
        Ok(stdout)
    }

    pub(super) fn serve(&self, words: &[&str]) -> Result<Server> {
        let words = self.words(&[&["ublkup", "serve", "--ublk", "no"], words].concat());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        Server::launch(&mut command, Duration::from_secs(60))?.ready()
    }

    pub(super) fn install(&self, package: &Path) -> Result<()> {
        fs::copy(package, self.0.join("tmp/ublkup.deb"))?;
        self.run(&["apt-get", "install", "-y", "/tmp/ublkup.deb"])?;
        Ok(())
    }

    /// All files but those in which the package manager writes what it did.
    pub(super) fn files(&self) -> Result<BTreeSet<String>> {
        let found = Shell::new("find")
            .arg(&self.0)
            .args(["-xdev", "-printf", "%P\n"])
            .run()?;
        let of_apt = [
            "var/lib/dpkg",
            "var/lib/apt",
            "var/log",
            "var/cache",
            "tmp",
            "etc/ld.so.cache",
        ];
        let is_other = |path: &&str| !of_apt.iter().any(|of_apt| path.starts_with(of_apt));
        Ok(found.lines().filter(is_other).map(str::to_owned).collect())
    }
}
