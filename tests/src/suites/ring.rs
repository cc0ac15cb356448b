//! The kernel's own tests of rings: KUnit, `tools/testing/selftests/ringbuffer`, and its benchmark.

use anyhow::{Context as _, Result, bail, ensure};

use super::series::{self, Program};
use crate::test;
use crate::test::{Context, Test};

/// For every kernel with the series.
pub const TESTS: &[Test] = &[
    test!(kunit_passes_the_arithmetic_of_rings),
    test!(the_selftest_of_arguments_passes, |cx| passes(
        cx,
        "args_test",
        SHORT
    ))
    .limit_s(300),
    // Who may map, read and write what, and that the pages stay while they are mapped.
    test!(the_selftest_of_mappings_passes, |cx| passes(
        cx,
        "mapping_test",
        SHORT
    ))
    .limit_s(300),
    // With each end mapped or not, and programs that know nothing of rings.
    test!(the_selftest_of_live_pipes_passes, |cx| passes(
        cx,
        "pipe_test",
        SHORT
    ))
    .limit_s(300),
    test!(the_selftest_of_pending_pipes_passes, |cx| passes(
        cx,
        "pending_test",
        SHORT
    ))
    .limit_s(300),
    test!(the_selftest_of_kinds_of_pipes_passes, |cx| passes(
        cx,
        "kinds_test",
        SHORT
    ))
    .limit_s(300),
    // With poll, select, epoll, io_uring and futexes.
    test!(the_selftest_of_waiting_passes, |cx| passes(
        cx,
        "poll_test",
        SHORT
    ))
    .limit_s(300),
    test!(the_selftest_of_hostile_mappings_passes, |cx| passes(
        cx,
        "hostile_test",
        SHORT
    ))
    .limit_s(300),
    // Of what one end of a pipe must not be able to do to the other, and to others at its own.
    test!(the_selftest_of_rules_passes, |cx| passes(
        cx,
        "rules_test",
        SHORT
    ))
    .limit_s(300),
    test!(the_selftest_of_activation_under_load_passes, |cx| passes(
        cx,
        "stress_test",
        SHORT
    ))
    .limit_s(300),
    test!(the_selftest_of_the_test_device_passes, |cx| passes(
        cx,
        "device_test",
        SHORT
    ))
    .limit_s(300),
    test!(mapped_ends_need_fewer_system_calls_than_records).limit_s(300),
];

/// Minutes of what the usual run does for seconds.
pub const LONG_TESTS: &[Test] = &[
    test!(
        minutes_of_hostile_mappings_break_nothing_but_the_ring,
        |cx| passes(cx, "hostile_test", LONG)
    )
    .limit_s(1200),
    test!(minutes_of_activation_under_load_lose_nothing, |cx| passes(
        cx,
        "stress_test",
        LONG
    ))
    .limit_s(1200),
];

/// For kernels of which it is not known whether they pass.
pub const STEPS: &[Test] = &[test!(judge_rings).limit_s(300)];

/// The name of the step that replies with the names of the tests that fail.
pub const JUDGE: &str = "judge_rings";

const DIR: &str = "ringbuffer";

/// The programs of the series, and how many tests they have.
const PROGRAMS: &[Program] = &[
    (DIR, "args_test", 12),
    (DIR, "mapping_test", 38),
    (DIR, "pipe_test", 96),
    (DIR, "pending_test", 22),
    (DIR, "kinds_test", 14),
    (DIR, "poll_test", 38),
    (DIR, "hostile_test", 35),
    (DIR, "rules_test", 16),
    (DIR, "stress_test", 3),
    (DIR, "device_test", 14),
];

fn judge_rings(cx: &Context) -> Result<()> {
    let mut failed = Vec::new();
    if kunit_passes_the_arithmetic_of_rings(cx).is_err() {
        failed.push("KUnit".to_owned());
    }
    for &(collection, program, count) in PROGRAMS {
        let finished = series::program_of(cx, collection, program)?
            .env("RINGBUFFER_SECONDS", "1")
            // Of a broken ring, nothing comes sooner or later.
            .env("RINGBUFFER_PATIENCE", "5000")
            .limit(cx.patience(60))
            .finish();
        let Ok(finished) = finished else {
            failed.push(format!("{program} (does not end)"));
            break;
        };
        failed.extend(series::failures_in(program, count, &finished));
    }
    cx.reply(&failed)
}

fn kunit_passes_the_arithmetic_of_rings(_cx: &Context) -> Result<()> {
    series::kunit_passes("ringbuffer", 20)
}

/// Runs a program, with its random parts so long.
fn passes(cx: &Context, program: &str, seconds: u32) -> Result<()> {
    let known = PROGRAMS.iter().find(|(_, name, _)| *name == program);
    let &(collection, _, count) = known.context("no such program")?;
    let finished = series::program_of(cx, collection, program)?
        .env("RINGBUFFER_SECONDS", seconds.to_string())
        // Each random part, and the rest.
        .limit(cx.patience(280 + 4 * seconds))
        .finish()?;
    for line in finished.stderr.lines().chain(finished.stdout.lines()) {
        if line.ends_with(" rings") || line.ends_with(" pipes") {
            println!("{line}");
        }
    }
    series::judge(program, count, &finished)
}

/// Of the random parts in a usual run.
const SHORT: u32 = 2;
/// In a long one.
const LONG: u32 = 120;

/// The benchmark of the series: what is printed is for the reader, what is asserted is the number of
/// system calls. A record may need a sleep and a wake-up at both ends, where the processors have so much else
/// to do that these run in turns; but not those of all sizes do.
fn mapped_ends_need_fewer_system_calls_than_records(cx: &Context) -> Result<()> {
    // Ends that share a processor with other work sleep for each record: one quiet run of three counts.
    let mut fewest = f64::INFINITY;
    for _ in 0..3 {
        fewest = fewest.min(fewest_calls(cx)?);
        // One for each record would be half of what read and write need.
        if fewest < 0.5 {
            return Ok(());
        }
    }
    bail!("all records need calls with the ring, {fewest} times as many as without")
}

/// System calls with a ring for each one with read and write, for the size of records that needs fewest.
fn fewest_calls(cx: &Context) -> Result<f64> {
    let said = series::program_of(cx, DIR, "ring_bench")?
        .arg("20000")
        .run()?;
    println!("{said}");
    let rows: Vec<Vec<f64>> = said
        .lines()
        .skip(1)
        .map(|line| {
            let columns = line.split_whitespace();
            columns.map(str::parse).collect::<Result<_, _>>()
        })
        .collect::<Result<_, _>>()
        .with_context(|| format!("the benchmark says:\n{said}"))?;
    ensure!(rows.len() == 4, "the benchmark says:\n{said}");
    let mut fewest = f64::INFINITY;
    for row in rows {
        let [bytes, _, _, _, plain, mapped] = row[..] else {
            bail!("the benchmark says:\n{said}");
        };
        ensure!(
            plain >= 1.9,
            "{bytes} bytes: {plain} calls with read and write"
        );
        ensure!(mapped <= 4.0, "{bytes} bytes: {mapped} calls with the ring");
        fewest = fewest.min(mapped / plain);
    }
    Ok(fewest)
}
