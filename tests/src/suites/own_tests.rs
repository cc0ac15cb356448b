//! Cargo's test programs of the other packages, run in guests.

use anyhow::{Context as _, Result, ensure};
use testkit::shell::Shell;

use crate::test::Context;

/// Runs the ignored tests of a program; every one must run and pass.
pub fn pass_ignored(cx: &Context, program: &str, env: &[(&str, &str)]) -> Result<()> {
    pass(cx, program, &["--ignored"], env)
}

/// Runs all tests of a program; every one must run and pass.
pub fn pass_all(cx: &Context, program: &str, env: &[(&str, &str)]) -> Result<()> {
    pass(cx, program, &[], env)
}

fn pass(cx: &Context, program: &str, which: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let path = cx.paths.driver_tests.get(program);
    let path = path.with_context(|| format!("this run has no test program {program}"))?;
    let list = Shell::new(path).args(which).arg("--list").run()?;
    let expected = list.lines().filter(|line| line.ends_with(": test")).count();
    ensure!(expected > 0, "{program} has no such tests");
    let mut tests = Shell::new(path)
        .args(which)
        .arg("--test-threads=1")
        .limit(cx.patience(280));
    for (name, value) in env {
        tests = tests.env(name, value);
    }
    let output = tests.run()?;
    let passed = output.lines().find_map(|line| {
        let counts = line.strip_prefix("test result: ok. ")?;
        counts.split(' ').next()?.parse::<usize>().ok()
    });
    ensure!(
        passed == Some(expected),
        "{passed:?} of {expected} tests ran:\n{output}"
    );
    Ok(())
}
