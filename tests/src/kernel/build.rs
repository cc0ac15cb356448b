//! Building kernels and the kernel's own test programs, unless the cache has
//! them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::find;
use super::source::Source;
use super::{Kernel, KernelPatch, config, selftests};
use crate::cache;
use crate::packages::{self, Purpose};
use crate::progress;

/// Changes when the way of building changes, so that old builds are not used.
const RECIPE: &str = "1";

/// What is built of the kernel's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// A kernel.
    Kernel(Kernel),
    /// The kernel's own test programs, of the source with the series.
    Selftests,
    /// The kernel's own ublk server, to be measured against.
    Kublk,
}

impl Product {
    fn series(self, patch: &KernelPatch) -> Result<Vec<PathBuf>> {
        match self {
            Product::Kernel(kernel) => patch.series_of(kernel),
            Product::Selftests | Product::Kublk => patch.series(),
        }
    }

    /// What else than source and series it is made of.
    fn ingredients(self, patch: &KernelPatch) -> Result<String> {
        match self {
            Product::Kernel(kernel) => patch.fragment(kernel),
            Product::Selftests => Ok(selftests::ingredients()),
            Product::Kublk => Ok(String::new()),
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Product::Kernel(kernel) => kernel.fmt(f),
            Product::Selftests => f.write_str("selftests"),
            Product::Kublk => f.write_str("kublk"),
        }
    }
}

/// Makes sure that these kernels are in the cache and returns their images, in
/// the same order.
pub fn kernels(repo: &Path, kernels: &[Kernel], yes: bool) -> Result<Vec<PathBuf>> {
    let products: Vec<Product> = kernels.iter().copied().map(Product::Kernel).collect();
    ensure(repo, &products, yes)
}

/// Makes sure that these products are in the cache. Returns, in the same order, the images of
/// kernels, the directory of the test programs, kublk itself.
pub fn ensure(repo: &Path, products: &[Product], yes: bool) -> Result<Vec<PathBuf>> {
    let patch = KernelPatch::of(repo);
    // What is there can be used while another run builds something else.
    if let Some(source) = find::find_here(&patch)? {
        let homes = homes(&patch, &source, products)?;
        if homes.iter().all(|(_, home)| home.exists()) {
            return Ok(results(homes));
        }
    }
    // One at a time: the second run finds what the first one built.
    let _lock = cache::lock("kernels")?;
    let mut source = find::find(&patch);
    if source.is_err() && !packages::missing(&[Purpose::KernelBuild]).is_empty() {
        packages::ensure(&[Purpose::KernelBuild], yes)?;
        source = find::find(&patch);
    }
    let source = source?;
    let homes = homes(&patch, &source, products)?;
    let missing: Vec<&(Product, PathBuf)> =
        homes.iter().filter(|(_, home)| !home.exists()).collect();
    if !missing.is_empty() {
        packages::ensure(&[Purpose::KernelBuild], yes)?;
        build_all(&patch, &source, &missing)?;
    }
    Ok(results(homes))
}

/// Whether a kernel is in the cache, and need not be built.
pub fn is_cached(repo: &Path, kernel: Kernel) -> Result<bool> {
    let patch = KernelPatch::of(repo);
    let Some(source) = find::find_here(&patch)? else {
        return Ok(false);
    };
    Ok(home(&patch, &source, Product::Kernel(kernel))?.exists())
}

fn homes(
    patch: &KernelPatch,
    source: &Source,
    products: &[Product],
) -> Result<Vec<(Product, PathBuf)>> {
    products
        .iter()
        .map(|&product| Ok((product, home(patch, source, product)?)))
        .collect()
}

fn results(homes: Vec<(Product, PathBuf)>) -> Vec<PathBuf> {
    homes
        .into_iter()
        .map(|(product, home)| match product {
            Product::Kernel(kernel) => home.join(image_name(kernel)),
            Product::Selftests => home,
            Product::Kublk => home.join("kublk"),
        })
        .collect()
}

/// Where a product is kept: a directory named by everything that goes into it.
fn home(patch: &KernelPatch, source: &Source, product: Product) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    };
    add(RECIPE.as_bytes());
    add(product.to_string().as_bytes());
    add(source.id.as_bytes());
    add(product.ingredients(patch)?.as_bytes());
    for file in product.series(patch)? {
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
        .join(format!("{product}-{key}")))
}

fn image_name(kernel: Kernel) -> &'static str {
    if kernel.is_uml() { "linux" } else { "bzImage" }
}

/// Unpacks once for each series, builds all that are missing, keeps what is needed.
fn build_all(patch: &KernelPatch, source: &Source, missing: &[&(Product, PathBuf)]) -> Result<()> {
    let cache = cache::dir()?;
    remove_leftovers(&cache)?;
    let logs = cache.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let mut left = missing.to_vec();
    while let Some((first, _)) = left.first().copied() {
        let series = first.series(patch)?;
        let work = tempfile::Builder::new()
            .prefix("build-")
            .tempdir_in(&cache)
            .context("cannot make a build directory")?;
        let tree = work.path().join("source");
        fs::create_dir(&tree).context("cannot make a source directory")?;
        source.unpack(&tree, &series)?;
        let mut others = Vec::new();
        for one in left {
            let (product, home) = one;
            if product.series(patch)? != series {
                others.push(one);
                continue;
            }
            let objects = work.path().join(product.to_string());
            fs::create_dir(&objects).context("cannot make a build directory")?;
            match *product {
                Product::Kernel(kernel) => {
                    build(kernel, &tree, &objects, &patch.fragment(kernel)?, &logs)?;
                    keep(kernel, &objects, home, work.path())?;
                    // The objects of one kernel are as large as the source.
                    fs::remove_dir_all(&objects).context("cannot remove the build's objects")?;
                }
                Product::Selftests => {
                    selftests::build(&tree, &objects, &logs)?;
                    put(&objects, home)?;
                }
                Product::Kublk => {
                    selftests::build_kublk(&tree, &objects, &logs)?;
                    put(&objects, home)?;
                }
            }
        }
        left = others;
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

/// Configures and builds a kernel of `tree` in `objects`, an empty directory.
pub(super) fn build(
    kernel: Kernel,
    tree: &Path,
    objects: &Path,
    fragment: &str,
    logs: &Path,
) -> Result<()> {
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
        .with_context(|| format!("the {kernel} kernel, of kernel-patch/config"))?;
    make_image(kernel, tree, objects, logs)
}

/// Builds what is not up to date.
pub(super) fn make_image(kernel: Kernel, tree: &Path, objects: &Path, logs: &Path) -> Result<()> {
    progress::run(
        &format!("building the {kernel} kernel (some minutes)"),
        make(kernel, tree, objects, &[kernel.image().0]),
        &logs.join(format!("{kernel}-build.log")),
        Duration::from_secs(90 * 60),
    )
}

/// `make` with a kernel's settings.
fn make(kernel: Kernel, tree: &Path, objects: &Path, targets: &[&str]) -> Command {
    let mut make = plain_make();
    make.arg("-C")
        .arg(tree)
        .arg(format!("O={}", objects.display()))
        .arg(format!("ARCH={}", kernel.arch()))
        .args(["KBUILD_BUILD_USER=lab", "KBUILD_BUILD_HOST=lab"])
        .args(targets);
    make
}

/// `make` at low priority, with as many jobs as there are processors.
pub(super) fn plain_make() -> Command {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut make = Command::new("nice");
    make.arg("make")
        .arg(format!("-j{jobs}"))
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
    put(&partial, home)
}

/// Moves a finished directory to its home.
fn put(finished: &Path, home: &Path) -> Result<()> {
    if let Some(parent) = home.parent() {
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
    }
    fs::rename(finished, home).with_context(|| format!("cannot create {}", home.display()))
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
        fs::write(dir.join("config/series.config"), "CONFIG_B=y\n").expect("a file");
        let patch = KernelPatch::of(repo.path());
        let source = Source::of_tree(&dir.join("source")).expect("a source tree");
        let of = |kernel| home(&patch, &source, Product::Kernel(kernel)).expect("a home");
        let home = || of(Kernel::Uml);
        let first = home();
        assert_eq!(first, home());
        fs::write(dir.join("config/uml.config"), "CONFIG_A=n\n").expect("a file");
        let second = home();
        assert_ne!(first, second);
        fs::write(dir.join("series/0001-a.patch"), "a").expect("a file");
        let third = home();
        let plain = of(Kernel::UmlBase);
        assert_ne!(second, third);
        fs::write(dir.join("series/README"), "no patch").expect("a file");
        assert_eq!(third, home());
        fs::write(dir.join("series/0001-a.patch"), "b").expect("a file");
        assert_ne!(third, home());
        assert_eq!(plain, of(Kernel::UmlBase), "it has no series");
    }
}
