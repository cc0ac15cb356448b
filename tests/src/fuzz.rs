//! `cargo lab fuzz`: runs the fuzz targets of `tests/fuzz` with libFuzzer, which the stable toolchain can do: what it needs
//! of the code is a pass of LLVM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::cargo::{cargo, target_dir};
use crate::packages::{self, Purpose};
use crate::progress;
use crate::report::line;

/// The targets, as `tests/fuzz` has them.
pub const TARGETS: [&str; 7] = [
    "vring", "messages", "inflight", "config", "admin", "registry", "ring",
];

/// Where they are built for, so that build scripts and macros stay as they are.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Flags of the compiler: counters for each edge, and the operands of comparisons.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// How long a build may take.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// The arguments of `cargo lab fuzz`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Which; all of them, one after the other, if none is named
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
    /// Run each for so many minutes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: u64,
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
}

/// Runs the command; fails if a target finds something.
pub fn run(repo: &Path, arguments: &Arguments) -> Result<ExitCode> {
    packages::ensure(&[Purpose::ServerBuild, Purpose::Fuzz], arguments.yes)?;
    let programs = build(repo)?;
    let all = TARGETS.map(str::to_owned);
    let named = match arguments.targets.is_empty() {
        true => &all[..],
        false => &arguments.targets[..],
    };
    let mut found = Vec::new();
    for name in named {
        let fuzzer = Fuzzer::new(repo, &programs, name)?;
        line(
            &match fuzzer.run(Duration::from_secs(60 * arguments.minutes)) {
                Ok(done) => format!("{name}: {done}"),
                Err(error) => {
                    found.push(name.as_str());
                    format!("{name}: {error:#}")
                }
            },
        );
    }
    if found.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    line(&format!("something was found: {}", found.join(", ")));
    Ok(ExitCode::FAILURE)
}

/// Builds the programs; the folder that they are in.
pub fn build(repo: &Path) -> Result<PathBuf> {
    let target = target_dir()?.join("fuzz");
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    let mut build = cargo(repo);
    build
        .args(["build", "--locked", "-p", "fuzz", "--bins"])
        .args(["--features", "libfuzzer", "--profile", "fuzz"])
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", FLAGS);
    let log = target.join("lab-build-fuzz.log");
    progress::run("building the fuzz targets", build, &log, BUILD_LIMIT)?;
    Ok(target.join(TRIPLE).join("fuzz"))
}

/// A target and its folders.
pub struct Fuzzer {
    program: PathBuf,
    /// What is in the repository.
    committed: PathBuf,
    /// What earlier runs have added.
    grown: PathBuf,
    /// What it found.
    findings: PathBuf,
}

impl Fuzzer {
    /// The target `name`, whose program is in the folder `programs`.
    pub fn new(repo: &Path, programs: &Path, name: &str) -> Result<Self> {
        let kept = target_dir()?.join("fuzz").join(name);
        let fuzzer = Self {
            program: programs.join(name),
            committed: repo.join("tests/fuzz/corpus").join(name),
            grown: kept.join("corpus"),
            findings: kept.join("found"),
        };
        for folder in [&fuzzer.grown, &fuzzer.findings] {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
        }
        Ok(fuzzer)
    }

    /// Runs it for so long; what it did.
    ///
    /// # Errors
    ///
    /// Says which input makes the target fail, and how.
    pub fn run(&self, time: Duration) -> Result<String> {
        let log = self.findings.with_file_name("log");
        let file =
            fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let status = Command::new(&self.program)
            .arg(&self.grown)
            .arg(&self.committed)
            .arg(format!("-artifact_prefix={}/", self.findings.display()))
            .arg(format!("-max_total_time={}", time.as_secs()))
            // In seconds; an input takes less than a thousandth.
            .args(["-timeout=20", "-max_len=1024", "-rss_limit_mb=1024"])
            .args(["-print_final_stats=1", "-verbosity=0"])
            .env("TMPDIR", "/dev/shm")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .status()
            .with_context(|| format!("cannot run {}", self.program.display()))?;
        let said = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let said = String::from_utf8_lossy(&said);
        if !status.success() {
            let program = self.program.display();
            bail!(
                "{}\nthe input is in {}; `{program} INPUT` runs it again",
                testkit::shell::last_lines(&said, 30),
                self.findings.display(),
            );
        }
        let executed = executed(&said).context("libFuzzer did not say how much it did")?;
        ensure!(executed > 0, "no input was run");
        Ok(format!("{executed} executions, nothing found"))
    }
}

/// How many inputs libFuzzer says that it ran.
fn executed(said: &str) -> Option<u64> {
    let number = |line: &str| {
        let rest = line.strip_prefix("stat::number_of_executed_units:")?;
        rest.trim().parse().ok()
    };
    said.lines().find_map(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targets_are_those_that_there_are() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let entries = fs::read_dir(corpora).expect("corpora");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            let name = entry.expect("a folder").file_name();
            name.into_string().expect("text")
        };
        let mut found: Vec<String> = entries.map(name).collect();
        found.sort();
        let mut known = TARGETS.map(str::to_owned);
        known.sort();
        assert_eq!(found, known);
    }

    #[test]
    fn the_number_of_executions_is_found_in_what_libfuzzer_says() {
        let said = "Done 12 runs in 1 second(s)\nstat::number_of_executed_units: 12\n\
            stat::average_exec_per_sec:     12\n";
        assert_eq!(executed(said), Some(12));
        assert_eq!(executed("ERROR: libFuzzer: deadly signal"), None);
    }
}
