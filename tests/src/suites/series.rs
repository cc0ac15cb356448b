//! The kernel's own tests of the series: KUnit and `tools/testing/selftests`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use testkit::shell::{Finished, Shell};

use crate::test;
use crate::test::{Context, Test};

/// For every kernel with the series.
pub const TESTS: &[Test] = &[
    test!(kunit_passes_the_parser_of_addresses),
    // With another user's processes, name spaces, races and cycles.
    test!(the_selftest_of_pipes_passes, |cx| passes(
        cx,
        "unix_fd_addr"
    ))
    .limit_s(300),
    test!(the_selftest_of_block_devices_passes, |cx| passes(
        cx,
        "unix_fd_addr_blk"
    ))
    .limit_s(300),
    // With a small server of its own.
    test!(the_selftest_of_ublk_disks_passes, |cx| passes(
        cx, "fd_addr"
    ))
    .limit_s(300),
    test!(the_selftest_of_landlock_passes, |cx| passes(
        cx,
        "fd_addr_test"
    ))
    .limit_s(300),
    test!(the_selftest_of_unix_diag_passes, |cx| passes(
        cx,
        "diag_anchor"
    )),
];

/// For kernels of which it is not known whether they pass.
pub const STEPS: &[Test] = &[test!(judge_series).limit_s(300)];

/// The name of the step that replies with the names of the tests that fail.
pub const JUDGE: &str = "judge_series";

/// Before the name of each of them, in the step's output.
pub const FAILED: &str = "failed: ";

/// A program of the kernel's tests: its collection, its name, and how many tests it has.
pub type Program = (&'static str, &'static str, usize);

/// The programs of the series of addresses.
const PROGRAMS: &[Program] = &[
    ("net/af_unix", "unix_fd_addr", 67),
    ("net/af_unix", "unix_fd_addr_blk", 7),
    ("net/af_unix", "diag_anchor", 2),
    ("ublk", "fd_addr", 8),
    ("landlock", "fd_addr_test", 16),
];

fn judge_series(cx: &Context) -> Result<()> {
    let mut failed = Vec::new();
    if kunit_passes_the_parser_of_addresses(cx).is_err() {
        failed.push("KUnit".to_owned());
    }
    for &(collection, program, count) in PROGRAMS {
        let finished = run_program(cx, collection, program)?;
        failed.extend(failures_in(program, count, &finished));
    }
    // A test that fails may leave a disk behind, and then there is no reply.
    for name in &failed {
        println!("{FAILED}{name}");
    }
    cx.reply(&failed)
}

/// The tests of a program that has ended which did not pass.
pub fn failures_in(program: &str, count: usize, finished: &Finished) -> Vec<String> {
    let mut failed = Vec::new();
    let verdicts = verdicts(&finished.stdout);
    if verdicts.len() != count {
        failed.push(format!("{program} (ended early)"));
    }
    let bad = verdicts
        .into_iter()
        .filter(|(_, verdict)| *verdict != Verdict::Ok);
    failed.extend(bad.map(|(name, _)| format!("{program}: {name}")));
    failed
}

/// How one test of a program ended.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub enum Verdict {
    /// It failed.
    NotOk,
    /// It could not be tried here.
    Skipped,
    /// It passed.
    Ok,
}

/// The results in a program's output, which is in the kernel's dialect of TAP
/// (`Documentation/dev-tools/ktap.rst`): lines `ok 1 name` and `not ok 2 name # SKIP why`. Those of
/// subtests are indented.
pub fn verdicts(output: &str) -> BTreeMap<String, Verdict> {
    output.lines().filter_map(verdict).collect()
}

fn verdict(line: &str) -> Option<(String, Verdict)> {
    let line = line.trim_start();
    let (rest, passed) = match line.strip_prefix("not ok ") {
        Some(rest) => (rest, false),
        None => (line.strip_prefix("ok ")?, true),
    };
    let (number, name) = rest.split_once(' ')?;
    number.parse::<u32>().ok()?;
    let (name, directive) = name.split_once(" # ").unwrap_or((name, ""));
    let verdict = if directive.starts_with("SKIP") {
        Verdict::Skipped
    } else if passed {
        Verdict::Ok
    } else {
        Verdict::NotOk
    };
    Some((name.to_owned(), verdict))
}

/// Runs a program of the kernel's tests in a directory that may be written to.
pub fn run_program(cx: &Context, collection: &str, program: &str) -> Result<Finished> {
    program_of(cx, collection, program)?.finish()
}

/// A program of the kernel's tests that is about to be run in a directory that may be written to.
pub fn program_of(cx: &Context, collection: &str, program: &str) -> Result<Shell> {
    let here = copy_of(cx, collection)?;
    let shell = Shell::new(here.join(program)).dir(&here);
    Ok(shell.limit(cx.patience(280)))
}

/// A copy of a collection in this test's own directory.
pub fn copy_of(cx: &Context, collection: &str) -> Result<PathBuf> {
    let all = cx.paths.selftests.as_deref();
    let dir = all
        .context("this run has not built the kernel's tests")?
        .join(collection);
    let here = cx.scratch().join(collection.replace('/', "-"));
    if !here.exists() {
        copy_files(&dir, &here)?;
    }
    Ok(here)
}

/// Programs of a collection call each other by relative paths.
fn copy_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// All tests of a program of the series pass, none is skipped, and there are as many as it has.
pub fn passes(cx: &Context, program: &str) -> Result<()> {
    let known = PROGRAMS.iter().find(|(_, name, _)| *name == program);
    let &(collection, _, count) = known.context("no such program")?;
    judge(program, count, &run_program(cx, collection, program)?)
}

/// All tests of a program that has ended passed, none was skipped, and there were so many.
pub fn judge(program: &str, count: usize, finished: &Finished) -> Result<()> {
    let verdicts = verdicts(&finished.stdout);
    let bad: Vec<&String> = verdicts
        .iter()
        .filter(|(_, verdict)| **verdict != Verdict::Ok)
        .map(|(name, _)| name)
        .collect();
    ensure!(
        finished.code() == 0 && bad.is_empty() && verdicts.len() == count,
        "{program} ended with {}, {} of {count} tests, not passed: {bad:?}\n{}",
        finished.code(),
        verdicts.len(),
        complaints(finished)
    );
    Ok(())
}

/// What failed expectations say.
fn complaints(finished: &Finished) -> String {
    let lines: Vec<&str> = finished
        .stdout
        .lines()
        .filter(|line| line.contains(":Expected ") || line.contains("SKIP"))
        .take(20)
        .collect();
    format!("{}\n{}", lines.join("\n"), finished.tail())
}

fn kunit_passes_the_parser_of_addresses(_cx: &Context) -> Result<()> {
    kunit_passes("af_unix_fd_addr", 50)
}

/// A KUnit suite that is built in passes, with at least so many tests.
pub fn kunit_passes(suite: &str, at_least: usize) -> Result<()> {
    let dir = Path::new("/sys/kernel/debug/kunit").join(suite);
    fs::write(dir.join("run"), "1").with_context(|| format!("cannot run KUnit's {suite}"))?;
    let results = fs::read_to_string(dir.join("results")).context("no results of KUnit")?;
    let verdicts = verdicts(&results);
    ensure!(
        verdicts.len() >= at_least && verdicts.values().all(|verdict| *verdict == Verdict::Ok),
        "{} results:\n{results}",
        verdicts.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read_of_ktap() {
        let output = "TAP version 13\n1..4\n# Starting 4 tests\nok 1 a.b\nnot ok 2 c\n\
                      ok 3 d # SKIP no such device\n    ok 1 sub\n# ok 5 comment\nok  broken\n";
        let got = verdicts(output);
        let expected = [
            ("a.b", Verdict::Ok),
            ("c", Verdict::NotOk),
            ("d", Verdict::Skipped),
            ("sub", Verdict::Ok),
        ];
        let expected = expected.map(|(name, verdict)| (name.to_owned(), verdict));
        assert_eq!(got, BTreeMap::from(expected));
    }
}
