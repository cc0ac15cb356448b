//! The library of rings on kernels that have them: its own tests once more, by the kernel's way; and
//! `ublkup-pipe` in shells: whoever knows of what, the same bytes arrive.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::own_tests;
use crate::kit::shell::Shell;
use crate::test;
use crate::test::{Context, Test};

/// For every kernel with both series.
pub const TESTS: &[Test] = &[
    test!(the_two_ends_of_a_ring_pass_their_tests_by_the_kernels_way).limit_s(300),
    test!(hostile_peers_of_the_kernels_way_harm_nobody).limit_s(300),
    test!(programs_in_shells_pass_their_tests_by_the_kernels_way).limit_s(300),
    test!(a_record_costs_nothing_by_the_kernels_way_either).limit_s(300),
    test!(two_programs_on_a_pipe_take_the_best_way_that_both_have).limit_s(60),
    test!(a_live_ring_serves_programs_that_know_nothing_of_it).limit_s(60),
];

/// What the library's tests take for the way that they test.
const BY_THE_KERNEL: &[(&str, &str)] = &[("RING_TESTS_TRANSPORT", "kernel")];

fn the_two_ends_of_a_ring_pass_their_tests_by_the_kernels_way(cx: &Context) -> Result<()> {
    own_tests::pass_all(cx, "ring", BY_THE_KERNEL)
}

/// They write nonsense into each word that the kernel lets them write.
fn hostile_peers_of_the_kernels_way_harm_nobody(cx: &Context) -> Result<()> {
    own_tests::pass_all(cx, "ring_hostile", BY_THE_KERNEL)
}

/// They are killed, too.
fn programs_in_shells_pass_their_tests_by_the_kernels_way(cx: &Context) -> Result<()> {
    own_tests::pass_all(cx, "ring_processes", BY_THE_KERNEL)
}

fn a_record_costs_nothing_by_the_kernels_way_either(cx: &Context) -> Result<()> {
    own_tests::pass_all(cx, "ring_steady", BY_THE_KERNEL)
}

/// Bytes that are piped: enough to fill rings several times.
const LEN_BYTES: usize = 3_000_017;

/// Runs a shell script in the scratch directory, where `data` is; what it said on standard error, after
/// `out` was found to be `copies` of the data.
fn piped(cx: &Context, script: &str, copies: usize) -> Result<String> {
    let folder = cx.scratch();
    let program = cx.paths.driver_tests.get("ublkup-pipe");
    let program = program.context("this run has no ublkup-pipe")?;
    let data = folder.join("data");
    if !data.exists() {
        let mut number = 1_u64;
        let mut bytes = Vec::with_capacity(LEN_BYTES + 8);
        while bytes.len() < LEN_BYTES {
            number = number
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            bytes.extend_from_slice(&number.to_be_bytes());
        }
        bytes.truncate(LEN_BYTES);
        fs::write(&data, bytes).context("cannot write the data")?;
    }
    let run = format!("--stats --runtime-dir {}", folder.join("run").display());
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

fn two_programs_on_a_pipe_take_the_best_way_that_both_have(cx: &Context) -> Result<()> {
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
        // Different ways: none in common but the pipe.
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
        ensure!(
            seen == ends,
            "{script}: {seen} ends by way of '{way}': {said}"
        );
    }
    Ok(())
}

fn a_live_ring_serves_programs_that_know_nothing_of_it(cx: &Context) -> Result<()> {
    for way in ["kernel", "shared"] {
        // After one of ours a writer that knows nothing, and another of ours.
        let script = format!(
            "{{ PRODUCE --wait 9 --way {way} data; cat data; PRODUCE --way {way} data; }} | CONSUME --wait 9 --way {way} >out"
        );
        let said = piped(cx, &script, 3)?;
        ensure!(said.contains(&format!("way={way}")), "{script}: {said}");
    }
    // A reader that stops, and `cat` for what it left: by the kernel's way the rest is in the ring.
    let said = piped(
        cx,
        "{ PRODUCE --kernel data; PRODUCE --kernel data; } | { CONSUME --kernel; cat; } >out",
        2,
    )?;
    ensure!(said.contains("way=kernel"), "{said}");
    Ok(())
}
