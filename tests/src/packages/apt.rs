//! apt with a configuration, sources and lists of its own, in the cache.
//!
//! The lab needs a few packages from suites that the system has not configured. Nothing in
//! `/etc/apt` is changed and no mirror is named: the addresses are those that apt uses on this
//! system, and pins keep the other suites from replacing anything. Downloading needs no root.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testkit::shell::{Shell, sh};

use crate::cache;
use crate::progress;

/// Where the package `debian-archive-keyring` has the keys of all suites.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// Releases whose own QEMU is too old; it comes from their backports.
const QEMU_FROM_BACKPORTS: [&str; 1] = ["bookworm"];

/// The code name of this system's release, if it is Debian with apt.
pub fn codename() -> Option<String> {
    let script = "command -v apt-get >/dev/null; . /etc/os-release; \
                  test \"$ID\" = debian; echo \"$VERSION_CODENAME\"";
    let name = sh(script).run().ok()?;
    Some(name.trim().to_owned())
}

/// apt with a directory of its own.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Fetches the lists of the system's release and of these suites beside it.
    pub fn prepare(name: &str, extra_suites: &[&str]) -> Result<Self> {
        let codename = codename().context("this is not Debian, so there is no apt to ask")?;
        let dir = cache::dir()?.join("apt").join(name);
        fs::create_dir_all(dir.join("lists/partial"))
            .and_then(|()| fs::create_dir_all(dir.join("archives/partial")))
            .with_context(|| format!("cannot create {}", dir.display()))?;
        let configured = Shell::new("apt-get")
            .args(["--print-uris", "-o", "Debug::NoLocking=1", "-o"])
            .arg(format!("Dir::State::lists={}", dir.join("lists").display()))
            .arg("update")
            .run()?;
        let apt = Apt { dir };
        apt.write(
            "sources.list",
            &sources(&configured, &codename, extra_suites)?,
        )?;
        apt.write("preferences", &pins(&codename, extra_suites))?;
        apt.write("apt.conf", &apt.configuration())?;
        let mut update = apt.command("apt-get");
        update.args(["-q", "update"]);
        apt.step("fetching package lists", update, 600)?;
        Ok(apt)
    }

    /// A file with the sources of one of the suites alone.
    pub fn sources_of(&self, suite: &str) -> Result<PathBuf> {
        let all = fs::read_to_string(self.dir.join("sources.list"))?;
        let own = |line: &&str| line.split(' ').any(|word| word == suite);
        let lines: Vec<&str> = all.lines().filter(own).collect();
        self.write(suite, &(lines.join("\n") + "\n"))?;
        Ok(self.dir.join(suite))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn configuration(&self) -> String {
        let at = self.dir.display();
        // The cache is in a home directory, which apt's own user may not enter.
        format!(
            "Dir::Etc::sourcelist \"{at}/sources.list\";\n\
             Dir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferences \"{at}/preferences\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\n\
             Dir::State::lists \"{at}/lists\";\n\
             Dir::Cache::archives \"{at}/archives\";\n\
             Dir::Cache::pkgcache \"{at}/pkgcache.bin\";\n\
             Dir::Cache::srcpkgcache \"{at}/srcpkgcache.bin\";\n\
             APT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::Retries \"3\";\n"
        )
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C");
        command
    }

    fn step(&self, what: &str, command: Command, limit_s: u64) -> Result<()> {
        let log = self.dir.join("apt.log");
        progress::run(what, command, &log, Duration::from_secs(limit_s))
    }

    /// Names and newest versions of the packages whose name begins with `prefix`.
    pub fn versions(&self, prefix: &str) -> Result<Vec<(String, String)>> {
        let script = format!("apt-cache pkgnames {prefix} | xargs -r apt-cache madison");
        let table = sh(&script)
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .run()?;
        Ok(newest_of_each(&table))
    }

    /// What a package depends on first: that of a kernel which is the newest, say.
    pub fn dependency_of(&self, package: &str) -> Result<String> {
        let told = Shell::new("apt-cache")
            .args(["depends", package])
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("LC_ALL", "C")
            .run()?;
        let mut lines = told.lines().map(str::trim);
        let name = lines.find_map(|line| line.strip_prefix("Depends: "));
        Ok(name
            .with_context(|| format!("{package} depends on nothing"))?
            .to_owned())
    }

    /// Downloads one package file into `into` and returns its path.
    pub fn download(&self, package: &str, into: &Path) -> Result<PathBuf> {
        fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
        let scratch = tempfile::tempdir_in(into).context("cannot make a directory")?;
        let mut download = self.command("apt-get");
        download
            .args(["download", package])
            .current_dir(scratch.path());
        self.step(&format!("downloading {package}"), download, 1800)?;
        let file = fs::read_dir(scratch.path())?.flatten().next();
        let file = file.with_context(|| format!("apt downloaded nothing for {package}"))?;
        let kept = into.join(file.file_name());
        fs::rename(file.path(), &kept).context("cannot keep the download")?;
        Ok(kept)
    }

    /// Downloads these packages and what they depend on into `into`, except what is installed, and returns the files.
    pub fn download_missing(&self, packages: &[&str], into: &Path) -> Result<Vec<PathBuf>> {
        let archives = into.join("archives");
        fs::create_dir_all(archives.join("partial"))
            .with_context(|| format!("cannot create {}", archives.display()))?;
        let mut download = self.command("apt-get");
        download
            .args(["-q", "-y", "--no-install-recommends", "--download-only"])
            .args(["-o", "Debug::NoLocking=1", "-o"])
            .arg(format!("Dir::Cache::archives={}", archives.display()))
            .arg("install")
            .args(packages);
        self.step(
            &format!("downloading {}", packages.join(" ")),
            download,
            1800,
        )?;
        let files = fs::read_dir(&archives)?.map(|file| Ok(file?.path()));
        files
            .filter(|file| {
                !file
                    .as_ref()
                    .is_ok_and(|path| path.extension() != Some("deb".as_ref()))
            })
            .collect()
    }
}

/// Installs packages. Those of QEMU come from backports where the release's own are too old.
pub fn install(packages: &[&str]) -> Result<()> {
    let codename = codename().context("this is not Debian")?;
    let backports = format!("{codename}-backports");
    let is_backported = |package: &&str| {
        package.starts_with("qemu") && QEMU_FROM_BACKPORTS.contains(&codename.as_str())
    };
    let (newer, plain): (Vec<&str>, Vec<&str>) =
        packages.iter().partition(|&one| is_backported(one));
    let extra: &[&str] = if newer.is_empty() { &[] } else { &[&backports] };
    let apt = Apt::prepare("install", extra)?;
    for (names, target) in [(plain, &[][..]), (newer, &["-t", &backports])] {
        if names.is_empty() {
            continue;
        }
        let mut install = apt.command("apt-get");
        install
            .args(["-q", "-y", "--no-install-recommends", "install"])
            .args(target)
            .args(&names);
        apt.step(&format!("installing {}", names.join(" ")), install, 1800)?;
    }
    // The package files are of no more use.
    fs::remove_dir_all(apt.dir.join("archives")).context("cannot tidy up after apt")
}

/// The sources of the release itself among what `apt-get --print-uris update` prints, and the extra
/// suites at the release's address. Sources of others are left out: the lab needs none of them.
fn sources(configured: &str, codename: &str, extra_suites: &[&str]) -> Result<String> {
    let key = KEYRINGS.into_iter().find(|file| Path::new(file).exists());
    let option = key.map_or_else(String::new, |file| format!("[signed-by={file}] "));
    let (mut list, mut address) = (String::new(), None);
    let mut add = |uri: &str, suite: &str| {
        writeln!(list, "deb {option}{uri} {suite} main").expect("writing to a String cannot fail");
    };
    for line in configured.lines() {
        let uri = line.trim_start_matches('\'').split("/InRelease'").next();
        let Some((uri, suite)) = uri.and_then(|uri| uri.rsplit_once("/dists/")) else {
            continue;
        };
        let is_own = suite
            .strip_prefix(codename)
            .is_some_and(|rest| ["", "-updates", "-security", "/updates"].contains(&rest));
        if is_own {
            add(uri, suite);
        }
        if suite == codename {
            address.get_or_insert_with(|| uri.to_owned());
        }
    }
    let Some(address) = address else {
        bail!("apt has no source of {codename}");
    };
    for suite in extra_suites.iter().filter(|suite| **suite != codename) {
        add(&address, suite);
    }
    Ok(list)
}

/// Extra suites must not replace anything. The release's own backports have a low priority anyway.
fn pins(codename: &str, extra_suites: &[&str]) -> String {
    extra_suites
        .iter()
        .filter(|suite| suite.strip_suffix("-backports").unwrap_or(suite) != codename)
        .map(|suite| format!("Package: *\nPin: release n={suite}\nPin-Priority: 1\n\n"))
        .collect()
}

/// The first line of each package in the output of `apt-cache madison`, which begins with the newest.
fn newest_of_each(table: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for line in table.lines().filter(|line| !line.ends_with("Sources")) {
        let mut columns = line.split('|').map(str::trim);
        if let (Some(name), Some(version)) = (columns.next(), columns.next())
            && found.last().is_none_or(|(known, _)| known != name)
        {
            found.push((name.to_owned(), version.to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIGURED: &str = "\
'http://mirror.example/debian/dists/bookworm/InRelease' x 0 
'http://mirror.example/debian/dists/bookworm/main/binary-amd64/Packages.xz' x 0 
'http://other.example/debian-security/dists/bookworm-security/InRelease' x 0 
'https://third.example/tool/dists/stable/InRelease' x 0 
";

    #[test]
    fn other_suites_have_the_address_of_the_release_and_third_parties_are_left_out() {
        let list = sources(CONFIGURED, "bookworm", &["sid"]).expect("it has the release");
        let plain: Vec<String> = list
            .lines()
            .map(|line| {
                line.split(' ')
                    .filter(|word| !word.starts_with('['))
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect();
        assert_eq!(
            plain,
            [
                "deb http://mirror.example/debian bookworm main",
                "deb http://other.example/debian-security bookworm-security main",
                "deb http://mirror.example/debian sid main",
            ]
        );
        assert!(sources(CONFIGURED, "trixie", &[]).is_err());
    }

    #[test]
    fn foreign_suites_are_pinned_below_everything() {
        let text = pins("bookworm", &["bookworm-backports", "trixie-backports"]);
        assert!(text.contains("Pin: release n=trixie-backports\nPin-Priority: 1"));
        assert!(!text.contains("bookworm"));
    }

    #[test]
    fn the_newest_binary_version_of_each_package_is_taken() {
        let table = "\
linux-source-7.3 | 7.3.4-1 | http://mirror.example/debian sid/main amd64 Packages
linux-source-7.3 | 7.3.1-1 | http://mirror.example/debian forky/main amd64 Packages
linux-source-7.2 | 7.2.9-1 | http://mirror.example/debian forky/main amd64 Packages
     linux | 7.3.4-1 | http://mirror.example/debian sid/main Sources
";
        let newest = newest_of_each(table);
        let expected = [
            ("linux-source-7.3", "7.3.4-1"),
            ("linux-source-7.2", "7.2.9-1"),
        ];
        assert_eq!(
            newest,
            expected.map(|(name, version)| (name.to_owned(), version.to_owned()))
        );
    }
}
