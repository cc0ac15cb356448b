//! `cargo lab mutants`: breaks the server's code in one place at a time, with cargo-mutants, and asks
//! its tests whether they notice.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::cargo::target_dir;
use crate::packages::crates::CARGO_MUTANTS;
use crate::report::line;

/// What is broken: the vhost-user door with its in-flight record, who may write, and the file storage.
const FILES: [&str; 3] = [
    "server/src/door/vhost/**/*.rs",
    "server/src/door/ownership/**/*.rs",
    "server/src/storage/file/**/*.rs",
];

/// Mutants that are not made, each with a reason; also cargo-mutants' settings.
const CONFIG: &str = "tests/mutants.toml";

/// Seconds that the server's tests may take; they need about 150. A test that hangs has noticed.
const LIMIT_S: &str = "600";

/// Makes the mutants of `files` (of all of `FILES`, if none is named) and runs the server's tests with
/// each; `list` only prints them. The survivors are printed.
pub fn run(repo: &Path, files: &[String], list: bool) -> Result<ExitCode> {
    let program = CARGO_MUTANTS.program()?;
    let output = target_dir()?;
    let mut command = Command::new(program);
    command
        .arg("mutants")
        .arg("--dir")
        .arg(repo)
        .arg("--config")
        .arg(repo.join(CONFIG))
        // Its tests are the judge, those of `server/tests` and those beside the code.
        .args(["--package", "ublkup", "--test-package", "ublkup"])
        .args(["--timeout", LIMIT_S, "--build-timeout", LIMIT_S])
        .arg("--output")
        .arg(&output);
    let all = FILES.map(str::to_owned);
    for file in if files.is_empty() { &all[..] } else { files } {
        command.arg("--file").arg(file);
    }
    if list {
        command.arg("--list");
    }
    let status = command.status().context("cannot run cargo-mutants")?;
    // Its exit codes: 2 is "some were missed", 3 "some hung".
    match status.code() {
        Some(0) | Some(3) => Ok(ExitCode::SUCCESS),
        Some(2) => {
            let missed = output.join("mutants.out/missed.txt");
            let survivors = fs::read_to_string(&missed)
                .with_context(|| format!("cannot read {}", missed.display()))?;
            line(survivors.trim_end());
            let count = survivors.lines().count();
            line(&format!(
                "{count} survived: add a test for each, or a reason to {CONFIG}"
            ));
            Ok(ExitCode::FAILURE)
        }
        _ => bail!("cargo-mutants ended with {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_to_be_broken_are_where_they_are_looked_for() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for pattern in FILES {
            let dir = pattern.trim_end_matches("/**/*.rs");
            assert!(repo.join(dir).is_dir(), "{dir}");
        }
        assert!(repo.join("server/src/door/vhost/inflight.rs").exists());
        assert!(repo.join(CONFIG).exists());
    }
}
