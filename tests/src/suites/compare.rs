//! The kernel's own tests of what the series touches, on a kernel with it and on one without.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use testkit::shell::Shell;

use super::series::{self, Verdict};
use crate::kernel::Kernel;
use crate::machine::{Machine, Uml};
use crate::report::line;
use crate::test;
use crate::test::{Context, Test};

/// The comparison.
pub const TESTS: &[Test] = &[test!(no_test_of_the_kernel_does_worse_with_the_series).limit_s(5400)];

/// What the machines do.
pub const STEPS: &[Test] = &[test!(run_kernel_test).limit_s(400)];

/// Some of the kernel's tests take a moment for granted and fail now and then, on any kernel. What did worse
/// once is run so many times more on both; it did worse if it does well less than half as often.
const REPEATS: u32 = 8;

/// Programs that were there before the series. Not all speak TAP; of the others the exit status counts.
const PROGRAMS: [(&str, &str); 7] = [
    (
        "net/af_unix",
        "diag_uid msg_oob scm_inq scm_pidfd scm_rights so_peek_off unix_connect \
         unix_connreset unix_listen",
    ),
    (
        "landlock",
        "base_test fs_test net_test ptrace_test scoped_abstract_unix_test \
         scoped_signal_test scoped_test tsync_test",
    ),
    ("splice", "default_file_splice_read.sh short_splice_read.sh"),
    ("filesystems/epoll", "epoll_wakeup_test"),
    (
        "futex/functional",
        "futex_priv_hash futex_requeue futex_wait futex_wait_private_mapped_file \
         futex_wait_timeout futex_wait_wouldblock futex_waitv robust_list",
    ),
    (
        "mm",
        "madv_populate map_populate merge mlock2-tests mremap_test mseal_test",
    ),
    ("pipe", "pipe_bench"),
];

/// Collection and name of each.
fn programs() -> impl Iterator<Item = (&'static str, &'static str)> {
    let all = PROGRAMS.iter();
    all.flat_map(|(collection, names)| names.split(' ').map(|name| (*collection, name)))
}

type Verdicts = BTreeMap<String, Verdict>;

fn run_kernel_test(cx: &Context) -> Result<()> {
    let (collection, name): (String, String) = cx.args()?;
    // Some tests compare what they look at with TCP.
    Shell::new("ip").args(["link", "set", "lo", "up"]).run()?;
    let finished = series::run_program(cx, &collection, &name)?;
    let mut verdicts = series::verdicts(&finished.stdout);
    if verdicts.is_empty() {
        let passed = finished.code() == 0;
        let verdict = if passed { Verdict::Ok } else { Verdict::NotOk };
        verdicts.insert("(all)".into(), verdict);
    }
    cx.reply(&verdicts)
}

fn boot(cx: &Context, kernel: Kernel) -> Result<Machine> {
    let image = cx.paths.kernel(kernel)?;
    Machine::boot(&Uml::new(image), &cx.paths, &format!("compare-{kernel}"))
}

fn verdicts_of(machine: &mut Machine, program: (&str, &str)) -> Result<Verdicts> {
    machine.run_step("run_kernel_test", &program)
}

fn all_on(machine: &mut Machine) -> Result<BTreeMap<&'static str, Verdicts>> {
    let results = programs().map(|program| {
        let verdicts = verdicts_of(machine, program)?;
        Ok((program.1, verdicts))
    });
    results.collect()
}

/// The tests that did worse the second time.
fn worse(before: &Verdicts, after: &Verdicts) -> Vec<String> {
    let did_worse = |test: &str, verdict| after.get(test).is_none_or(|now| now < verdict);
    let tests = before
        .iter()
        .filter(|(test, verdict)| did_worse(test, verdict));
    tests.map(|(test, _)| test.clone()).collect()
}

/// In how many runs each of these tests did at least as well as it did at first without the series.
fn runs_as_good(
    machine: &mut Machine,
    program: (&str, &str),
    (tests, first): (&[String], &Verdicts),
) -> Result<Vec<u32>> {
    let mut runs = vec![0; tests.len()];
    for _ in 0..REPEATS {
        let verdicts = verdicts_of(machine, program)?;
        for (count, test) in runs.iter_mut().zip(tests) {
            *count += u32::from(verdicts.get(test) >= first.get(test));
        }
    }
    Ok(runs)
}

/// Whether a test that did well in so many runs without the series, and in so many with it, does worse.
fn is_worse(without: u32, with: u32) -> bool {
    with * 2 < without
}

fn count(verdicts: &Verdicts, wanted: Verdict) -> usize {
    verdicts.values().filter(|one| **one == wanted).count()
}

fn no_test_of_the_kernel_does_worse_with_the_series(cx: &Context) -> Result<()> {
    let mut without = boot(cx, Kernel::UmlBase)?;
    let mut with = boot(cx, Kernel::Uml)?;
    let before = all_on(&mut without)?;
    let after = all_on(&mut with)?;
    let mut found = Vec::new();
    for program in programs() {
        let name = program.1;
        let (before, after) = (&before[name], &after[name]);
        ensure!(!before.is_empty(), "{name} has no results");
        let told = |verdicts: &Verdicts| {
            format!(
                "{} ok, {} not ok, {} skipped",
                count(verdicts, Verdict::Ok),
                count(verdicts, Verdict::NotOk),
                count(verdicts, Verdict::Skipped)
            )
        };
        line(&format!(
            "{name}: without {}; with {}",
            told(before),
            told(after)
        ));
        let tests = worse(before, after);
        if tests.is_empty() {
            continue;
        }
        let suspects = (&tests[..], before);
        let good_without = runs_as_good(&mut without, program, suspects)?;
        let good_with = runs_as_good(&mut with, program, suspects)?;
        for ((test, without), with) in tests.iter().zip(good_without).zip(good_with) {
            let again = format!(
                "{name}: {test}: of {REPEATS} more runs {without} as good without, {with} with"
            );
            line(&again);
            if is_worse(without, with) {
                found.push(again);
            }
        }
    }
    without.power_off();
    with.power_off();
    ensure!(found.is_empty(), "worse with the series: {found:?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(all: &[(&str, Verdict)]) -> Verdicts {
        let all = all
            .iter()
            .map(|(test, verdict)| ((*test).to_owned(), *verdict));
        all.collect()
    }

    #[test]
    fn what_fails_is_skipped_or_is_gone_did_worse() {
        use Verdict::{NotOk, Ok, Skipped};
        let before = verdicts(&[
            ("a", Ok),
            ("b", Ok),
            ("c", Skipped),
            ("d", Ok),
            ("e", NotOk),
        ]);
        let after = verdicts(&[("a", Ok), ("b", Skipped), ("c", NotOk), ("e", Ok)]);
        assert_eq!(worse(&before, &after), ["b", "c", "d"]);
        assert!(worse(&before, &before).is_empty());
    }

    #[test]
    fn a_test_that_fails_now_and_then_everywhere_is_not_worse() {
        assert!(is_worse(REPEATS, 0) && is_worse(REPEATS, REPEATS / 2 - 1));
        assert!(!is_worse(REPEATS, REPEATS - 1) && !is_worse(3, 2) && !is_worse(0, 0));
    }
}
