//! Whether the series' tests notice when one of the series is broken: `kernel-patch/mutants` has small
//! patches, each of which breaks one thing on top of them, and at least one test must fail with each.
//! Those whose name begins with `ring-` are judged by the tests of rings, the others by those of
//! addresses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use testkit::shell::Shell;

use super::build::{self, Product};
use super::{Kernel, KernelPatch, find};
use crate::cache;
use crate::machine::{Machine, Uml};
use crate::packages::{self, Purpose};
use crate::report::line;
use crate::suites::{ring, series};
use crate::test::Paths;

/// One way to break one of the series.
struct Mutant {
    name: String,
    patch: PathBuf,
}

impl Mutant {
    /// The step that runs the tests of the series that it breaks.
    fn judge(&self) -> &'static str {
        if self.name.starts_with("ring-") {
            ring::JUDGE
        } else {
            series::JUDGE
        }
    }
}

/// Builds a User Mode Linux kernel of each mutant whose name contains `pattern` and runs the series'
/// tests on it. Prints a line for each, with the tests that failed.
pub fn run(repo: &Path, pattern: &str, yes: bool) -> Result<ExitCode> {
    let patch = KernelPatch::of(repo);
    let mutants = find(&patch.mutants_dir(), pattern)?;
    let selftests = build::ensure(repo, &[Product::Selftests], yes)?;
    let paths = Paths {
        repo: repo.to_owned(),
        selftests: selftests.into_iter().next(),
        ..Paths::default()
    };
    packages::ensure(&[Purpose::KernelBuild], yes)?;
    let source = find::find(&patch)?;
    let work = tempfile::Builder::new()
        .prefix("mutants-")
        .tempdir_in(cache::dir()?)
        .context("cannot make a build directory")?;
    let logs = cache::dir()?.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let (tree, objects) = (work.path().join("source"), work.path().join("objects"));
    for dir in [&tree, &objects] {
        fs::create_dir(dir).context("cannot make a build directory")?;
    }
    source.unpack(&tree, &patch.series()?)?;
    let kernel = Kernel::Uml;
    build::build(kernel, &tree, &objects, &patch.fragment(kernel)?, &logs)?;
    let image = objects.join(kernel.image().1);

    let mut judges: Vec<&str> = mutants.iter().map(Mutant::judge).collect();
    judges.dedup();
    for step in judges {
        let healthy = judge(&image, &paths, step)?;
        ensure!(
            healthy.is_empty(),
            "without a mutant these tests fail: {}",
            healthy.join(", ")
        );
    }
    let mut survivors = 0;
    for mutant in &mutants {
        apply(&tree, mutant, false)?;
        build::make_image(kernel, &tree, &objects, &logs)
            .with_context(|| format!("mutant {}", mutant.name))?;
        let failed = judge(&image, &paths, mutant.judge())?;
        if failed.is_empty() {
            survivors += 1;
            line(&format!("SURVIVED {}", mutant.name));
        } else {
            line(&format!("caught {}: {}", mutant.name, failed.join(", ")));
        }
        apply(&tree, mutant, true)?;
    }
    line(&format!(
        "{} mutants, {survivors} of them survived",
        mutants.len()
    ));
    Ok(if survivors == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn find(dir: &Path, pattern: &str) -> Result<Vec<Mutant>> {
    let mut mutants = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let patch = entry.context("cannot list the mutants")?.path();
        let name = patch
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if super::is_patch(&patch) && name.contains(pattern) {
            mutants.push(Mutant { name, patch });
        }
    }
    ensure!(!mutants.is_empty(), "no mutant is called {pattern}");
    mutants.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(mutants)
}

fn apply(tree: &Path, mutant: &Mutant, reverse: bool) -> Result<()> {
    let direction = if reverse { "-R" } else { "-N" };
    Shell::new("patch")
        .args(["-p1", "--batch", "--silent", "--fuzz=0", direction, "-i"])
        .arg(&mutant.patch)
        .dir(tree)
        .run()
        .with_context(|| format!("mutant {} does not apply", mutant.name))?;
    Ok(())
}

/// The tests of a series, run by this step, that fail on a kernel. A kernel that does not live through them has failed
/// too.
fn judge(image: &Path, paths: &Paths, step: &str) -> Result<Vec<String>> {
    let mut machine = match Machine::boot(&Uml::new(image), paths, "mutant") {
        Ok(machine) => machine,
        Err(error) => return Ok(vec![format!("boot ({error:#})")]),
    };
    let verdict = machine.run_step::<_, Vec<String>>(step, &());
    let failed = verdict.unwrap_or_else(|error| {
        let text = format!("{error:#}");
        let names = text
            .lines()
            .filter_map(|line| line.strip_prefix(series::FAILED));
        let mut failed: Vec<String> = names.map(str::to_owned).collect();
        failed.push(format!(
            "the machine ({})",
            text.lines().next().unwrap_or("")
        ));
        failed
    });
    machine.power_off();
    Ok(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_says_what_it_breaks_and_breaks_one_file() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mutants = find(&KernelPatch::of(&repo).mutants_dir(), "").expect("mutants");
        let of_rings = mutants.iter().filter(|one| one.judge() == ring::JUDGE);
        assert!(mutants.len() >= 48 && of_rings.count() >= 20);
        for mutant in mutants {
            let text = fs::read_to_string(&mutant.patch).expect("a file");
            assert!(text.contains("\n\n--- a/"), "{}", mutant.name);
            assert_eq!(text.matches("\n--- a/").count(), 1, "{}", mutant.name);
        }
    }
}
