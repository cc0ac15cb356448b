//! The editable source tree: a git repository in the cache whose commits after
//! the base are the series.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{KernelPatch, source};
use crate::cache;
use crate::kit::shell::{Shell, sh};

/// The tag of the commit the series starts from.
const BASE: &str = "lab-base";

/// Long enough for adding a kernel to a repository on a slow disk.
const SLOW: Duration = Duration::from_secs(900);

/// Makes the tree if it is not there: the source, committed, and the series on
/// top of it. Returns its path.
///
/// # Errors
/// The source cannot be had or a patch does not apply.
pub fn ensure_tree(repo: &Path) -> Result<PathBuf> {
    let patch = KernelPatch::of(repo);
    let _lock = cache::lock("kernels")?;
    let dir = cache::dir()?.join(format!("tree-{}", patch.base()?));
    if dir.exists() {
        return Ok(dir);
    }
    let source = source::find(&patch)?;
    let work = tempfile::Builder::new()
        .prefix("build-")
        .tempdir_in(cache::dir()?)
        .context("cannot make a directory")?;
    let tree = work.path().join("linux");
    fs::create_dir(&tree).context("cannot make a directory")?;
    source.unpack_plain(&tree)?;
    eprintln!("lab: committing the source, so that patches can be made of changes …");
    // The identity is only for the base commit; patches carry the author's own.
    sh(&format!(
        "git init -q . && git config gc.auto 0 && git add -A -f && \
         git -c user.name=lab -c user.email=lab@localhost commit -q -m 'Linux as packaged' && \
         git tag {BASE}"
    ))
    .dir(&tree)
    .limit(SLOW)
    .run()?;
    let series = patch.series()?;
    if !series.is_empty() {
        Shell::new("git")
            .args([
                "-c",
                "user.name=lab",
                "-c",
                "user.email=lab@localhost",
                "am",
                "-q",
            ])
            .args(&series)
            .dir(&tree)
            .limit(SLOW)
            .run()
            .context("the series does not apply")?;
    }
    fs::rename(&tree, &dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}

/// Turns the tree's commits after the base into `kernel-patch/series`, and
/// returns how many there are.
///
/// # Errors
/// The tree has changes that are not committed, or git failed.
pub fn refresh(repo: &Path) -> Result<usize> {
    let dir = ensure_tree(repo)?;
    let dirty = Shell::new("git")
        .args(["status", "--porcelain", "--untracked-files=no"])
        .dir(&dir)
        .limit(SLOW)
        .run()?;
    ensure!(
        dirty.trim().is_empty(),
        "{} has changes that are not committed; commit them first:\n{dirty}",
        dir.display()
    );
    export(&dir, &KernelPatch::of(repo).series_dir())
}

fn export(tree: &Path, series: &Path) -> Result<usize> {
    let fresh = tempfile::tempdir().context("cannot make a directory")?;
    Shell::new("git")
        .args([
            "format-patch",
            "-q",
            "--no-signature",
            "--zero-commit",
            "-N",
            "-o",
        ])
        .arg(fresh.path())
        .arg(format!("{BASE}..HEAD"))
        .dir(tree)
        .limit(SLOW)
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
        assert_eq!(export(&tree, &series).expect("patches"), 1);
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
}
