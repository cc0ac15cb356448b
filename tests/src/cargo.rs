//! cargo, for what the lab does not run itself: the server's build and the
//! unit tests of the workspace.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testkit::shell::{COMPLETE, last_lines};

use crate::progress;
use crate::report::{Outcome, TestResult, Totals, line, show};

const HOUR: Duration = Duration::from_secs(3600);

/// cargo as it was called, or from the search path.
pub fn cargo(repo: &Path) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(repo);
    for (name, _) in std::env::vars_os() {
        // What `cargo run` tells this process about itself is not for others.
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            cargo.env_remove(&name);
        }
    }
    cargo
}

/// The target directory this binary is in.
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot find the lab's own binary")?;
    exe.ancestors()
        .nth(2)
        .map(Path::to_owned)
        .context("the lab's binary is not in a target directory")
}

/// A release build of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// As it is used.
    Product,
    /// With its test equipment: storage that fails on request, crash points.
    Testing,
}

/// Where a build of the server is put. Cargo has one place for all of them.
pub fn server_binary(build: Build) -> Result<PathBuf> {
    let folder = match build {
        Build::Product => "lab/product",
        Build::Testing => "lab/testing",
    };
    Ok(target_dir()?.join(folder).join("ublkup"))
}

/// Builds the server; where it is.
pub fn build_server(repo: &Path, build: Build) -> Result<PathBuf> {
    let features: &[&str] = match build {
        Build::Product => &[],
        Build::Testing => &["--features", "testing"],
    };
    let built = build_server_of(repo, &target_dir()?, Profile::Release, features)?;
    let binary = server_binary(build)?;
    let folder = binary.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // Renamed into its place: an older one may be running.
    let new = binary.with_extension("new");
    fs::copy(&built, &new)
        .and_then(|_| fs::rename(&new, &binary))
        .with_context(|| format!("cannot write {}", binary.display()))?;
    Ok(binary)
}

/// Builds the product and looks whether it has test equipment. Its optimised build would replace the program that
/// guests' tests run.
pub fn check_product(repo: &Path) -> Result<TestResult> {
    let started = Instant::now();
    let target = target_dir()?;
    let product = build_server_of(repo, &target, Profile::Dev, &[])?;
    let program = fs::read(&product)?;
    let has = |text: &str| {
        program
            .windows(text.len())
            .any(|part| part == text.as_bytes())
    };
    let serve = Command::new(&product)
        .args(["serve", "fault:read=eio;mem:1M"])
        .stdin(Stdio::null())
        .output()?;
    let refusal = String::from_utf8_lossy(&serve.stderr);
    let outcome = if has("UBLKUP_TEST_CRASH") || has("fault injection is on") {
        Outcome::fail("its test equipment is compiled in")
    } else if serve.status.code() != Some(2) || !refusal.contains("no storage is called 'fault'") {
        Outcome::fail(format!("it does not refuse 'fault:': {refusal}"))
    } else {
        Outcome::Pass
    };
    Ok(TestResult::new(
        "product_has_no_test_equipment",
        outcome,
        started.elapsed(),
    ))
}

/// How a program is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Quickly.
    Dev,
    /// For speed.
    Release,
}

/// Builds the server of a checkout in a target directory; where it is.
pub fn build_server_of(
    repo: &Path,
    target: &Path,
    profile: Profile,
    features: &[&str],
) -> Result<PathBuf> {
    let (profile, folder) = match profile {
        Profile::Dev => ("dev", "debug"),
        Profile::Release => ("release", "release"),
    };
    fs::create_dir_all(target).with_context(|| format!("cannot create {}", target.display()))?;
    let log = target.join("lab-build-server.log");
    let mut build = cargo(repo);
    build
        .args([
            "build",
            "--profile",
            profile,
            "--locked",
            "-p",
            "ublkup",
            "--target-dir",
        ])
        .arg(target)
        .args(features);
    if folder == "release" {
        // It makes other code, and what is measured is the program as it is packaged.
        build.env("CARGO_INCREMENTAL", "0");
    }
    progress::run("building the server", build, &log, HOUR)?;
    let server = target.join(folder).join("ublkup");
    if !server.exists() {
        bail!("cargo built no {}", server.display());
    }
    Ok(server)
}

/// Test programs with tests that need more than a build machine has: a ublk driver, loop devices, a
/// scratch disk, root, a Ceph cluster. Those are `#[ignore]`d in `cargo test`; guests and the suite `ceph` run them.
pub const DRIVER_TESTS: [&str; 5] = ["ublk", "block", "registry", "file", "rbd"];

/// Test programs that guests run once more, with what only their kernels have.
const REPEATED_TESTS: [&str; 5] = [
    "ring",
    "ring_hostile",
    "ring_processes",
    "ring_steady",
    "sandbox",
];

/// Programs that guests run beside those.
const DRIVER_EXAMPLES: [&str; 1] = ["ublkup-pipe"];

/// Builds the test programs that guests run; where they are.
pub fn build_driver_tests(repo: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let target = target_dir()?;
    let log = target.join("lab-build-driver-tests.log");
    let mut build = cargo(repo);
    build.args(["test", "--release", "--locked", "--no-run"]);
    build.args(["-p", "ublkup", "-p", "upgrade-proto", "-p", "fd-ring"]);
    let names = || DRIVER_TESTS.iter().chain(&REPEATED_TESTS);
    for name in names() {
        build.args(["--test", name]);
    }
    build
        .args(["--message-format", "json-render-diagnostics"])
        .arg("--target-dir")
        .arg(&target);
    progress::run("building the tests for guests", build, &log, HOUR)?;
    let output = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let output = String::from_utf8_lossy(&output);
    let mut programs: BTreeMap<String, PathBuf> = names()
        .map(|name| {
            let program = executable(&output, name).with_context(|| {
                format!("cargo named no test program {name} in {}", log.display())
            })?;
            Ok(((*name).to_owned(), program))
        })
        .collect::<Result<_>>()?;
    // Not with the tests: cargo would make test programs of them.
    let mut build = cargo(repo);
    build.args(["build", "--release", "--locked", "-p", "fd-ring"]);
    for name in DRIVER_EXAMPLES {
        build.args(["--example", name]);
    }
    build.arg("--target-dir").arg(&target);
    progress::run("building programs for guests", build, &log, HOUR)?;
    for name in DRIVER_EXAMPLES {
        programs.insert(name.to_owned(), target.join("release/examples").join(name));
    }
    Ok(programs)
}

/// The executable of the target `name` in cargo's messages.
fn executable(output: &str, name: &str) -> Option<PathBuf> {
    output
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| Some(message["executable"].as_str()?.into()))
}

/// Runs `cargo test --workspace`: how many tests there were, and a failure of
/// its own if cargo failed without one.
pub fn test_workspace(repo: &Path) -> Result<(Totals, Option<TestResult>)> {
    let target = target_dir()?;
    let log = target.join("lab-cargo-test.log");
    let started = Instant::now();
    let mut test = cargo(repo);
    test.args([
        "test",
        "--workspace",
        "--locked",
        "--no-fail-fast",
        "--target-dir",
    ])
    .arg(&target)
    .env(COMPLETE, "1")
    .stdin(Stdio::null());
    let ran = progress::run("cargo test --workspace", test, &log, HOUR);
    let output = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let output = String::from_utf8_lossy(&output);
    let totals = count(&output);
    let ignored = ignored(&output);
    let forgotten: Vec<&str> = ignored
        .iter()
        .filter(|test| !DRIVER_TESTS.contains(&test.program))
        .map(|test| test.name)
        .collect();
    let complaint = match &ran {
        Err(_) if totals.failed > 0 => None,
        Err(error) => Some(format!("{error:#}")),
        Ok(()) if !forgotten.is_empty() => Some(format!(
            "no suite runs these ignored tests: {}",
            forgotten.join(", ")
        )),
        Ok(()) if totals.failed > 0 => Some("cargo succeeded, but tests failed".to_owned()),
        Ok(()) if totals.passed == 0 => Some("cargo ran no test".to_owned()),
        Ok(()) => None,
    };
    for test in &ignored {
        line(&format!("skip host: {}: {}", test.name, test.reason));
    }
    if totals.failed > 0 {
        eprintln!("{}", failures(&output));
    }
    let verdict = complaint.map(|why| {
        let outcome = Outcome::fail(format!("{why}\nall of it is in {}", log.display()));
        let result = TestResult::new("cargo test", outcome, started.elapsed());
        show("host", &result);
        result
    });
    Ok((totals, verdict))
}

/// Adds up the `test result:` lines.
fn count(output: &str) -> Totals {
    let mut totals = Totals::default();
    for summary in output
        .lines()
        .filter_map(|line| line.trim().strip_prefix("test result: "))
    {
        for part in summary.split([';', '.']) {
            let mut words = part.split_whitespace();
            let Some(Ok(number)) = words.next().map(str::parse::<u64>) else {
                continue;
            };
            match words.next() {
                Some("passed") => totals.passed += number,
                Some("failed") => totals.failed += number,
                Some("ignored") => totals.skipped += number,
                _ => {}
            }
        }
    }
    totals
}

/// An ignored test in cargo's output.
#[derive(Debug, PartialEq, Eq)]
struct Ignored<'a> {
    /// The file that the test program is made of, without its folder and ending.
    program: &'a str,
    name: &'a str,
    reason: &'a str,
}

fn ignored(output: &str) -> Vec<Ignored<'_>> {
    let mut program = "";
    let mut found = Vec::new();
    for line in output.lines() {
        let heading = line.trim_start();
        if let Some(rest) = heading.strip_prefix("Running ") {
            let file = rest.split(" (").next().unwrap_or(rest);
            program = Path::new(file)
                .file_stem()
                .and_then(|stem| stem.to_str())
                .unwrap_or("");
            if !file.starts_with("tests/") {
                program = "";
            }
        } else if heading.starts_with("Doc-tests ") {
            program = "";
        } else if let Some((name, rest)) = line
            .strip_prefix("test ")
            .and_then(|line| line.split_once(" ... ignored"))
        {
            let reason = rest.strip_prefix(", ").unwrap_or("no reason given");
            found.push(Ignored {
                program,
                name,
                reason,
            });
        }
    }
    found
}

/// The parts of the output that explain failures.
fn failures(output: &str) -> String {
    let mut text = String::new();
    let mut inside = false;
    for line in output.lines() {
        if line == "failures:" {
            inside = true;
        } else if line.starts_with("test result:") {
            inside = false;
        }
        if inside {
            text.push_str(line);
            text.push('\n');
        }
    }
    if text.is_empty() {
        last_lines(output, 40)
    } else {
        last_lines(&text, 120)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_found_among_other_messages() {
        let output = r#"   Compiling x
{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"ublk"},"executable":"/t/ublk-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(output, "ublk"), Some("/t/ublk-1".into()));
        assert_eq!(executable(output, "libc"), None);
    }

    const RECORDED: &str = "\
     Running tests/ublk.rs (target/debug/deps/ublk-0123456789abcdef)
running 3 tests
test a ... ok
test b ... FAILED
test c ... ignored
test d::e ... ignored, needs a kernel with ublk

failures:

---- b stdout ----
thread 'b' panicked at src/lib.rs:1:1:
the reason

failures:
    b

test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s

   Doc-tests lab
test src/lib.rs - e (line 3) ... ignored
test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.31s
";

    #[test]
    fn all_summaries_are_added_up() {
        let expected = Totals {
            passed: 5,
            failed: 1,
            skipped: 2,
        };
        assert_eq!(count(RECORDED), expected);
        assert_eq!(count("error: could not compile\n"), Totals::default());
    }

    #[test]
    fn every_skip_has_its_program_and_its_reason() {
        let expected = [
            ("ublk", "c", "no reason given"),
            ("ublk", "d::e", "needs a kernel with ublk"),
            ("", "src/lib.rs - e (line 3)", "no reason given"),
        ]
        .map(|(program, name, reason)| Ignored {
            program,
            name,
            reason,
        });
        assert_eq!(ignored(RECORDED), expected);
    }

    #[test]
    fn the_reason_of_a_failure_is_shown() {
        let text = failures(RECORDED);
        assert!(text.contains("the reason") && !text.contains("running 3"));
    }
}
