//! Cargo's test programs of the other packages, run in guests.

use anyhow::{Context as _, Result, bail, ensure};
use testkit::shell::Shell;

use crate::test::Context;

/// How long a program may take.
const LIMIT_S: u32 = 280;

/// How much is told of what a test said before it failed, and of each end of the message it failed with.
const SAID_LINES: usize = 5;
const MESSAGE_LINES: usize = 8;

/// Runs the ignored tests of a program; every one must run and pass.
pub fn pass_ignored(cx: &Context, program: &str, env: &[(&str, &str)]) -> Result<()> {
    pass(cx, program, &["--ignored"], env, LIMIT_S)
}

/// As [`pass_ignored`], with a limit of seconds of its own.
pub fn pass_ignored_within(
    cx: &Context,
    program: &str,
    env: &[(&str, &str)],
    limit_s: u32,
) -> Result<()> {
    pass(cx, program, &["--ignored"], env, limit_s)
}

/// Runs all tests of a program; every one must run and pass.
pub fn pass_all(cx: &Context, program: &str, env: &[(&str, &str)]) -> Result<()> {
    pass(cx, program, &[], env, LIMIT_S)
}

fn pass(
    cx: &Context,
    program: &str,
    which: &[&str],
    env: &[(&str, &str)],
    limit_s: u32,
) -> Result<()> {
    let path = cx.paths.driver_tests.get(program);
    let path = path.with_context(|| format!("this run has no test program {program}"))?;
    let list = Shell::new(path).args(which).arg("--list").run()?;
    let expected = list.lines().filter(|line| line.ends_with(": test")).count();
    ensure!(expected > 0, "{program} has no such tests");
    let mut tests = Shell::new(path)
        .args(which)
        .arg("--test-threads=1")
        .limit(cx.patience(limit_s));
    for (name, value) in env {
        tests = tests.env(name, value);
    }
    // The end of what it says when it takes too long has the test that was running.
    let finished = tests.finish()?;
    let output = &finished.stdout;
    if !finished.status.success() {
        let (status, failures) = (finished.status, failures(output));
        bail!(
            "{program} ended with {status}\n{failures}\nthe end of its output:\n{}",
            finished.tail()
        );
    }
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

/// What the tests that failed said, each one's last lines. Without any, the test that was running at the end.
fn failures(output: &str) -> String {
    let mut told: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in output.lines() {
        let name = line.strip_prefix("---- ");
        match (
            name.and_then(|rest| rest.strip_suffix(" stdout ----")),
            told.last_mut(),
        ) {
            (Some(name), _) => told.push((name, Vec::new())),
            // The list of names, after all that was said.
            (None, Some(_)) if line == "failures:" => break,
            (None, Some((_, lines))) => lines.push(line),
            (None, None) => {}
        }
    }
    let told = told
        .into_iter()
        .map(|(name, lines)| format!("{name} failed:\n{}", message(&lines)));
    let told: Vec<String> = told.collect();
    let running = || {
        let name = output.lines().last()?.strip_prefix("test ")?;
        let (name, result) = name.split_once(" ... ")?;
        result.is_empty().then(|| format!("while it ran {name}"))
    };
    match told.is_empty() {
        true => running().unwrap_or_default(),
        false => told.join("\n"),
    }
}

/// The end of what a test said before it panicked, and how it did, without the way there.
fn message(lines: &[&str]) -> String {
    let end = lines.iter().position(|line| *line == "stack backtrace:");
    let lines = lines[..end.unwrap_or(lines.len())].iter().copied();
    let is_said = |line: &&str| !line.is_empty() && !line.starts_with("note: run with");
    let lines: Vec<&str> = lines.filter(is_said).collect();
    let panicked = lines.iter().rposition(|line| line.starts_with("thread '"));
    let (before, panicked) = lines.split_at(panicked.unwrap_or(0));
    let mut kept = before[before.len().saturating_sub(SAID_LINES)..].to_vec();
    if panicked.len() <= 2 * MESSAGE_LINES {
        kept.extend(panicked);
    } else {
        // A log in an assertion: how it begins, and how it ends with what was compared.
        kept.extend(&panicked[..MESSAGE_LINES]);
        kept.push("...");
        kept.extend(&panicked[panicked.len() - MESSAGE_LINES..]);
    }
    kept.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_test_says_its_own_message_first() {
        let output = "\
running 3 tests
test owner::one ... FAILED
test owner::two ... ok
test owner::three ... FAILED

failures:

---- owner::one stdout ----
an image is still there

thread 'owner::one' panicked at server/tests/rbd.rs:60:5:
[\"rm\"]: it is in use
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace

---- owner::three stdout ----

thread 'owner::three' panicked at server/tests/rbd.rs:70:5:
no answer
stack backtrace:
   0: __rustc::rust_begin_unwind
note: Some details are omitted, run with `RUST_BACKTRACE=full` for a verbose backtrace.


failures:
    owner::one
    owner::three

test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
";
        let expected = "\
owner::one failed:
an image is still there
thread 'owner::one' panicked at server/tests/rbd.rs:60:5:
[\"rm\"]: it is in use
owner::three failed:
thread 'owner::three' panicked at server/tests/rbd.rs:70:5:
no answer";
        assert_eq!(failures(output), expected);
    }

    #[test]
    fn a_program_that_dies_says_in_which_test() {
        let output = "running 2 tests\ntest one ... ok\ntest owner::two ... ";
        assert_eq!(failures(output), "while it ran owner::two");
        assert_eq!(failures(""), "");
    }
}
