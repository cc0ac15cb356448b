//! The kernel's own tests of what the series touches, on a kernel with it and on one without.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::series::{self, Verdict};
use crate::kernel::Kernel;
use crate::machine::{Machine, Uml};
use crate::report::line;
use crate::test;
use crate::test::{Context, Test};

/// The comparison.
pub const TESTS: &[Test] = &[test!(no_test_of_the_kernel_does_worse_with_the_series).limit_s(3000)];

/// What the machines do.
pub const STEPS: &[Test] = &[test!(run_kernel_test).limit_s(400)];

/// Programs that were there before the series. Not all speak TAP; of the others the exit status counts.
const PROGRAMS: &[(&str, &str)] = &[
    ("net/af_unix", "diag_uid"),
    ("net/af_unix", "msg_oob"),
    ("net/af_unix", "scm_inq"),
    ("net/af_unix", "scm_pidfd"),
    ("net/af_unix", "scm_rights"),
    ("net/af_unix", "so_peek_off"),
    ("net/af_unix", "unix_connect"),
    ("net/af_unix", "unix_connreset"),
    ("net/af_unix", "unix_listen"),
    ("landlock", "base_test"),
    ("landlock", "fs_test"),
    ("landlock", "net_test"),
    ("landlock", "ptrace_test"),
    ("landlock", "scoped_abstract_unix_test"),
    ("landlock", "scoped_signal_test"),
    ("landlock", "scoped_test"),
    ("landlock", "tsync_test"),
    ("splice", "default_file_splice_read.sh"),
    ("splice", "short_splice_read.sh"),
    ("filesystems/epoll", "epoll_wakeup_test"),
    ("futex/functional", "futex_priv_hash"),
    ("futex/functional", "futex_requeue"),
    ("futex/functional", "futex_wait"),
    ("futex/functional", "futex_wait_private_mapped_file"),
    ("futex/functional", "futex_wait_timeout"),
    ("futex/functional", "futex_wait_wouldblock"),
    ("futex/functional", "futex_waitv"),
    ("futex/functional", "robust_list"),
    ("mm", "madv_populate"),
    ("mm", "map_populate"),
    ("mm", "merge"),
    ("mm", "mlock2-tests"),
    ("mm", "mremap_test"),
    ("mm", "mseal_test"),
    ("pipe", "pipe_bench"),
];

#[derive(Serialize, Deserialize)]
struct Program {
    collection: String,
    name: String,
}

type Verdicts = BTreeMap<String, Verdict>;

fn run_kernel_test(cx: &Context) -> Result<()> {
    let program: Program = cx.args()?;
    let finished = series::run_program(cx, &program.collection, &program.name)?;
    let mut verdicts = series::verdicts(&finished.stdout);
    if verdicts.is_empty() {
        let passed = finished.code() == 0;
        let verdict = if passed { Verdict::Ok } else { Verdict::NotOk };
        verdicts.insert("(all)".into(), verdict);
    }
    cx.reply(&verdicts)
}

fn all_on(cx: &Context, kernel: Kernel) -> Result<BTreeMap<&'static str, Verdicts>> {
    let image = cx.paths.kernel(kernel)?;
    let mut machine = Machine::boot(&Uml::new(image), &cx.paths, &format!("compare-{kernel}"))?;
    let mut all = BTreeMap::new();
    for &(collection, name) in PROGRAMS {
        let program = Program {
            collection: collection.into(),
            name: name.into(),
        };
        let verdicts = machine.run_step(&cx.paths, "run_kernel_test", &program)?;
        all.insert(name, verdicts);
    }
    machine.power_off();
    Ok(all)
}

fn count(verdicts: &Verdicts, wanted: Verdict) -> usize {
    verdicts.values().filter(|one| **one == wanted).count()
}

fn no_test_of_the_kernel_does_worse_with_the_series(cx: &Context) -> Result<()> {
    let before = all_on(cx, Kernel::UmlBase)?;
    let after = all_on(cx, Kernel::Uml)?;
    let mut worse = Vec::new();
    for (program, before) in &before {
        ensure!(!before.is_empty(), "{program} has no results");
        let after = &after[program];
        for (test, verdict) in before {
            if after.get(test).is_none_or(|now| now < verdict) {
                worse.push(format!("{program}: {test}"));
            }
        }
        let told = |verdicts: &Verdicts| {
            format!(
                "{} ok, {} not ok, {} skipped",
                count(verdicts, Verdict::Ok),
                count(verdicts, Verdict::NotOk),
                count(verdicts, Verdict::Skipped)
            )
        };
        line(&format!(
            "{program}: without {}; with {}",
            told(before),
            told(after)
        ));
    }
    ensure!(worse.is_empty(), "worse with the series: {worse:?}");
    Ok(())
}
