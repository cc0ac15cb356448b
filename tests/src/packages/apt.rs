//! apt with sources and lists of the lab's own.
//!
//! Nothing in `/etc` is changed: the lab gives apt a directory of its own with
//! the distribution's sources as configured, the extra suites derived from
//! them, and pins, so that a later `apt upgrade` of the system sees none of it.
//! Downloading needs no root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::sources;
use crate::cache;
use crate::kit::shell::Shell;
use crate::progress;

/// A Debian release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// Its code name.
    pub codename: String,
}

impl Release {
    /// The release this system is, if it is Debian with apt.
    #[must_use]
    pub fn of_this_system() -> Option<Self> {
        super::find_program("apt-get")?;
        Self::parse(&fs::read_to_string("/etc/os-release").ok()?)
    }

    fn parse(os_release: &str) -> Option<Self> {
        let get = |name: &str| {
            os_release
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(|value| value.trim_matches('"').to_owned())
        };
        (get("ID")? == "debian").then_some(())?;
        Some(Release {
            codename: get("VERSION_CODENAME")?,
        })
    }
}

/// apt with a directory of its own.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Prepares apt for the release and these extra suites, and fetches their
    /// lists.
    ///
    /// # Errors
    /// The system's sources cannot be read or do not answer.
    pub fn prepare(release: &Release, name: &str, extra_suites: &[&str]) -> Result<Self> {
        let dir = cache::dir()?.join("apt").join(name);
        for part in ["etc/parts", "lists/partial", "archives/partial"] {
            let part = dir.join(part);
            fs::create_dir_all(&part)
                .with_context(|| format!("cannot create {}", part.display()))?;
        }
        let all = sources::configured(Path::new("/etc/apt"))?;
        let own = sources::of_release(&all, &release.codename)?;
        let mut stanzas: Vec<String> = own.iter().map(sources::Source::stanza).collect();
        for suite in extra_suites {
            stanzas.push(sources::derive(&own[0], &[suite]).stanza());
        }
        fs::write(dir.join("etc/parts/lab.sources"), stanzas.join("\n"))
            .context("cannot write a package source")?;
        fs::write(dir.join("etc/preferences"), pins(release, extra_suites))
            .context("cannot write package pins")?;
        let apt = Apt { dir };
        let mut update = apt.command("apt-get");
        update.args(["-q", "update"]);
        progress::run(
            "fetching package lists",
            update,
            &apt.dir.join("update.log"),
            Duration::from_secs(600),
        )?;
        Ok(apt)
    }

    /// An apt program with the lab's directories.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command.env("LC_ALL", "C");
        for option in self.options() {
            command.arg("-o").arg(option);
        }
        command
    }

    fn options(&self) -> Vec<String> {
        let at = |path: &str| self.dir.join(path).display().to_string();
        vec![
            "Dir::Etc::sourcelist=/dev/null".to_owned(),
            format!("Dir::Etc::sourceparts={}", at("etc/parts")),
            format!("Dir::Etc::preferences={}", at("etc/preferences")),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::Cache::archives={}", at("archives")),
            format!("Dir::Cache::pkgcache={}", at("pkgcache.bin")),
            format!("Dir::Cache::srcpkgcache={}", at("srcpkgcache.bin")),
            // The cache is in a home directory, where apt's own user may not look.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ]
    }

    /// Names and versions of packages whose name begins with `prefix`, newest
    /// version of each.
    ///
    /// # Errors
    /// apt failed.
    pub fn versions(&self, prefix: &str) -> Result<Vec<(String, String)>> {
        let names = self
            .shell("apt-cache")
            .args(["pkgnames", prefix])
            .run()
            .context("cannot list packages")?;
        let mut found = Vec::new();
        for name in names.lines() {
            let version = self.version(name)?;
            found.extend(version.map(|version| (name.to_owned(), version)));
        }
        Ok(found)
    }

    /// The newest version of a package, if there is one.
    ///
    /// # Errors
    /// apt failed.
    pub fn version(&self, name: &str) -> Result<Option<String>> {
        let text = self.shell("apt-cache").args(["madison", name]).run()?;
        Ok(text.lines().find_map(|line| {
            let mut columns = line.split('|').map(str::trim);
            let package = columns.next()?;
            let version = columns.next()?;
            (package == name && !columns.next()?.ends_with("Sources")).then(|| version.to_owned())
        }))
    }

    /// Downloads one package file into `into` and returns its path.
    ///
    /// # Errors
    /// There is no such package, or the download failed.
    pub fn download(&self, package: &str, version: &str, into: &Path) -> Result<PathBuf> {
        fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
        let scratch = tempfile::tempdir_in(into).context("cannot make a directory")?;
        let mut download = self.command("apt-get");
        download
            .arg("download")
            .arg(format!("{package}={version}"))
            .current_dir(scratch.path());
        progress::run(
            &format!("downloading {package} {version}"),
            download,
            &self.dir.join("download.log"),
            Duration::from_secs(1800),
        )?;
        for entry in fs::read_dir(scratch.path()).context("cannot list the download")? {
            let file = entry.context("cannot list the download")?.path();
            if file.extension().is_some_and(|ending| ending == "deb")
                && let Some(name) = file.file_name()
            {
                let kept = into.join(name);
                fs::rename(&file, &kept).context("cannot keep the download")?;
                return Ok(kept);
            }
        }
        bail!("apt downloaded nothing for {package} {version}")
    }

    fn shell(&self, program: &str) -> Shell {
        let mut shell = Shell::new(program).env("LC_ALL", "C");
        for option in self.options() {
            shell = shell.arg("-o").arg(option);
        }
        shell
    }
}

/// Extra suites must not replace anything; the release's own backports keep
/// their low priority and are asked for by name.
fn pins(release: &Release, extra_suites: &[&str]) -> String {
    let own_backports = format!("{}-backports", release.codename);
    extra_suites
        .iter()
        .filter(|suite| **suite != own_backports)
        .map(|suite| format!("Package: *\nPin: release n={suite}\nPin-Priority: 1\n"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Releases whose own QEMU is too old; theirs comes from their backports.
const QEMU_FROM_BACKPORTS: [&str; 1] = ["bookworm"];

/// Installs packages. Those of QEMU come from backports where the release's
/// own are too old.
///
/// # Errors
/// apt failed; the message has the end of what it said.
pub fn install(release: &Release, packages: &[&str]) -> Result<()> {
    let (qemu, plain): (Vec<&str>, Vec<&str>) =
        packages.iter().partition(|name| name.starts_with("qemu"));
    let from_backports = QEMU_FROM_BACKPORTS.contains(&release.codename.as_str());
    let backports = format!("{}-backports", release.codename);
    let extra: Vec<&str> = if from_backports && !qemu.is_empty() {
        vec![&backports]
    } else {
        Vec::new()
    };
    let apt = Apt::prepare(release, "install", &extra)?;
    for (names, target) in [(plain, None), (qemu, extra.first().copied())] {
        if names.is_empty() {
            continue;
        }
        let mut install = apt.command("apt-get");
        install.args(["-q", "-y", "--no-install-recommends", "install"]);
        if let Some(suite) = target {
            install.args(["-t", suite]);
        }
        install.args(&names);
        progress::run(
            &format!("installing {}", names.join(" ")),
            install,
            &apt.dir.join("install.log"),
            Duration::from_secs(1800),
        )?;
    }
    // The package files are of no more use.
    fs::remove_dir_all(apt.dir.join("archives")).context("cannot tidy up after apt")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_from_os_release() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        let release = Release::parse(debian).expect("it is Debian");
        assert_eq!(release.codename, "bookworm");
        assert!(Release::parse("ID=fedora\nVERSION_CODENAME=\"\"\n").is_none());
        assert!(Release::parse("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n").is_none());
    }

    #[test]
    fn foreign_suites_are_pinned_below_everything() {
        let release = Release {
            codename: "bookworm".into(),
        };
        let text = pins(&release, &["bookworm-backports", "trixie-backports"]);
        assert!(text.contains("Pin: release n=trixie-backports\nPin-Priority: 1"));
        assert!(!text.contains("bookworm"));
    }
}
