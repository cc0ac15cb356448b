//! Where Linux source comes from.
//!
//! In this order: `LINUX_SRC` (a source tree), `LINUX_TARBALL` (a packed one),
//! a Debian source package in the cache, a Debian source package from the
//! suites below: of the version the series was made for, or, when that is gone,
//! the newest one the series applies to. What was found once is kept, so that a
//! later run needs no network.

use std::cmp::Reverse;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::KernelPatch;
use crate::cache;
use crate::kit::shell::Shell;
use crate::packages::apt::{Apt, Release};
use crate::progress;

/// Suites that have (or had) a package `linux-source-VERSION`, beside the
/// release's own backports. Tried in this order: all of a step together.
const SUITES: [&[&str]; 2] = [&["trixie-backports"], &["forky", "sid"]];

/// How many versions other than the base are tried: each is a large download.
const MAX_CANDIDATES: usize = 3;

/// Linux source that can be unpacked.
#[derive(Clone, Debug)]
pub struct Source {
    /// Changes when the content may have changed.
    pub id: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Tree(PathBuf),
    Tarball(PathBuf),
    Package(PathBuf),
}

/// The source for the series, if it is on this machine.
///
/// # Errors
/// What is there cannot be read.
pub fn find_here(patch: &KernelPatch) -> Result<Option<Source>> {
    if let Some(dir) = variable("LINUX_SRC") {
        return Source::of_tree(&dir).map(Some);
    }
    if let Some(file) = variable("LINUX_TARBALL") {
        return tarball(&file).map(Some);
    }
    let store = cache::dir()?.join("sources");
    if let Some(deb) = newest_package(&store, &patch.base()?) {
        return Ok(Some(package(deb)));
    }
    let series = digest(&patch.series()?)?;
    Ok(accepted_package(&store, &series).map(package))
}

/// Finds source for the series, and downloads it if need be.
///
/// # Errors
/// There is none; the message says how to provide it.
pub fn find(patch: &KernelPatch) -> Result<Source> {
    if let Some(source) = find_here(patch)? {
        return Ok(source);
    }
    let base = patch.base()?;
    let store = cache::dir()?.join("sources");
    let series = digest(&patch.series()?)?;
    let Some(release) = Release::of_this_system() else {
        bail!(
            "no Linux source: this is not Debian; \
             set LINUX_SRC=DIRECTORY or LINUX_TARBALL=FILE to Linux {base}"
        );
    };
    let own_backports = format!("{}-backports", release.codename);
    let mut seen: Vec<(String, String, usize)> = Vec::new();
    let mut prepared = Vec::new();
    for (step, suites) in SUITES.iter().enumerate() {
        let mut suites = suites.to_vec();
        if step == 0 && !suites.contains(&own_backports.as_str()) {
            suites.push(&own_backports);
        }
        // A suite that does not exist yet, or any more, is no reason to stop.
        let apt = match Apt::prepare(&release, &format!("kernel-{step}"), &suites) {
            Ok(apt) => apt,
            Err(error) => {
                eprintln!("lab: {error:#}");
                continue;
            }
        };
        for (name, version) in apt.versions("linux-source-")? {
            if name == format!("linux-source-{base}") {
                return Ok(package(apt.download(&name, &version, &store)?));
            }
            if !seen.iter().any(|(known, _, _)| *known == name) {
                seen.push((name, version, step));
            }
        }
        prepared.push((step, apt));
    }
    seen.sort_by_key(|(name, _, _)| Reverse(number(name)));
    let mut refused = Vec::new();
    for (name, version, step) in &seen {
        let apt = prepared.iter().find(|(known, _)| known == step);
        let (Some((_, apt)), Some(_)) = (apt, number(name)) else {
            continue;
        };
        if refused.len() == MAX_CANDIDATES {
            break;
        }
        eprintln!("lab: there is no linux-source-{base} any more; trying {name}");
        let deb = apt.download(name, version, &store)?;
        match accept(&deb, &patch.series()?, &series) {
            Ok(()) => return Ok(package(deb)),
            Err(error) => {
                fs::remove_file(&deb)
                    .with_context(|| format!("cannot remove {}", deb.display()))?;
                refused.push(format!("{name}: {error:#}"));
            }
        }
    }
    bail!(
        "no Linux source: the series is for {base}, and what the package suites have does not \
         take it ({}); set LINUX_SRC=DIRECTORY or LINUX_TARBALL=FILE, or move the series to \
         another base",
        match refused.is_empty() {
            true => "they have none".to_owned(),
            false => refused.join("; "),
        }
    )
}

/// `(7, 4)` of `linux-source-7.4`; nothing for a package of another kind.
fn number(name: &str) -> Option<(u32, u32)> {
    let (major, minor) = name.strip_prefix("linux-source-")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Notes beside the package that this series applies to it.
///
/// # Errors
/// It does not, or it cannot be tried.
fn accept(deb: &Path, series: &[PathBuf], digest: &str) -> Result<()> {
    let parent = deb.parent().context("a package without a folder")?;
    let trial = tempfile::tempdir_in(parent).context("cannot make a directory")?;
    let into = trial.path().join("source");
    fs::create_dir(&into).context("cannot make a directory")?;
    package(deb.to_owned()).unpack(&into, series)?;
    fs::write(stamp(deb), digest).context("cannot keep a note beside the source package")
}

fn stamp(deb: &Path) -> PathBuf {
    deb.with_extension("deb.takes-series")
}

/// The newest downloaded package of another version that took this very series.
fn accepted_package(store: &Path, digest: &str) -> Option<PathBuf> {
    fs::read_dir(store)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| file_name(path).ends_with(".deb"))
        .filter(|path| fs::read_to_string(stamp(path)).is_ok_and(|noted| noted == digest))
        .max_by_key(|path| file_name(path).split('_').next().and_then(number))
}

/// A name for the content of a series.
fn digest(series: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for file in series {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        hash.update(text.len().to_le_bytes());
        hash.update(text);
    }
    let bytes = hash.finalize();
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn package(deb: PathBuf) -> Source {
    Source {
        id: file_name(&deb),
        kind: Kind::Package(deb),
    }
}

fn tarball(file: &Path) -> Result<Source> {
    let file = file
        .canonicalize()
        .with_context(|| format!("cannot find LINUX_TARBALL={}", file.display()))?;
    let facts = file.metadata().context("cannot look at the tarball")?;
    let changed = facts.modified().context("cannot look at the tarball")?;
    Ok(Source {
        id: format!("{} {} {changed:?}", file.display(), facts.len()),
        kind: Kind::Tarball(file),
    })
}

/// `VERSION.PATCHLEVEL.SUBLEVEL` of a source tree.
///
/// # Errors
/// It is no Linux source tree.
pub fn version_of(tree: &Path) -> Result<String> {
    let makefile = tree.join("Makefile");
    let text = fs::read_to_string(&makefile)
        .with_context(|| format!("{} is no Linux source tree", tree.display()))?;
    parse_version(&text)
        .with_context(|| format!("{} is not the Makefile of Linux", makefile.display()))
}

fn parse_version(makefile: &str) -> Option<String> {
    let get = |name: &str| {
        makefile.lines().find_map(|line| {
            let (known, value) = line.split_once('=')?;
            (known.trim() == name).then(|| value.trim().to_owned())
        })
    };
    Some(format!(
        "{}.{}.{}",
        get("VERSION")?,
        get("PATCHLEVEL")?,
        get("SUBLEVEL")?
    ))
}

/// The newest downloaded package of a version.
fn newest_package(store: &Path, base: &str) -> Option<PathBuf> {
    let prefix = format!("linux-source-{base}_");
    fs::read_dir(store)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| file_name(path).starts_with(&prefix) && file_name(path).ends_with(".deb"))
        .max_by_key(|path| path.metadata().and_then(|facts| facts.modified()).ok())
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(OsStr::new(""))
        .to_string_lossy()
        .into_owned()
}

impl Source {
    /// A source tree that is there already.
    ///
    /// # Errors
    /// It is none, or git cannot say what is in it.
    pub fn of_tree(dir: &Path) -> Result<Source> {
        let dir = dir
            .canonicalize()
            .with_context(|| format!("cannot find LINUX_SRC={}", dir.display()))?;
        let version = version_of(&dir)?;
        // In a git checkout, the commit and the changes; elsewhere, the version.
        let mut id = format!("{} {version}", dir.display());
        if dir.join(".git").exists() {
            for question in [["rev-parse", "HEAD"], ["diff", "HEAD"]] {
                id.push(' ');
                id.push_str(&Shell::new("git").arg("-C").arg(&dir).args(question).run()?);
            }
        }
        Ok(Source {
            id,
            kind: Kind::Tree(dir),
        })
    }

    /// Unpacks into `into`, which exists and is empty, and applies the patches.
    ///
    /// # Errors
    /// It cannot be unpacked, or a patch does not apply.
    pub fn unpack(&self, into: &Path, series: &[PathBuf]) -> Result<()> {
        self.unpack_plain(into)?;
        each_alone(into, series)?;
        for patch in series {
            let finished = Shell::new("patch")
                .args(["-p1", "--forward", "--batch", "--silent", "--fuzz=1"])
                .arg("-i")
                .arg(patch)
                .dir(into)
                .finish()?;
            if finished.code() != 0 {
                bail!(
                    "{} does not apply to {}:\n{}",
                    patch.display(),
                    self.id.lines().next().unwrap_or(""),
                    finished.tail()
                );
            }
        }
        Ok(())
    }

    /// Unpacks without patches.
    ///
    /// # Errors
    /// It cannot be unpacked.
    pub fn unpack_plain(&self, into: &Path) -> Result<()> {
        match &self.kind {
            Kind::Tree(dir) => {
                let mut copy = Command::new("sh");
                copy.args([
                    "-ec",
                    "tar -C \"$1\" --exclude=./.git -c . | tar -C \"$2\" -x",
                    "sh",
                ])
                .arg(dir)
                .arg(into);
                step("copying the kernel source", copy, into)?;
            }
            Kind::Tarball(file) => untar(file, into)?,
            Kind::Package(deb) => {
                let inside = into.join(".package");
                let mut unpack = Command::new("dpkg-deb");
                unpack.arg("-x").arg(deb).arg(&inside);
                step("unpacking the source package", unpack, into)?;
                let tarball = fs::read_dir(inside.join("usr/src"))
                    .context("the source package has no usr/src")?
                    .flatten()
                    .map(|entry| entry.path())
                    .find(|path| file_name(path).contains(".tar"))
                    .context("the source package has no tarball")?;
                untar(&tarball, into)?;
                fs::remove_dir_all(&inside).context("cannot tidy up after unpacking")?;
            }
        }
        version_of(into).map(|_| ())
    }
}

/// Checks that each series (the patches of one directory) applies to the plain `tree` also without
/// the others, and changes nothing.
///
/// # Errors
/// One does not.
fn each_alone(tree: &Path, patches: &[PathBuf]) -> Result<()> {
    // The first one is about to be applied to the plain tree anyway.
    for series in patches
        .chunk_by(|one, next| one.parent() == next.parent())
        .skip(1)
    {
        // As one patch: the second of a series is for what the first one makes.
        let mut all = String::new();
        for patch in series {
            all += &fs::read_to_string(patch)
                .with_context(|| format!("cannot read {}", patch.display()))?;
        }
        let whole = tempfile::NamedTempFile::new().context("cannot make a file")?;
        fs::write(whole.path(), all).context("cannot write a file")?;
        let finished = Shell::new("git")
            .args(["apply", "--check", "-C2"])
            .arg(whole.path())
            .dir(tree)
            // Or it would look at a repository around the tree.
            .env("GIT_CEILING_DIRECTORIES", tree)
            .finish()?;
        if finished.code() != 0 {
            let directory = series[0].parent().unwrap_or(Path::new(""));
            bail!(
                "{} does not apply without the other series:\n{}",
                directory.display(),
                finished.tail()
            );
        }
    }
    Ok(())
}

fn untar(file: &Path, into: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.arg("-C")
        .arg(into)
        .args(["--strip-components=1", "-xf"])
        .arg(file);
    step("unpacking the kernel source", tar, into)
}

fn step(what: &str, command: Command, beside: &Path) -> Result<()> {
    progress::run(
        what,
        command,
        &beside.with_extension("unpack.log"),
        Duration::from_secs(900),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_makefile() {
        let text = "# SPDX\nVERSION = 7\nPATCHLEVEL = 3\nSUBLEVEL = 4\nEXTRAVERSION =\n";
        assert_eq!(parse_version(text).as_deref(), Some("7.3.4"));
        assert_eq!(parse_version("all:\n\techo\n"), None);
    }

    #[test]
    fn only_a_package_of_the_right_base_is_used() {
        let store = tempfile::tempdir().expect("a temporary directory");
        for name in ["linux-source-7.30_1_all.deb", "linux-source-7.2_1_all.deb"] {
            fs::write(store.path().join(name), b"").expect("a file");
        }
        assert_eq!(newest_package(store.path(), "7.3"), None);
        let right = store.path().join("linux-source-7.3_7.3.4-1_all.deb");
        fs::write(&right, b"").expect("a file");
        assert_eq!(newest_package(store.path(), "7.3"), Some(right));
    }

    #[test]
    fn versions_are_ordered_by_number_and_other_packages_are_none() {
        assert!(number("linux-source-7.10") > number("linux-source-7.9"));
        assert!(number("linux-source-10.1") > number("linux-source-9.30"));
        for other in ["linux-source", "linux-source-7.4-rt", "linux-headers-7.4"] {
            assert_eq!(number(other), None, "{other}");
        }
    }

    #[test]
    fn another_version_is_kept_only_for_the_series_it_took() {
        let store = tempfile::tempdir().expect("a temporary directory");
        let deb = |name: &str| {
            let path = store.path().join(name);
            fs::write(&path, b"").expect("a file");
            path
        };
        let older = deb("linux-source-7.9_7.9.1-1_all.deb");
        let newer = deb("linux-source-7.10_7.10.2-1_all.deb");
        let untried = deb("linux-source-7.11_7.11-1_all.deb");
        assert_eq!(accepted_package(store.path(), "series"), None);
        fs::write(stamp(&older), "series").expect("a file");
        assert_eq!(
            accepted_package(store.path(), "series"),
            Some(older.clone())
        );
        fs::write(stamp(&newer), "series").expect("a file");
        assert_eq!(accepted_package(store.path(), "series"), Some(newer));
        fs::write(stamp(&untried), "another series").expect("a file");
        assert_ne!(accepted_package(store.path(), "series"), Some(untried));
    }

    #[test]
    fn a_patch_that_does_not_apply_is_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let source = dir.path().join("source");
        fs::create_dir(&source).expect("a directory");
        let makefile = "VERSION = 1\nPATCHLEVEL = 2\nSUBLEVEL = 3\n";
        fs::write(source.join("Makefile"), makefile).expect("a file");
        fs::write(source.join("file"), "one\ntwo\n").expect("a file");
        let patch = dir.path().join("0001-change.patch");
        let text = "--- a/file\n+++ b/file\n@@ -1,2 +1,2 @@\n one\n-two\n+three\n";
        fs::write(&patch, text).expect("a file");
        let source = Source::of_tree(&source).expect("it is a source tree");

        let into = dir.path().join("into");
        fs::create_dir(&into).expect("a directory");
        source.unpack(&into, &[]).expect("no patch is fine");
        let into = dir.path().join("again");
        fs::create_dir(&into).expect("a directory");
        source
            .unpack(&into, std::slice::from_ref(&patch))
            .expect("it applies");
        let patched = fs::read_to_string(into.join("file")).expect("a file");
        assert_eq!(patched, "one\nthree\n");
        let into = dir.path().join("twice");
        fs::create_dir(&into).expect("a directory");
        let error = source
            .unpack(&into, &[patch.clone(), patch])
            .expect_err("it applies only once");
        assert!(error.to_string().contains("0001-change.patch"), "{error}");
    }

    #[test]
    fn a_series_that_needs_another_one_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let source = dir.path().join("source");
        fs::create_dir(&source).expect("a directory");
        let makefile = "VERSION = 1\nPATCHLEVEL = 2\nSUBLEVEL = 3\n";
        fs::write(source.join("Makefile"), makefile).expect("a file");
        fs::write(source.join("file"), "one\ntwo\n").expect("a file");
        let source = Source::of_tree(&source).expect("it is a source tree");
        let patch = |series: &str, name: &str, text: &str| {
            let series = dir.path().join(series);
            fs::create_dir_all(&series).expect("a directory");
            let patch = series.join(name);
            fs::write(&patch, text).expect("a file");
            patch
        };
        let first = patch(
            "a",
            "0001-two.patch",
            "--- a/file\n+++ b/file\n@@ -1,2 +1,2 @@\n one\n-two\n+three\n",
        );
        let make = "--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+1\n";
        let change = "--- a/new\n+++ b/new\n@@ -1 +1 @@\n-1\n+2\n";
        let alone = [
            patch("b", "0001-make.patch", make),
            patch("b", "0002-change.patch", change),
        ];
        let needs = patch(
            "c",
            "0001-three.patch",
            "--- a/file\n+++ b/file\n@@ -1,2 +1,2 @@\n one\n-three\n+four\n",
        );
        let into = |name: &str| {
            let into = dir.path().join(name);
            fs::create_dir(&into).expect("a directory");
            into
        };

        let mut patches = vec![first];
        patches.extend(alone);
        let tree = into("fine");
        source.unpack(&tree, &patches).expect("both apply alone");
        assert_eq!(fs::read_to_string(tree.join("new")).expect("a file"), "2\n");
        patches.push(needs);
        let error = source
            .unpack(&into("not"), &patches)
            .expect_err("the third is made for the first");
        assert!(error.to_string().contains("without the other"), "{error}");
    }
}
