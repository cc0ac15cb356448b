//! The package `fd-ring` on kernels that have rings: its own tests with the kernel's ring, and `ublkup-pipe` in shells,
//! where the same bytes must arrive whichever programs have rings.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use testkit::random::Random;
use testkit::shell::Shell;

use super::own_tests;
use crate::test;
use crate::test::{Context, Test};

/// For every kernel with both series.
pub const TESTS: &[Test] = &[
    test!(
        the_two_ends_of_a_ring_pass_their_tests_with_the_kernels,
        |cx| { own_tests::pass_all(cx, "ring", KERNEL_RING) }
    )
    .limit_s(300),
    // They write random values to each word that the kernel lets them write.
    test!(hostile_peers_do_no_harm_with_the_kernels_ring, |cx| {
        own_tests::pass_all(cx, "ring_hostile", KERNEL_RING)
    })
    .limit_s(300),
    // They are killed, too.
    test!(
        programs_in_shells_pass_their_tests_with_the_kernels_ring,
        |cx| { own_tests::pass_all(cx, "ring_processes", KERNEL_RING) }
    )
    .limit_s(300),
    test!(a_record_costs_nothing_with_the_kernels_ring, |cx| {
        own_tests::pass_all(cx, "ring_steady", KERNEL_RING)
    })
    .limit_s(300),
    test!(two_programs_on_a_pipe_use_the_best_ring_that_both_allow).limit_s(60),
    test!(a_live_ring_serves_plain_programs).limit_s(60),
];

/// Makes the tests of the package use the kernel's ring.
const KERNEL_RING: &[(&str, &str)] = &[("RING_TESTS_TRANSPORT", "kernel")];

/// Bytes that are piped: enough to fill rings several times.
const LEN_BYTES: usize = 3_000_017;

/// Runs a shell script in the scratch directory, where `data` is, and checks that `out` is `copies` of the data;
/// returns its standard error.
fn piped(cx: &Context, script: &str, copies: usize) -> Result<String> {
    let folder = cx.scratch();
    let program = cx.paths.driver_tests.get("ublkup-pipe");
    let program = program.context("this run has no ublkup-pipe")?;
    let data = folder.join("data");
    if !data.exists() {
        fs::write(&data, Random(1).bytes(LEN_BYTES)).context("cannot write the data")?;
    }
    let run = format!("--stats --runtime-dir {}", cx.run_dir().display());
    let script = script
        .replace("PRODUCE", &format!("{} produce {run}", program.display()))
        .replace("CONSUME", &format!("{} consume {run}", program.display()));
    Shell::new("sh")
        .args(["-c", &format!("{{ {script}; }} 2>said")])
        .dir(folder)
        .limit(cx.patience(40))
        .run()
        .with_context(|| script.clone())?;
    let said = fs::read_to_string(folder.join("said")).context("nothing was said")?;
    let expected = fs::read(&data)
        .context("cannot read the data")?
        .repeat(copies);
    let got = fs::read(folder.join("out")).context("nothing came out")?;
    ensure!(
        got == expected,
        "{script}: {} bytes came, not {}: {said}",
        got.len(),
        expected.len()
    );
    Ok(said)
}

fn two_programs_on_a_pipe_use_the_best_ring_that_both_allow(cx: &Context) -> Result<()> {
    let table = [
        (
            "PRODUCE --kernel --wait 9 data | CONSUME --kernel --wait 9 >out",
            "kernel",
            2,
        ),
        (
            "PRODUCE --kernel --wait 9 --records 16 data | CONSUME --kernel --wait 9 --records 16 >out",
            "kernel",
            2,
        ),
        // The kernel's ring is not asked for by default.
        ("PRODUCE --wait 9 data | CONSUME --wait 9 >out", "shared", 2),
        (
            "PRODUCE --wait 9 --way shared data | CONSUME --wait 9 --way shared >out",
            "shared",
            2,
        ),
        // Nothing in common but the pipe.
        (
            "PRODUCE --way kernel data | CONSUME --way shared >out",
            "plain",
            2,
        ),
        (
            "PRODUCE --way shared data | CONSUME --way plain >out",
            "plain",
            2,
        ),
        // One end alone, and neither.
        ("PRODUCE data | cat >out", "plain", 1),
        ("cat data | CONSUME >out", "plain", 1),
        ("cat data | cat >out", "plain", 0),
        (
            "PRODUCE data | dd bs=777 2>/dev/null | CONSUME >out",
            "plain",
            2,
        ),
    ];
    for (script, way, ends) in table {
        let said = piped(cx, script, 1)?;
        let seen = said.matches(&format!("way={way}")).count();
        ensure!(seen == ends, "{script}: {seen} ends with way={way}: {said}");
    }
    Ok(())
}

fn a_live_ring_serves_plain_programs(cx: &Context) -> Result<()> {
    for way in ["kernel", "shared"] {
        // A plain writer between two of `ublkup-pipe`.
        let script = format!(
            "{{ PRODUCE --wait 9 --way {way} data; cat data; PRODUCE --way {way} data; }} | CONSUME --wait 9 --way {way} >out"
        );
        let said = piped(cx, &script, 3)?;
        ensure!(said.contains(&format!("way={way}")), "{script}: {said}");
    }
    // A reader that stops, and `cat` for what it left: with the kernel's ring the rest is in the ring.
    let said = piped(
        cx,
        "{ PRODUCE --kernel data; PRODUCE --kernel data; } | { CONSUME --kernel; cat; } >out",
        2,
    )?;
    ensure!(said.contains("way=kernel"), "{said}");
    Ok(())
}
