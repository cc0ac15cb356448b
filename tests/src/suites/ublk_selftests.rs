//! The kernel's own ublk tests (`tools/testing/selftests/ublk`, of the same source as the kernel),
//! unchanged, with ublkup in the place of their server (see [`crate::kublk`]).
//!
//! `docs/ublk-selftests.md` has a row for each script: what is expected of it. The table is part of
//! the test. A script without a row, a row without a script, and a script that does otherwise fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use rustix::process::{Pid, Signal, kill_process};
use testkit::shell::{Finished, Shell, last_lines, sh};
use testkit::ublk_control::Control;
use testkit::wait::until;

use super::block::LoopMount;
use super::series;
use crate::kublk::{self, Sabotage};
use crate::report::line;
use crate::test;
use crate::test::{Context, Test};

/// Inside User Mode Linux.
pub const TESTS: &[Test] = &[
    test!(every_script_of_the_kernel_has_a_row_in_the_table),
    test!(the_short_scripts_pass, |cx| pass(cx, Expected::Passes)).limit_s(300),
    test!(the_scripts_that_load_and_recover_pass, |cx| {
        pass(cx, Expected::PassesSlowly)
    })
    .limit_s(2400)
    .full(),
    test!(a_server_that_is_broken_is_noticed)
        .limit_s(900)
        .full(),
];

/// Where what is expected stands.
const TABLE: &str = "docs/ublk-selftests.md";

/// Below the directory of the kernel's test programs.
const COLLECTION: &str = "ublk";

/// What is expected of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// It passes.
    Passes,
    /// It passes, and takes long.
    PassesSlowly,
    /// It is not run; the table says why.
    NotApplicable,
}

/// The rows of the table: ``| `generic_02` | passes | … |``.
fn expectations(text: &str) -> Result<BTreeMap<String, Expected>> {
    let mut rows = BTreeMap::new();
    // Another table before it has no scripts.
    let scripts = text.split("\n## The scripts\n").nth(1);
    let scripts = scripts.with_context(|| format!("{TABLE} has no list of scripts"))?;
    for row in scripts.lines().filter_map(|line| line.strip_prefix("| `")) {
        let mut cells = row.split('|').map(str::trim);
        let name = cells.next().unwrap_or_default().trim_matches('`');
        let expected = match cells.next() {
            Some("passes") => Expected::Passes,
            Some("passes, `--full`") => Expected::PassesSlowly,
            Some("not applicable") => Expected::NotApplicable,
            other => bail!("{TABLE}: {name}: {other:?} is no expectation"),
        };
        let why = cells.next().unwrap_or_default();
        ensure!(!why.is_empty(), "{TABLE}: {name} has no explanation");
        let twice = rows.insert(name.to_owned(), expected).is_some();
        ensure!(!twice, "{TABLE}: {name} has two rows");
    }
    Ok(rows)
}

fn table(cx: &Context) -> Result<BTreeMap<String, Expected>> {
    let path = cx.paths.repo.join(TABLE);
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {TABLE}"))?;
    expectations(&text)
}

/// The names between `test_` and `.sh` of the scripts in a directory.
fn scripts(dir: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let name = name
            .strip_prefix("test_")
            .and_then(|name| name.strip_suffix(".sh"));
        names.extend(name.filter(|name| *name != "common").map(str::to_owned));
    }
    Ok(names)
}

fn every_script_of_the_kernel_has_a_row_in_the_table(cx: &Context) -> Result<()> {
    let there = scripts(&series::copy_of(cx, COLLECTION)?)?;
    let known: BTreeSet<String> = table(cx)?.into_keys().collect();
    ensure!(there.len() > 40, "only these scripts were found: {there:?}");
    let without_row: Vec<_> = there.difference(&known).collect();
    let without_script: Vec<_> = known.difference(&there).collect();
    ensure!(
        without_row.is_empty() && without_script.is_empty(),
        "{TABLE} is stale: no row for {without_row:?}, no script for {without_script:?}"
    );
    Ok(())
}

fn pass(cx: &Context, expected: Expected) -> Result<()> {
    let bench = Bench::set_up(cx)?;
    let rows = table(cx)?;
    let chosen = rows.iter().filter(|(_, one)| **one == expected);
    let mut failed = Vec::new();
    let mut count = 0;
    for (name, _) in chosen {
        count += 1;
        let started = Instant::now();
        let result = bench.run(cx, name);
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        line(&format!(
            "{name}: {word}, {} s",
            started.elapsed().as_secs()
        ));
        if let Err(error) = result {
            failed.push(format!("{name}: {error:#}"));
            bench.sweep()?;
        }
    }
    ensure!(count > 0, "{TABLE} expects no script to pass here");
    ensure!(
        failed.is_empty(),
        "{} of {count} scripts failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
    Ok(())
}

/// Ways to be broken and a script that is to notice each.
const NOTICED: [(Sabotage, &str); 6] = [
    (Sabotage::ForgetsData, "loop_01"),
    (Sabotage::ForgetsData, "part_01"),
    (Sabotage::KeepsSize, "generic_10"),
    (Sabotage::LooksForPartitions, "part_01"),
    (Sabotage::StopsInUse, "generic_16"),
    // The script itself ends with 0: its checks are in the background.
    (Sabotage::DoesNotRecover, "recover_04"),
];

fn a_server_that_is_broken_is_noticed(cx: &Context) -> Result<()> {
    let mut bench = Bench::set_up(cx)?;
    let mut unnoticed = Vec::new();
    for (sabotage, script) in NOTICED {
        bench.sabotage = Some(sabotage);
        match bench.run(cx, script) {
            Ok(()) => unnoticed.push(format!("{script}: {sabotage:?}")),
            Err(error) => {
                let said = format!("{error:#}");
                let said = said.lines().next().unwrap_or_default();
                line(&format!("{script} notices {sabotage:?}: {said}"));
            }
        }
        bench.sweep()?;
    }
    ensure!(
        unnoticed.is_empty(),
        "not noticed: {}",
        unnoticed.join(", ")
    );
    Ok(())
}

/// The scripts, the program that they take for kublk, and a file system that takes direct I/O.
struct Bench {
    scripts: PathBuf,
    programs: PathBuf,
    state: PathBuf,
    files: LoopMount,
    sabotage: Option<Sabotage>,
}

impl Bench {
    fn set_up(cx: &Context) -> Result<Self> {
        let scripts = series::copy_of(cx, COLLECTION)?;
        let (programs, state) = (cx.scratch().join("programs"), cx.scratch().join("state"));
        fs::create_dir(&programs)?;
        fs::create_dir(&state)?;
        // The guest's own copy has no name any more.
        let lab = programs.join("lab");
        fs::copy("/proc/self/exe", &lab).context("cannot copy the lab")?;
        let kublk = format!(
            "#!/bin/sh\nexec {} {} \"$@\"\n",
            lab.display(),
            kublk::SUBCOMMAND
        );
        program(&scripts.join("kublk"), &kublk)?;
        program(&programs.join("udevadm"), UDEVADM)?;
        Ok(Self {
            scripts,
            programs,
            state,
            files: LoopMount::ext4(cx, 1 << 30)?,
            sabotage: None,
        })
    }

    /// Runs a script, which must pass, have no part that failed or was skipped without changing the
    /// script's exit code, and leave nothing.
    fn run(&self, cx: &Context, name: &str) -> Result<()> {
        let script = self.scripts.join(format!("test_{name}.sh"));
        let path = std::env::var("PATH").unwrap_or_default();
        let finished = Shell::new("bash")
            .arg(&script)
            .dir(&self.scripts)
            .env("PATH", format!("{}:{path}", self.programs.display()))
            .env("TMPDIR", &self.files.dir)
            .env(kublk::SERVER, &cx.paths.server)
            .env(kublk::STATE, &self.state)
            .env(kublk::SABOTAGE, self.sabotage.map_or("", Sabotage::word))
            .limit(cx.patience(280))
            .finish()?;
        // A fio that comes too late for its disk makes a file of that name, in the way of the next.
        sh("for node in /dev/ublkb*; do test -f $node && rm $node || :; done").run()?;
        judge(&finished)?;
        let devices = sh("ls -d /sys/class/ublk-char/* /sys/block/ublkb* || :").run()?;
        ensure!(devices.is_empty(), "devices are left: {devices}");
        Ok(())
    }

    /// Removes what a failed script left, so that the next one is judged by what it does itself.
    fn sweep(&self) -> Result<()> {
        kill_all(&["fio", "dd", "ublkup"])?;
        let control = Control::open()?;
        for entry in fs::read_dir("/dev")? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_prefix("ublkc"));
            if let Some(id) = id.and_then(|id| id.parse().ok()) {
                // It may be gone by the end of its server.
                let _is_stopped = control.stop(id);
                let _is_gone = control.delete(id);
            }
        }
        for dir in [&self.files.dir, &self.state] {
            sh(&format!("rm -rf {}/*", dir.display())).run()?;
        }
        Ok(())
    }
}

/// Kills what bears one of these names in this guest, and waits for its end.
fn kill_all(names: &[&str]) -> Result<()> {
    let what = format!("{names:?} end");
    until(&what, Duration::from_secs(30), || {
        let mut left = 0;
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let comm = fs::read_to_string(path.join("comm")).unwrap_or_default();
            let pid = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            let Some(pid) = pid.and_then(Pid::from_raw) else {
                continue;
            };
            if names.contains(&comm.trim()) && !is_zombie(&path) {
                left += 1;
                // It may have ended by itself.
                let _gone = kill_process(pid, Signal::KILL);
            }
        }
        Ok(left == 0)
    })
}

fn is_zombie(proc: &Path) -> bool {
    let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with('Z'))
}

/// There is no udev in the guest; what its events would be about is done when the kernel's list of
/// partitions does not change any more.
const UDEVADM: &str = "#!/bin/sh
for _ in $(seq 50); do
    now=$(cat /proc/partitions)
    [ \"$now\" = \"$before\" ] && exit 0
    before=$now
    sleep 0.1
done
exit 1
";

fn program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The exit code, and what the scripts print in the background, where their exit code gets lost.
fn judge(finished: &Finished) -> Result<()> {
    let said = format!("{}\n{}", finished.stdout, finished.stderr);
    let complaint = said.lines().find(|line| is_complaint(line));
    if let Some(complaint) = complaint {
        bail!("it says \"{complaint}\":\n{}", last_lines(&said, 12));
    }
    ensure!(
        finished.code() == 0,
        "it ended with {}:\n{}",
        finished.code(),
        last_lines(&said, 12)
    );
    ensure!(
        said.contains("[PASS]"),
        "it does not say that it passed:\n{said}"
    );
    Ok(())
}

fn is_complaint(line: &str) -> bool {
    const COMPLAINTS: [&str; 8] = [
        "[FAIL]",
        "[SKIP]",
        " failure: ",
        "FAIL: ",
        "delete dev ",
        "isn't removed",
        "isn't quiesced",
        "faile to recover",
    ];
    line.starts_with("kublk ")
        || line.contains("/kublk: ")
        || COMPLAINTS.iter().any(|text| line.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read() {
        let rows = expectations(
            "| `-t` | x | y |\n## The scripts\n| script | | |\n|---|---|---|\n| `a_01` | passes | all of it |\n\
             | `a_02` | not applicable | `b` |\n| `a_03` | passes, `--full` | c |\n",
        )
        .expect("rows");
        assert_eq!(rows["a_01"], Expected::Passes);
        assert_eq!(rows["a_02"], Expected::NotApplicable);
        assert_eq!(rows["a_03"], Expected::PassesSlowly);
    }

    #[test]
    fn rows_that_say_nothing_are_errors() {
        for text in [
            "| `a_01` | maybe | why |",
            "| `a_01` | passes |",
            "| `a_01` | passes | x |\n| `a_01` | passes | x |",
        ] {
            let text = format!("\n## The scripts\n{text}");
            assert!(expectations(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn failures_in_the_background_are_seen() {
        for line in [
            "recover_01 : [FAIL]",
            "recover_01 failure: -t null -q 2 -r 1",
            "delete dev 3 failed",
            "kublk del -n 3: DEL_DEV: No such device",
        ] {
            assert!(is_complaint(line), "{line}");
        }
        assert!(!is_complaint("recover_01 : [PASS]"));
    }
}
