//! Commands with a time limit and errors that show what the command said.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// The variable by which the lab says that it has installed what tests need.
pub const COMPLETE: &str = "UBLKUP_TESTS_COMPLETE";

/// Whether these programs are here; says which are not. A lack is a failure where the lab runs the tests.
///
/// # Panics
/// The lab runs the tests and one is missing.
#[must_use]
pub fn has_programs(programs: &[&str]) -> bool {
    let is_here = |program: &&&str| {
        let mut command = Command::new(**program);
        command.arg("--version").output().is_ok()
    };
    let missing: Vec<_> = programs
        .iter()
        .filter(|program| !is_here(program))
        .collect();
    assert!(
        missing.is_empty() || std::env::var_os(COMPLETE).is_none(),
        "missing: {missing:?}"
    );
    if !missing.is_empty() {
        eprintln!("not tested: {missing:?} missing");
    }
    missing.is_empty()
}

/// A command being put together. Its standard input is empty, its output is
/// kept, and it is killed when the limit (60 s unless said otherwise) passes.
#[derive(Debug)]
pub struct Shell {
    command: Command,
    shown: String,
    limit: Duration,
    input: Option<String>,
}

/// How a command ended and what it said.
#[derive(Debug)]
pub struct Finished {
    /// The exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// The exit code; a command killed by signal N counts as 128 + N, as in a shell.
    #[must_use]
    pub fn code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => -1,
        }
    }

    /// The last lines of both outputs, for a message.
    #[must_use]
    pub fn tail(&self) -> String {
        let both = format!("{}\n{}", self.stdout.trim_end(), self.stderr.trim_end());
        last_lines(both.trim(), 20)
    }
}

/// A shell script: `sh("fsck.ext4 -fn image | tail -1")`.
#[must_use]
pub fn sh(script: &str) -> Shell {
    let mut shell = Shell::new("sh").arg("-ec").arg(script);
    shell.shown = script.to_owned();
    shell
}

impl Shell {
    /// Starts a description of one command.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let program = program.as_ref();
        Shell {
            command: Command::new(program),
            shown: program.to_string_lossy().into_owned(),
            limit: Duration::from_secs(60),
            input: None,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        let arg = arg.as_ref();
        self.shown.push(' ');
        self.shown.push_str(&arg.to_string_lossy());
        self.command.arg(arg);
        self
    }

    /// Adds several arguments.
    #[must_use]
    pub fn args<I, S>(self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        args.into_iter().fold(self, Shell::arg)
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.command.env(name, value.into());
        self
    }

    /// Leaves out an environment variable of this process.
    #[must_use]
    pub fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Runs in this directory.
    #[must_use]
    pub fn dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Kills the command after this long.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// What it reads from its standard input.
    #[must_use]
    pub fn input(mut self, text: String) -> Self {
        self.input = Some(text);
        self
    }

    /// Starts the command; its time begins when it is waited for.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut self) -> Result<Running> {
        let file = || tempfile::tempfile().context("cannot make a temporary file");
        let share = |file: &File| file.try_clone().context("cannot share a temporary file");
        let (stdout, stderr) = (file()?, file()?);
        self.command.stdin(match self.input {
            None => Stdio::null(),
            Some(text) => {
                let mut stdin = file()?;
                stdin.write_all(text.as_bytes())?;
                stdin.rewind()?;
                stdin.into()
            }
        });
        self.command.stdout(share(&stdout)?).stderr(share(&stderr)?);
        Ok(Running {
            child: process::spawn_bound(&mut self.command)?,
            shown: self.shown,
            limit: self.limit,
            stdout,
            stderr,
        })
    }

    /// Runs the command and returns how it ended, whatever that was.
    ///
    /// # Errors
    /// It cannot be started, or did not end within its limit.
    pub fn finish(self) -> Result<Finished> {
        self.start()?.finish()
    }

    /// Runs the command, which must succeed, and returns its standard output.
    ///
    /// # Errors
    /// As [`Shell::finish`], and when the command fails; the message has the
    /// end of its output.
    pub fn run(self) -> Result<String> {
        let shown = self.shown.clone();
        let finished = self.finish()?;
        ensure!(
            finished.status.success(),
            "`{shown}` failed with {}; it said:
{}",
            finished.status,
            finished.tail()
        );
        Ok(finished.stdout)
    }
}

/// A command that was started.
#[derive(Debug)]
pub struct Running {
    child: Child,
    shown: String,
    limit: Duration,
    stdout: File,
    stderr: File,
}

impl Running {
    /// Waits for its end, and kills it when its limit has passed.
    ///
    /// # Errors
    /// It did not end within its limit.
    pub fn finish(mut self) -> Result<Finished> {
        let status = process::wait_limited(&mut self.child, self.limit)?;
        let (stdout, stderr) = (
            tail(&mut self.stdout, u64::MAX),
            tail(&mut self.stderr, u64::MAX),
        );
        let Some(status) = status else {
            // The rest of its group goes when the test ends.
            self.child.kill().context("cannot kill a command")?;
            bail!(
                "`{}` did not end within {} s; it said:
{}{}",
                self.shown,
                self.limit.as_secs(),
                last_lines(&stdout, 10),
                last_lines(&stderr, 10),
            );
        };
        Ok(Finished {
            status,
            stdout,
            stderr,
        })
    }
}

/// The last `count` lines of a text.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// The end of a file, whatever its position; what is no text is replaced.
pub fn tail(file: &mut File, max_bytes: u64) -> String {
    let mut bytes = Vec::new();
    let read = file
        .seek(SeekFrom::End(0))
        .and_then(|len_bytes| file.seek(SeekFrom::Start(len_bytes.saturating_sub(max_bytes))))
        .and_then(|_| file.read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(output lost: {error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_command_says_what_it_said() {
        let error = sh("echo reason >&2; exit 3").run().expect_err("it fails");
        let text = error.to_string();
        assert!(text.contains("reason") && text.contains('3'), "{text}");
    }

    #[test]
    fn a_command_that_hangs_is_killed_and_reported() {
        let error = sh("echo begun; exec sleep 100")
            .limit(Duration::from_millis(200))
            .run()
            .expect_err("it is too slow");
        assert!(error.to_string().contains("begun"), "{error}");
    }

    #[test]
    fn the_exit_code_is_that_of_the_command() {
        assert_eq!(sh("exit 4").finish().expect("it runs").code(), 4);
        assert_eq!(sh("kill -9 $$").finish().expect("it runs").code(), 137);
    }
}
