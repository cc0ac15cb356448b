//! A running `ublkup serve`: started, waited for, asked, stopped or killed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use super::shell::last_lines;
use crate::process;
use crate::test::Context;

/// `ublkup serve` being put together.
#[derive(Debug)]
pub struct Serve {
    binary: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, OsString)>,
    wrapper: Vec<OsString>,
    patience: Duration,
}

impl Serve {
    /// A server with the tested binary, no doors and no exports yet.
    #[must_use]
    pub fn new(cx: &Context) -> Self {
        Serve {
            binary: cx.paths.server.clone(),
            args: Vec::new(),
            env: Vec::new(),
            wrapper: Vec::new(),
            patience: cx.patience(20),
        }
    }

    /// Adds any argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds several arguments.
    #[must_use]
    pub fn args<I, S>(self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        args.into_iter().fold(self, Self::arg)
    }

    /// `--name`.
    #[must_use]
    pub fn name(self, name: &str) -> Self {
        self.arg("--name").arg(name)
    }

    /// `--ublk`: `auto`, `yes` or `no`.
    #[must_use]
    pub fn ublk(self, choice: &str) -> Self {
        self.arg("--ublk").arg(choice)
    }

    /// `--vhost-socket`, with the vhost door on.
    #[must_use]
    pub fn vhost_socket(self, path: &Path) -> Self {
        self.arg("--vhost")
            .arg("yes")
            .arg("--vhost-socket")
            .arg(path)
    }

    /// Sets an environment variable of the server.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Runs the server under another program (`strace -f -o FILE`). Signals go
    /// to that program.
    #[must_use]
    pub fn under<I, S>(mut self, program: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.wrapper = program
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        self
    }

    /// Starts the server and waits until it says `ready`.
    ///
    /// # Errors
    /// It cannot be started, ends before it is ready, or is not ready in time;
    /// the message has the end of its log.
    pub fn start(self) -> Result<Server> {
        let patience = self.patience;
        let mut server = self.launch()?;
        let deadline = Instant::now() + patience;
        loop {
            let log = server.log();
            if log.lines().any(|line| line.trim() == "ready") {
                server.ready_after = server.started.elapsed();
                return Ok(server);
            }
            if let Some(status) = server
                .child
                .try_wait()
                .context("cannot wait for the server")?
            {
                bail!(
                    "the server ended with {status} before it was ready; it said:\n{}",
                    last_lines(&server.log(), 20)
                );
            }
            ensure!(
                Instant::now() < deadline,
                "the server was not ready within {} s; it said:\n{}",
                patience.as_secs(),
                last_lines(&log, 20)
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts the server without waiting, for tests of what goes wrong; see
    /// [`Server::wait`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(self) -> Result<Server> {
        let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
        let log_path = dir.path().join("server.log");
        let log = File::create(&log_path).context("cannot create the server's log")?;
        let mut words = self.wrapper;
        words.push(self.binary.into_os_string());
        words.push("serve".into());
        words.extend(self.args);
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .envs(self.env)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the server's log")?)
            .stderr(log);
        let started = Instant::now();
        let child = process::spawn_bound(&mut command)?;
        Ok(Server {
            child,
            log_path,
            _dir: dir,
            patience: self.patience,
            started,
            ready_after: Duration::ZERO,
        })
    }
}

/// A server process. Dropping it kills it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    log_path: PathBuf,
    _dir: tempfile::TempDir,
    patience: Duration,
    started: Instant,
    ready_after: Duration,
}

impl Server {
    /// The process id (of the wrapper, if there is one).
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How long it took from start to `ready`.
    #[must_use]
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// Everything it said so far, both outputs together.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log_path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The block devices it said it serves, in that order.
    #[must_use]
    pub fn block_devices(&self) -> Vec<PathBuf> {
        block_devices_in(&self.log())
    }

    /// Its only block device.
    ///
    /// # Errors
    /// It named none, or several.
    pub fn block_device(&self) -> Result<PathBuf> {
        let devices = self.block_devices();
        ensure!(
            devices.len() == 1,
            "the server named {} block devices; it said:\n{}",
            devices.len(),
            last_lines(&self.log(), 20)
        );
        Ok(devices[0].clone())
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self
            .child
            .try_wait()
            .context("cannot look at the server")?
            .is_none())
    }

    /// Waits for the server to end by itself and returns how it ended and all
    /// it said.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn wait(mut self) -> Result<(ExitStatus, String)> {
        let Some(status) = process::wait_limited(&mut self.child, self.patience)? else {
            bail!(
                "the server did not end within {} s; it said:\n{}",
                self.patience.as_secs(),
                last_lines(&self.log(), 20)
            );
        };
        Ok((status, self.log()))
    }

    /// Asks the server to end (SIGTERM), which it must do in time and with
    /// success, and returns all it said.
    ///
    /// # Errors
    /// It did not end, or not with exit code 0.
    pub fn stop(self) -> Result<String> {
        process::signal(&self.child, Signal::TERM)?;
        let (status, log) = self.wait().context("after SIGTERM")?;
        ensure!(
            status.success(),
            "the server ended with {status} after SIGTERM; it said:\n{}",
            last_lines(&log, 20)
        );
        Ok(log)
    }

    /// Kills the server (SIGKILL), as a crash would, and returns all it said.
    ///
    /// # Errors
    /// It was gone already, or is stuck in the kernel.
    pub fn kill(self) -> Result<String> {
        process::signal(&self.child, Signal::KILL)?;
        Ok(self.wait().context("after SIGKILL")?.1)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _stuck = process::wait_limited(&mut self.child, Duration::from_secs(5));
    }
}

/// The `/dev/ublkb…` names in a text, each once.
fn block_devices_in(text: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for piece in text.split("/dev/ublkb").skip(1) {
        let digits: String = piece.chars().take_while(char::is_ascii_digit).collect();
        let path = PathBuf::from(format!("/dev/ublkb{digits}"));
        if !digits.is_empty() && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test::{Paths, Place};

    fn pretender(script: &str) -> (tempfile::TempDir, Context) {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let binary = dir.path().join("ublkup");
        std::fs::write(&binary, format!("#!/bin/sh\n{script}\n")).expect("a script");
        std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o755)).expect("executable");
        let paths = Paths {
            server: binary,
            ..Paths::default()
        };
        let scratch = dir.path().to_owned();
        let cx = Context::new(
            Place::Host,
            paths,
            scratch.clone(),
            scratch,
            serde_json::Value::Null,
        );
        (dir, cx)
    }

    #[test]
    fn block_devices_are_found_in_what_the_server_said() {
        let text = "disk: block door /dev/ublkb12, vhost door /run/x\nother: /dev/ublkb3\n";
        let expected = [Path::new("/dev/ublkb12"), Path::new("/dev/ublkb3")];
        assert_eq!(block_devices_in(text), expected);
    }

    #[test]
    fn a_server_that_ends_early_shows_its_log() {
        let (_dir, cx) = pretender("echo no such file >&2; exit 1");
        let error = Serve::new(&cx).start().expect_err("it ended");
        assert!(error.to_string().contains("no such file"), "{error}");
    }

    #[test]
    fn a_ready_server_is_stopped_by_a_signal() {
        let (_dir, cx) = pretender("trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done");
        let server = Serve::new(&cx).start().expect("it is ready");
        assert!(server.stop().expect("it ends").contains("ready"));
    }

    #[test]
    fn a_server_that_fails_on_stop_is_an_error() {
        let (_dir, cx) = pretender("trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done");
        let server = Serve::new(&cx).start().expect("it is ready");
        assert!(server.stop().is_err());
    }
}
