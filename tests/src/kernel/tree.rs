//! The editable source tree: a git repository in the cache whose commits after
//! the base are the series, one branch for each on top of the one before.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::shell::{Shell, sh};

use super::{KernelPatch, Series, find};
use crate::cache;

/// The tag of the commit the series starts from.
const BASE: &str = "lab-base";

/// Long enough for adding a kernel to a repository on a slow disk.
const SLOW: Duration = Duration::from_secs(900);

/// Makes the tree if it is not there: the source, committed, and the series on
/// top of it. Returns its path.
pub fn ensure_tree(repo: &Path) -> Result<PathBuf> {
    let patch = KernelPatch::of(repo);
    let _lock = cache::lock("kernels")?;
    let dir = cache::dir()?.join(format!("linux-{}", patch.base()?));
    if dir.exists() {
        return Ok(dir);
    }
    let source = find::find(&patch)?;
    let work = tempfile::Builder::new()
        .prefix("build-")
        .tempdir_in(cache::dir()?)
        .context("cannot make a directory")?;
    let tree = work.path().join("linux");
    fs::create_dir(&tree).context("cannot make a directory")?;
    source.unpack_plain(&tree)?;
    eprintln!("lab: committing the source, so that patches can be made of changes …");
    // The identity is only for the base commit; patches carry the author's own. With updateRefs, a
    // rebase of the last branch takes the others along.
    sh(&format!(
        "git init -q . && git config gc.auto 0 && git config rebase.updateRefs true && \
         git add -A -f && \
         git -c user.name=lab -c user.email=lab@localhost commit -q -m 'Linux as packaged' && \
         git tag {BASE}"
    ))
    .dir(&tree)
    .limit(SLOW)
    .run()?;
    for series in Series::ALL {
        git(&tree)
            .args(["checkout", "-q", "-b", series.branch()])
            .run()?;
        let patches = patch.patches(series)?;
        if !patches.is_empty() {
            git(&tree)
                .args(["-c", "user.name=lab", "-c", "user.email=lab@localhost"])
                .args(["am", "-q"])
                .args(&patches)
                .run()
                .with_context(|| format!("{} does not apply", series.directory()))?;
        }
    }
    fs::rename(&tree, &dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

fn git(tree: &Path) -> Shell {
    Shell::new("git").dir(tree).limit(SLOW)
}

/// Turns the tree's commits after the base into the patches of each series, and returns how many
/// there are. The commits of a series are those of its branch that the branch before does not have.
pub fn refresh(repo: &Path) -> Result<usize> {
    let dir = ensure_tree(repo)?;
    let dirty = git(&dir)
        .args(["status", "--porcelain", "--untracked-files=no"])
        .run()?;
    ensure!(
        dirty.trim().is_empty(),
        "{} has changes that are not committed; commit them first:\n{dirty}",
        dir.display()
    );
    let patch = KernelPatch::of(repo);
    let mut from = BASE;
    let mut count = 0;
    for series in Series::ALL {
        count += export(&dir, from, series.branch(), &patch.dir_of(series))?;
        from = series.branch();
    }
    Ok(count)
}

fn export(tree: &Path, from: &str, to: &str, series: &Path) -> Result<usize> {
    git(tree)
        .args(["merge-base", "--is-ancestor", from, to])
        .run()
        .with_context(|| format!("{to} is not on top of {from}"))?;
    let fresh = tempfile::tempdir().context("cannot make a directory")?;
    git(tree)
        .args([
            "format-patch",
            "-q",
            "--no-signature",
            "--zero-commit",
            "--rfc",
            "-n",
            "-o",
        ])
        .arg(fresh.path())
        .arg(format!("{from}..{to}"))
        .run()?;
    fs::create_dir_all(series).with_context(|| format!("cannot create {}", series.display()))?;
    for entry in fs::read_dir(series).context("cannot list the series")? {
        let old = entry.context("cannot list the series")?.path();
        // The cover letter is written by hand and stays.
        if super::is_patch(&old) {
            fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
    }
    let mut count = 0;
    for entry in fs::read_dir(fresh.path()).context("cannot list new patches")? {
        let new = entry.context("cannot list new patches")?;
        fs::copy(new.path(), series.join(new.file_name())).context("cannot write a patch")?;
        count += 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_after_the_base_become_the_series() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tree = dir.path().join("tree");
        let series = dir.path().join("series");
        fs::create_dir(&tree).expect("a directory");
        fs::create_dir(&series).expect("a directory");
        fs::write(series.join("0007-old.patch"), "old").expect("a file");
        fs::write(series.join("0000-cover-letter.patch"), "cover").expect("a file");
        fs::write(series.join("README"), "stays").expect("a file");
        sh(&format!(
            "git init -q . && git config user.name a && git config user.email a@b && \
             echo one >file && git add file && git commit -qm base && git tag {BASE} && \
             echo two >file && git commit -qam 'file: count further'"
        ))
        .dir(&tree)
        .run()
        .expect("git works");
        assert_eq!(export(&tree, BASE, "HEAD", &series).expect("patches"), 1);
        let mut names: Vec<String> = fs::read_dir(&series)
            .expect("a directory")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let expected = [
            "0000-cover-letter.patch",
            "0001-file-count-further.patch",
            "README",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_branch_that_is_not_on_top_of_the_one_before_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tree = dir.path().join("tree");
        let series = dir.path().join("series");
        fs::create_dir(&tree).expect("a directory");
        sh(&format!(
            "git init -q . && git config user.name a && git config user.email a@b && \
             git commit -q --allow-empty -m base && git tag {BASE} && git checkout -q -b one && \
             git commit -q --allow-empty -m one && git checkout -q -b two {BASE}"
        ))
        .dir(&tree)
        .run()
        .expect("git works");
        let error = export(&tree, "one", "two", &series).expect_err("it lacks a commit");
        assert!(error.to_string().contains("not on top of one"), "{error:#}");
        assert!(!series.exists());
    }
}
