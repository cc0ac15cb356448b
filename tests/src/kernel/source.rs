//! Linux source, unpacked and patched.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testkit::shell::Shell;

use crate::progress;

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

/// `VERSION.PATCHLEVEL.SUBLEVEL` of a source tree.
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

/// The last part of a path.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(OsStr::new(""))
        .to_string_lossy()
        .into_owned()
}

impl Source {
    /// A Debian source package.
    pub fn of_package(deb: PathBuf) -> Source {
        Source {
            id: file_name(&deb),
            kind: Kind::Package(deb),
        }
    }

    /// A packed source tree.
    pub fn of_tarball(file: &Path) -> Result<Source> {
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

    /// A source tree that is there already.
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

    /// A source tree with one file, patches for it, and directories to unpack into.
    struct Bench(tempfile::TempDir);

    impl Bench {
        fn new() -> (Self, Source) {
            let bench = Self(tempfile::tempdir().expect("a temporary directory"));
            let source = bench.dir("source");
            let makefile = "VERSION = 1\nPATCHLEVEL = 2\nSUBLEVEL = 3\n";
            fs::write(source.join("Makefile"), makefile).expect("a file");
            fs::write(source.join("file"), "one\ntwo\n").expect("a file");
            let source = Source::of_tree(&source).expect("it is a source tree");
            (bench, source)
        }

        fn dir(&self, name: &str) -> PathBuf {
            let dir = self.0.path().join(name);
            fs::create_dir_all(&dir).expect("a directory");
            dir
        }

        fn patch(&self, series: &str, name: &str, text: &str) -> PathBuf {
            let patch = self.dir(series).join(name);
            fs::write(&patch, text).expect("a file");
            patch
        }
    }

    const TWO_TO_THREE: &str = "--- a/file\n+++ b/file\n@@ -1,2 +1,2 @@\n one\n-two\n+three\n";

    #[test]
    fn a_patch_that_does_not_apply_is_named() {
        let (bench, source) = Bench::new();
        let patch = bench.patch("a", "0001-change.patch", TWO_TO_THREE);
        let none = source.unpack(&bench.dir("into"), &[]);
        none.expect("no patch is fine");
        let into = bench.dir("again");
        let once = source.unpack(&into, std::slice::from_ref(&patch));
        once.expect("it applies");
        let patched = fs::read_to_string(into.join("file")).expect("a file");
        assert_eq!(patched, "one\nthree\n");
        let twice = source.unpack(&bench.dir("twice"), &[patch.clone(), patch]);
        let error = twice.expect_err("it applies only once");
        assert!(error.to_string().contains("0001-change.patch"), "{error}");
    }

    #[test]
    fn a_series_that_needs_another_one_is_refused() {
        let (bench, source) = Bench::new();
        let make = "--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+1\n";
        let change = "--- a/new\n+++ b/new\n@@ -1 +1 @@\n-1\n+2\n";
        let needs = TWO_TO_THREE.replace("-two\n+three", "-three\n+four");
        let mut patches = vec![
            bench.patch("a", "0001-two.patch", TWO_TO_THREE),
            bench.patch("b", "0001-make.patch", make),
            bench.patch("b", "0002-change.patch", change),
        ];
        let tree = bench.dir("fine");
        source.unpack(&tree, &patches).expect("both apply alone");
        assert_eq!(fs::read_to_string(tree.join("new")).expect("a file"), "2\n");
        patches.push(bench.patch("c", "0001-three.patch", &needs));
        let refused = source.unpack(&bench.dir("not"), &patches);
        let error = refused.expect_err("the third is made for the first");
        assert!(error.to_string().contains("without the other"), "{error}");
    }
}
