//! Commands with a time limit and errors that show what the command said.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process;

/// A command being put together. Its standard input is empty, its output is
/// kept, and it is killed when the limit (60 s unless said otherwise) passes.
#[derive(Debug)]
pub struct Shell {
    command: Command,
    shown: String,
    limit: Duration,
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

    /// Runs the command and returns how it ended, whatever that was.
    ///
    /// # Errors
    /// It cannot be started, or did not end within its limit.
    pub fn finish(mut self) -> Result<Finished> {
        let mut stdout = tempfile::tempfile().context("cannot make a temporary file")?;
        let mut stderr = tempfile::tempfile().context("cannot make a temporary file")?;
        self.command
            .stdin(Stdio::null())
            .stdout(
                stdout
                    .try_clone()
                    .context("cannot share a temporary file")?,
            )
            .stderr(
                stderr
                    .try_clone()
                    .context("cannot share a temporary file")?,
            );
        let mut child = process::spawn_bound(&mut self.command)?;
        let Some(status) = process::wait_limited(&mut child, self.limit)? else {
            // The rest of its group goes when the test ends.
            child.kill().context("cannot kill a command")?;
            bail!(
                "`{}` did not end within {} s; it said:\n{}{}",
                self.shown,
                self.limit.as_secs(),
                last_lines(&contents(&mut stdout), 10),
                last_lines(&contents(&mut stderr), 10),
            );
        };
        Ok(Finished {
            status,
            stdout: contents(&mut stdout),
            stderr: contents(&mut stderr),
        })
    }

    /// Runs the command, which must succeed, and returns its standard output.
    ///
    /// # Errors
    /// As [`Shell::finish`], and when the command fails; the message has the
    /// end of its output.
    pub fn run(self) -> Result<String> {
        let shown = self.shown.clone();
        let finished = self.finish()?;
        if !finished.status.success() {
            bail!(
                "`{shown}` failed with {}; it said:\n{}",
                finished.status,
                finished.tail()
            );
        }
        Ok(finished.stdout)
    }
}

/// The last `count` lines of a text.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Everything in a file, whatever its position; unreadable bytes are replaced.
fn contents(file: &mut File) -> String {
    let mut bytes = Vec::new();
    if file.seek(SeekFrom::Start(0)).is_err() || file.read_to_end(&mut bytes).is_err() {
        return "(output lost)".to_owned();
    }
    String::from_utf8_lossy(&bytes).into_owned()
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
