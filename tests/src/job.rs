//! One test in a process of its own: started, limited, its end understood.
//!
//! The parent writes a [`Job`] to the child's standard input; the child runs
//! the body and leaves the result in a file. Whatever else happens to the child
//! (a signal, an exit, a hang) is that test's failure.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use testkit::process;
use testkit::shell::tail;

use crate::report::{Outcome, TestResult};
use crate::suites;
use crate::test::{Context, Paths, Place, Skip, Test};

/// The hidden subcommand that makes the lab a test's process.
pub const SUBCOMMAND: &str = "run-one-test";

/// How much of a test's output is carried along.
const OUTPUT_BYTES: u64 = 16 * 1024;

/// Everything a child process needs to run one test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// The table the test is in.
    pub suite: String,
    /// The test's name.
    pub test: String,
    /// Its arguments, for a step of a story.
    pub args: Value,
    /// Its time limit.
    pub limit_ms: u64,
    /// Where it runs.
    pub place: Place,
    /// Paths in the place it runs.
    pub paths: Paths,
    /// The directory shared with the process that asked.
    pub exchange: PathBuf,
}

impl Job {
    /// A job for a test of a suite at a place.
    pub fn new(suite: &str, test: &Test, place: Place, paths: &Paths, exchange: &Path) -> Self {
        Job {
            suite: suite.to_owned(),
            test: test.name.to_owned(),
            args: Value::Null,
            limit_ms: u64::try_from(test.limit_at(place).as_millis()).unwrap_or(u64::MAX),
            place,
            paths: paths.clone(),
            exchange: exchange.to_owned(),
        }
    }

    /// The time limit.
    pub fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms)
    }
}

/// What travels from parent to child.
#[derive(Serialize, Deserialize)]
struct Order {
    job: Job,
    scratch: PathBuf,
    result: PathBuf,
}

/// What travels back.
#[derive(Serialize, Deserialize)]
struct Answer {
    outcome: Outcome,
    reply: Value,
}

/// Runs a job in a child process and waits for its end, whatever that is.
pub fn run(job: &Job) -> TestResult {
    let started = Instant::now();
    let mut result = match run_child(job) {
        Ok(result) => result,
        Err(error) => {
            TestResult::not_run(&job.test, format!("the test could not be run: {error:#}"))
        }
    };
    result.duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    result
}

fn run_child(job: &Job) -> Result<TestResult> {
    let dir = tempfile::Builder::new()
        .prefix("lab-test-")
        .tempdir()
        .context("cannot make a temporary directory")?;
    let scratch = dir.path().join("scratch");
    let temporary = dir.path().join("tmp");
    for new in [&scratch, &temporary] {
        fs::create_dir(new).context("cannot make a scratch directory")?;
    }
    let order = Order {
        job: job.clone(),
        scratch,
        result: dir.path().join("result.json"),
    };
    let mut output = tempfile::tempfile().context("cannot make a temporary file")?;
    let mut stdin = tempfile::tempfile().context("cannot make a temporary file")?;
    serde_json::to_writer(&mut stdin, &order).context("cannot write a test's order")?;
    stdin.seek(SeekFrom::Start(0)).context("cannot rewind")?;

    let mut child = process::spawn_group(
        Command::new("/proc/self/exe")
            .arg(SUBCOMMAND)
            // What a killed test cannot remove goes with its directory.
            .env("TMPDIR", &temporary)
            .stdin(Stdio::from(stdin))
            .stdout(output.try_clone().context("cannot share a file")?)
            .stderr(output.try_clone().context("cannot share a file")?),
    )?;
    let status = process::wait_limited(&mut child, job.limit());
    // Also after an orderly end: what the test started ends with it.
    process::kill_group(&mut child);

    let mut result = TestResult::new(&job.test, Outcome::Pass, Duration::ZERO);
    result.output = tail(&mut output, OUTPUT_BYTES);
    let Some(status) = status? else {
        let seconds = job.limit().as_secs();
        result.outcome = Outcome::fail(format!("did not end within {seconds} s, was killed"));
        result.machine_is_suspect = true;
        return Ok(result);
    };
    let answer = fs::read(&order.result)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Answer>(&bytes).ok());
    match answer {
        Some(answer) if status.success() => {
            result.outcome = answer.outcome;
            result.reply = answer.reply;
        }
        _ => {
            result.outcome = Outcome::fail(format!(
                "its process ended with {status} and left no result"
            ));
        }
    }
    if let Err(error) = remove(dir) {
        result.spoil(&format!("its scratch directory is still in use: {error}"));
        result.machine_is_suspect = true;
    }
    Ok(result)
}

/// Removes a test's directory. Processes that were just killed may still hold
/// on to it for a moment.
fn remove(dir: tempfile::TempDir) -> std::io::Result<()> {
    let path = dir.keep();
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match fs::remove_dir_all(&path) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The child's side: reads the order from standard input, runs the test, writes
/// the answer.
pub fn child_main() -> Result<ExitCode> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("cannot read the order")?;
    let order: Order = serde_json::from_str(&text).context("cannot understand the order")?;
    let job = order.job;
    let test = suites::find(&job.suite, &job.test)
        .with_context(|| format!("no test {} in suite {}", job.test, job.suite))?;
    let cx = Context::new(job.place, job.paths, order.scratch, job.exchange, job.args);
    let outcome = run_body(test, &cx);
    let answer = Answer {
        outcome,
        reply: cx.take_reply(),
    };
    let bytes = serde_json::to_vec(&answer).context("cannot encode the answer")?;
    let partial = order.result.with_extension("partial");
    File::create(&partial)
        .and_then(|mut file| file.write_all(&bytes))
        .and_then(|()| fs::rename(&partial, &order.result))
        .context("cannot write the answer")?;
    Ok(ExitCode::SUCCESS)
}

fn run_body(test: &Test, cx: &Context) -> Outcome {
    match catch_unwind(AssertUnwindSafe(|| (test.body)(cx))) {
        Ok(Ok(())) => Outcome::Pass,
        Ok(Err(error)) => match error.downcast_ref::<Skip>() {
            Some(Skip(reason)) => Outcome::Skip {
                reason: reason.clone(),
            },
            None => Outcome::fail(format!("{error:#}")),
        },
        Err(panic) => {
            let words = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("(no message)");
            Outcome::fail(format!("panicked: {words}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> Context {
        Context::new(
            Place::Host,
            Paths::default(),
            PathBuf::new(),
            PathBuf::new(),
            Value::Null,
        )
    }

    #[test]
    fn a_panic_an_error_and_a_skip_are_told_apart() {
        let panics = Test::new("panics", |_| panic!("at the {}", "disco"));
        let fails = Test::new("fails", |_| anyhow::bail!("no disk"));
        let skips = Test::new("skips", |_| crate::skip!("no {}", "room"));
        let passes = Test::new("passes", |_| Ok(()));
        let cx = context();
        assert_eq!(
            run_body(&panics, &cx),
            Outcome::fail("panicked: at the disco")
        );
        assert_eq!(run_body(&fails, &cx), Outcome::fail("no disk"));
        let reason = "no room".to_owned();
        assert_eq!(run_body(&skips, &cx), Outcome::Skip { reason });
        assert_eq!(run_body(&passes, &cx), Outcome::Pass);
    }
}
