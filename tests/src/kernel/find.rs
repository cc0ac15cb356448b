//! Where Linux source comes from.
//!
//! In this order: `LINUX_SRC` (a source tree), `LINUX_TARBALL` (a packed one), a Debian source package
//! in the cache, a Debian source package from the suites below: of the version the series was made for,
//! or, when that is gone, the newest one the series applies to. What was found once is kept, so that a
//! later run needs no network.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::KernelPatch;
use super::source::{Source, file_name};
use crate::cache;
use crate::packages::apt::{self, Apt};

/// Suites that have (or had) a package `linux-source-VERSION`, beside the
/// release's own backports. Tried in this order: all of a step together.
const SUITES: [&[&str]; 2] = [&["trixie-backports"], &["forky", "sid"]];

/// How many versions other than the base are tried: each is a large download.
const MAX_CANDIDATES: usize = 3;

/// The source for the series, if it is on this machine.
pub fn find_here(patch: &KernelPatch) -> Result<Option<Source>> {
    if let Some(dir) = variable("LINUX_SRC") {
        return Source::of_tree(&dir).map(Some);
    }
    if let Some(file) = variable("LINUX_TARBALL") {
        return Source::of_tarball(&file).map(Some);
    }
    let store = cache::dir()?.join("sources");
    if let Some(deb) = newest_package(&store, &patch.base()?) {
        return Ok(Some(Source::of_package(deb)));
    }
    let series = digest(&patch.series()?)?;
    Ok(accepted_package(&store, &series).map(Source::of_package))
}

/// Finds source for the series, and downloads it if need be.
pub fn find(patch: &KernelPatch) -> Result<Source> {
    if let Some(source) = find_here(patch)? {
        return Ok(source);
    }
    let base = patch.base()?;
    let own_backports = apt::codename().with_context(|| {
        format!(
            "no Linux source: this is not Debian; \
             set LINUX_SRC=DIRECTORY or LINUX_TARBALL=FILE to Linux {base}"
        )
    })? + "-backports";
    let mut steps: Vec<Vec<&str>> = SUITES.map(<[&str]>::to_vec).into();
    if !steps[0].contains(&own_backports.as_str()) {
        steps[0].push(&own_backports);
    }
    let store = cache::dir()?.join("sources");
    let wanted = format!("linux-source-{base}");
    let mut apts = Vec::new();
    for (number, suites) in steps.iter().enumerate() {
        // A suite that does not exist yet, or any more, is no reason to stop.
        match Apt::prepare(&format!("kernel-{number}"), suites) {
            Ok(apt) if has(&apt, &wanted)? => {
                return Ok(Source::of_package(newest(&apt, &wanted, &store)?));
            }
            Ok(apt) => apts.push(apt),
            Err(error) => eprintln!("lab: {error:#}"),
        }
    }
    another_version(patch, &apts, &store)
}

fn has(apt: &Apt, name: &str) -> Result<bool> {
    let versions = apt.versions(name)?;
    Ok(versions.iter().any(|(known, _)| known == name))
}

/// The newest version of a package, whatever the suites' priorities.
fn newest(apt: &Apt, name: &str, store: &Path) -> Result<PathBuf> {
    let versions = apt.versions(name)?;
    let version = versions.iter().find(|(known, _)| known == name);
    let (_, version) = version.with_context(|| format!("{name} is gone"))?;
    apt.download(&format!("{name}={version}"), store)
}

/// The newest source of another version that the series applies to.
fn another_version(patch: &KernelPatch, apts: &[Apt], store: &Path) -> Result<Source> {
    let (base, series) = (patch.base()?, patch.series()?);
    let digest = digest(&series)?;
    let mut seen: Vec<(String, &Apt)> = Vec::new();
    for apt in apts {
        for (name, _) in apt.versions("linux-source-")? {
            if number(&name).is_some() && !seen.iter().any(|(known, _)| *known == name) {
                seen.push((name, apt));
            }
        }
    }
    seen.sort_by_key(|(name, _)| Reverse(number(name)));
    let mut refused = Vec::new();
    for (name, apt) in seen.into_iter().take(MAX_CANDIDATES) {
        eprintln!("lab: there is no linux-source-{base} any more; trying {name}");
        let deb = newest(apt, &name, store)?;
        match accept(&deb, &series, &digest) {
            Ok(()) => return Ok(Source::of_package(deb)),
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
fn accept(deb: &Path, series: &[PathBuf], digest: &str) -> Result<()> {
    let parent = deb.parent().context("a package without a folder")?;
    let trial = tempfile::tempdir_in(parent).context("cannot make a directory")?;
    let into = trial.path().join("source");
    fs::create_dir(&into).context("cannot make a directory")?;
    Source::of_package(deb.to_owned()).unpack(&into, series)?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
