//! On kernels that find mistakes: nothing leaks, and an allocation that fails is an error like
//! another. KASAN, lockdep and the rest speak through the kernel's log, which every test's end looks
//! at.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::series::{self, Verdict};
use crate::kit::shell::sh;
use crate::test;
use crate::test::{Context, Test};

/// Before the others.
pub const FIRST: &[Test] = &[test!(the_checkers_are_at_work)];

/// After the others.
pub const LAST: &[Test] = &[
    test!(allocations_that_fail_are_errors_like_others).limit_s(900),
    test!(nothing_has_leaked).limit_s(100),
    test!(lockdep_has_not_given_up),
];

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
const FAILSLAB: &str = "/sys/kernel/debug/failslab";

/// What leaked while booting is not of interest; and what is looked at later must be there.
fn the_checkers_are_at_work(_cx: &Context) -> Result<()> {
    fs::write(KMEMLEAK, "clear").context("no kmemleak")?;
    ensure!(Path::new(FAILSLAB).is_dir(), "no failslab");
    ensure!(
        fs::read_to_string("/proc/kallsyms")?.contains(" __asan_report_load8"),
        "no KASAN"
    );
    lockdep_has_not_given_up(_cx)
}

fn lockdep_has_not_given_up(_cx: &Context) -> Result<()> {
    let stats = fs::read_to_string("/proc/lockdep_stats").context("no lockdep")?;
    let on = stats
        .lines()
        .any(|line| line.trim().starts_with("debug_locks:") && line.trim().ends_with('1'));
    ensure!(on, "lockdep is off:\n{stats}");
    Ok(())
}

/// An object is reported when two scans in a row found nobody who refers to it, and it is older than
/// five seconds (`Documentation/dev-tools/kmemleak.rst`).
fn nothing_has_leaked(_cx: &Context) -> Result<()> {
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(6));
        fs::write(KMEMLEAK, "scan").context("cannot scan")?;
    }
    let leaks = fs::read_to_string(KMEMLEAK)?;
    ensure!(leaks.is_empty(), "{leaks}");
    Ok(())
}

/// The programs run with every 40th of their allocations failing. Most of their tests then fail, and
/// that is well: the kernel must only go on, and nothing may leak.
fn allocations_that_fail_are_errors_like_others(cx: &Context) -> Result<()> {
    for (name, value) in [
        ("task-filter", "Y"),
        ("ignore-gfp-wait", "N"),
        ("verbose", "0"),
        ("times", "1000000"),
        ("interval", "1"),
        ("probability", "0"),
    ] {
        let file = format!("{FAILSLAB}/{name}");
        fs::write(&file, value).with_context(|| format!("cannot set {file}"))?;
    }
    let dir = series::copy_of(cx, "net/af_unix")?;
    let mut failed = 0;
    for round in 0..10 {
        // Not in the first round: the program itself needs memory to start.
        let probability = [2, 5, 10, 25, 50][round % 5];
        fs::write(format!("{FAILSLAB}/probability"), probability.to_string())?;
        let script = format!(
            "echo 1 >/proc/self/make-it-fail; exec timeout 60 {}/unix_fd_addr",
            dir.display()
        );
        let finished = sh(&script).limit(cx.patience(100)).finish();
        fs::write(format!("{FAILSLAB}/probability"), "0")?;
        let verdicts = series::verdicts(&finished?.stdout);
        failed += verdicts
            .values()
            .filter(|verdict| **verdict == Verdict::NotOk)
            .count();
    }
    let left = fs::read_to_string(format!("{FAILSLAB}/times"))?;
    let injected = 1_000_000
        - left
            .trim()
            .parse::<i64>()
            .context("no number of failures")?;
    println!("{injected} allocations failed, and {failed} tests with them");
    ensure!(
        injected > 1000 && failed > 10,
        "{injected} failures, {failed} tests"
    );
    // And it still works.
    fs::write(format!("{FAILSLAB}/task-filter"), "N")?;
    series::passes(cx, "unix_fd_addr")
}
