//! Building a kernel, unless the cache has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::source::{self, Source};
use super::{Kernel, KernelPatch, config};
use crate::cache;
use crate::packages::{self, Purpose};
use crate::progress;

/// Changes when the way of building changes, so that old builds are not used.
const RECIPE: &str = "1";

/// Makes sure that these kernels are in the cache and returns their images, in
/// the same order.
///
/// # Errors
/// A package, the source or an option is missing, or the build failed.
pub fn ensure(repo: &Path, kernels: &[Kernel], yes: bool) -> Result<Vec<PathBuf>> {
    let patch = KernelPatch::of(repo);
    // One at a time: the second run finds what the first one built.
    let _lock = cache::lock("kernels")?;
    let mut source = source::find(&patch);
    if source.is_err() && !packages::missing(&[Purpose::KernelBuild]).is_empty() {
        packages::ensure(&[Purpose::KernelBuild], yes)?;
        source = source::find(&patch);
    }
    let source = source?;
    let mut homes = Vec::new();
    for &kernel in kernels {
        homes.push((kernel, home(&patch, &source, kernel)?));
    }
    let missing: Vec<&(Kernel, PathBuf)> =
        homes.iter().filter(|(_, home)| !home.exists()).collect();
    if !missing.is_empty() {
        packages::ensure(&[Purpose::KernelBuild], yes)?;
        build_all(&patch, &source, &missing)?;
    }
    Ok(homes
        .into_iter()
        .map(|(kernel, home)| home.join(image_name(kernel)))
        .collect())
}

/// Where a kernel's build is kept: a directory named by everything that goes
/// into it.
fn home(patch: &KernelPatch, source: &Source, kernel: Kernel) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    };
    add(RECIPE.as_bytes());
    add(kernel.name().as_bytes());
    add(source.id.as_bytes());
    add(patch.fragment(kernel)?.as_bytes());
    for file in patch.series()? {
        let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        add(&text);
    }
    let digest = hash.finalize();
    let key: String = digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(cache::dir()?
        .join("kernels")
        .join(format!("{kernel}-{key}")))
}

fn image_name(kernel: Kernel) -> &'static str {
    match kernel {
        Kernel::Uml => "linux",
        Kernel::X86 => "bzImage",
    }
}

/// Unpacks once, builds all that are missing, keeps what is needed.
fn build_all(patch: &KernelPatch, source: &Source, missing: &[&(Kernel, PathBuf)]) -> Result<()> {
    let cache = cache::dir()?;
    remove_leftovers(&cache)?;
    let work = tempfile::Builder::new()
        .prefix("build-")
        .tempdir_in(&cache)
        .context("cannot make a build directory")?;
    let tree = work.path().join("source");
    fs::create_dir(&tree).context("cannot make a source directory")?;
    source.unpack(&tree, &patch.series()?)?;
    let logs = cache.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    for (kernel, home) in missing {
        let fragment = patch.fragment(*kernel)?;
        let objects = work.path().join(kernel.name());
        build(*kernel, &tree, &objects, &fragment, &logs)?;
        keep(*kernel, &objects, home, work.path())?;
        // The objects of one kernel are as large as the source.
        fs::remove_dir_all(&objects).context("cannot remove the build's objects")?;
    }
    Ok(())
}

/// Removes what killed builds left: gigabytes. The caller holds the lock.
fn remove_leftovers(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).context("cannot list the cache")? {
        let path = entry.context("cannot list the cache")?.path();
        let is_work = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("build-"));
        if is_work {
            fs::remove_dir_all(&path)
                .with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn build(kernel: Kernel, tree: &Path, objects: &Path, fragment: &str, logs: &Path) -> Result<()> {
    fs::create_dir(objects).context("cannot make a build directory")?;
    let log = |part: &str| logs.join(format!("{kernel}-{part}.log"));
    let minute = Duration::from_secs(60);
    progress::run(
        &format!("configuring the {kernel} kernel"),
        make(kernel, tree, objects, &[kernel.base_config()]),
        &log("config"),
        5 * minute,
    )?;
    let dot_config = objects.join(".config");
    let mut text = fs::read_to_string(&dot_config).context("the kernel has no .config")?;
    text.push_str(fragment);
    fs::write(&dot_config, text).context("cannot write the kernel's .config")?;
    progress::run(
        &format!("completing the {kernel} configuration"),
        make(kernel, tree, objects, &["olddefconfig"]),
        &log("config"),
        5 * minute,
    )?;
    let finished = fs::read_to_string(&dot_config).context("the kernel has no .config")?;
    config::check_survival(fragment, &finished)
        .with_context(|| format!("kernel-patch/config/{kernel}.config"))?;
    progress::run(
        &format!("building the {kernel} kernel (some minutes)"),
        make(kernel, tree, objects, &[kernel.image().0]),
        &log("build"),
        90 * minute,
    )
}

/// `make` with the kernel's settings, at low priority.
fn make(kernel: Kernel, tree: &Path, objects: &Path, targets: &[&str]) -> Command {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = Command::new("nice");
    make.arg("make")
        .arg("-C")
        .arg(tree)
        .arg(format!("O={}", objects.display()))
        .arg(format!("ARCH={}", kernel.arch()))
        .arg(format!("-j{jobs}"))
        .args(["KBUILD_BUILD_USER=lab", "KBUILD_BUILD_HOST=lab"])
        .args(targets)
        // Settings of an outer make are not meant for this one.
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .env("LC_ALL", "C");
    make
}

/// Copies image, configuration and symbols to their home, all or nothing.
fn keep(kernel: Kernel, objects: &Path, home: &Path, work: &Path) -> Result<()> {
    let partial = work.join(format!("{kernel}-kept"));
    fs::create_dir(&partial).context("cannot make a directory for the kernel")?;
    for (from, to) in [
        (kernel.image().1, image_name(kernel)),
        (".config", "config"),
        ("System.map", "System.map"),
    ] {
        fs::copy(objects.join(from), partial.join(to))
            .with_context(|| format!("the {kernel} build made no {from}"))?;
    }
    if let Some(parent) = home.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
    }
    fs::rename(&partial, home).with_context(|| format!("cannot create {}", home.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_config_or_series_is_another_build() {
        let repo = tempfile::tempdir().expect("a temporary directory");
        let dir = repo.path().join("kernel-patch");
        for part in ["config", "series", "source"] {
            fs::create_dir_all(dir.join(part)).expect("a directory");
        }
        let makefile = "VERSION = 1\nPATCHLEVEL = 2\nSUBLEVEL = 3\n";
        fs::write(dir.join("source/Makefile"), makefile).expect("a file");
        fs::write(dir.join("config/uml.config"), "CONFIG_A=y\n").expect("a file");
        let patch = KernelPatch::of(repo.path());
        let source = Source::of_tree(&dir.join("source")).expect("a source tree");
        let home = || home(&patch, &source, Kernel::Uml).expect("a home");
        let first = home();
        assert_eq!(first, home());
        fs::write(dir.join("config/uml.config"), "CONFIG_A=n\n").expect("a file");
        let second = home();
        assert_ne!(first, second);
        fs::write(dir.join("series/0001-a.patch"), "a").expect("a file");
        let third = home();
        assert_ne!(second, third);
        fs::write(dir.join("series/README"), "no patch").expect("a file");
        assert_eq!(third, home());
    }
}
