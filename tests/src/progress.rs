//! Long steps: a moving line on a terminal, now and then a plain line elsewhere.

use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use testkit::process;
use testkit::shell::{last_lines, tail};

/// How often a plain line is printed.
const PLAIN_EVERY: Duration = Duration::from_secs(60);

/// A step under way.
struct Step {
    what: String,
    bar: Option<ProgressBar>,
    started: Instant,
    said: Instant,
}

impl Step {
    fn start(what: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if bar.is_none() {
            eprintln!("lab: {what} …");
        }
        Step {
            what: what.to_owned(),
            bar,
            started: Instant::now(),
            said: Instant::now(),
        }
    }

    fn note(&mut self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
        } else if self.said.elapsed() >= PLAIN_EVERY {
            self.said = Instant::now();
            let seconds = self.started.elapsed().as_secs();
            eprintln!("lab: {} … {seconds} s: {text}", self.what);
        }
    }

    fn end(self, how: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs();
        eprintln!("lab: {}: {how} after {seconds} s", self.what);
    }
}

/// Runs a command as a step. Its output goes to the file `log`.
pub fn run(what: &str, mut command: Command, log: &Path, limit: Duration) -> Result<()> {
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("cannot share a log file")?)
        .stderr(file);
    let mut step = Step::start(what);
    // On a terminal the command stays in our group, so that Ctrl-C reaches all
    // of it; elsewhere it gets one of its own, so that we can kill all of it.
    let mut child = if std::io::stdin().is_terminal() {
        process::spawn_bound(&mut command)?
    } else {
        process::spawn_group(&mut command)?
    };
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = process::wait_limited(&mut child, Duration::from_secs(1))? {
            break status;
        }
        if Instant::now() > deadline {
            process::kill_group(&mut child);
            step.end("killed");
            bail!(
                "{what} did not end within {} s; {} ends with:\n{}",
                limit.as_secs(),
                log.display(),
                end_of(log, 20)
            );
        }
        step.note(end_of(log, 1).trim());
    };
    if !status.success() {
        step.end("failed");
        bail!(
            "{what} failed with {status}; {} ends with:\n{}",
            log.display(),
            end_of(log, 40)
        );
    }
    step.end("done");
    Ok(())
}

/// The last lines of a file, without those that cargo writes for machines.
fn end_of(path: &Path, lines: usize) -> String {
    let said = match File::open(path) {
        Ok(mut file) => tail(&mut file, 16 * 1024),
        Err(error) => return format!("(unreadable: {error})"),
    };
    let for_people: Vec<&str> = (said.lines())
        .filter(|line| !line.starts_with("{\"reason\":"))
        .collect();
    last_lines(
        for_people
            .join(
                "
",
            )
            .trim_end(),
        lines,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_step_shows_the_end_of_its_output() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new("sh");
        command.args([
            "-c",
            r#"echo the reason; echo '{"reason":"for machines"}'; exit 2"#,
        ]);
        let error = run(
            "a step",
            command,
            &dir.path().join("log"),
            Duration::from_secs(20),
        )
        .expect_err("it fails");
        let error = error.to_string();
        assert!(error.contains("the reason"), "{error}");
        assert!(!error.contains("for machines"), "{error}");
    }

    #[test]
    fn a_step_that_hangs_is_killed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new("sleep");
        command.arg("1000");
        let error =
            run("a step", command, &dir.path().join("log"), Duration::ZERO).expect_err("it hangs");
        assert!(error.to_string().contains("did not end"), "{error}");
    }
}
