//! On a kernel that looks for data races. Its reports come through the kernel's log, which every
//! test's end looks at; here it is asked whether it looks at all.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::test;
use crate::test::{Context, Test};

/// Before the others.
pub const FIRST: &[Test] = &[test!(kcsan_is_on)];

/// After the others.
pub const LAST: &[Test] = &[test!(kcsan_has_watched)];

/// One of KCSAN's counters.
fn counter(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/sys/kernel/debug/kcsan").context("no KCSAN")?;
    let value = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "))
        .with_context(|| format!("KCSAN does not count {name}:\n{text}"))?;
    value.trim().parse().context("KCSAN counts in words")
}

fn kcsan_is_on(_cx: &Context) -> Result<()> {
    ensure!(counter("enabled")? == 1, "KCSAN is off");
    Ok(())
}

fn kcsan_has_watched(_cx: &Context) -> Result<()> {
    let watched = counter("setup_watchpoints")?;
    println!(
        "{watched} accesses watched, {} races found anywhere",
        counter("data_races")?
    );
    ensure!(watched > 10_000, "only {watched} accesses were watched");
    Ok(())
}
