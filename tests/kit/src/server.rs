//! A running `ublkup serve`: started, waited for, asked, stopped or killed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;

use crate::process;
use crate::shell::last_lines;
use crate::wait::until;

/// `ublkup serve` being put together. The server dies with the thread that started it.
#[derive(Debug)]
pub struct Serve {
    binary: PathBuf,
    command: &'static str,
    args: Vec<OsString>,
    env: Vec<(String, OsString)>,
    wrapper: Vec<OsString>,
    limit: Duration,
}

impl Serve {
    /// A server of this program, no doors and no exports yet. Nothing may take longer than `limit`.
    #[must_use]
    pub fn new(binary: &Path, limit: Duration) -> Self {
        Serve {
            binary: binary.to_owned(),
            command: "serve",
            args: Vec::new(),
            env: Vec::new(),
            wrapper: Vec::new(),
            limit,
        }
    }

    /// Another command that serves: `recover`.
    #[must_use]
    pub fn command(mut self, command: &'static str) -> Self {
        self.command = command;
        self
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
    /// As [`Server::launch`] and [`Server::ready`].
    pub fn start(self) -> Result<Server> {
        self.launch()?.ready()
    }

    /// Starts the server without waiting, for tests of what goes wrong; see
    /// [`Server::wait`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(self) -> Result<Server> {
        let mut words = self.wrapper;
        words.push(self.binary.into_os_string());
        words.push(self.command.into());
        words.extend(self.args);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).envs(self.env);
        process::bind(&mut command);
        Server::launch(command.stdin(Stdio::null()), self.limit)
    }
}

/// A server process. Dropping it kills it.
#[derive(Debug)]
pub struct Server {
    child: Child,
    log_path: PathBuf,
    _dir: tempfile::TempDir,
    limit: Duration,
    started: Instant,
    ready_after: Duration,
}

impl Server {
    /// Starts a command that serves, with its output in a log. It inherits no other descriptors.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn launch(command: &mut Command, limit: Duration) -> Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
        let log_path = dir.path().join("server.log");
        let log = File::create(&log_path).context("cannot create the server's log")?;
        command
            .stdout(log.try_clone().context("cannot share the server's log")?)
            .stderr(log);
        process::inherit_nothing(command);
        let started = Instant::now();
        let child = process::spawn(command)?;
        Ok(Server {
            child,
            log_path,
            _dir: dir,
            limit,
            started,
            ready_after: Duration::ZERO,
        })
    }

    /// Waits until it says `ready`.
    ///
    /// # Errors
    /// It ended, or is not ready in time; the message has the end of its log.
    pub fn ready(self) -> Result<Self> {
        let said_so = |server: &Self| server.log().lines().any(|line| line.trim() == "ready");
        self.ready_when(|server| Ok(said_so(server)))
    }

    /// Waits until it serves, for a server that says so in another way.
    ///
    /// # Errors
    /// As [`Server::ready`].
    pub fn ready_when(mut self, is_ready: impl Fn(&Self) -> Result<bool>) -> Result<Self> {
        let limit = self.limit;
        let waited = until("the server is ready", limit, || {
            if is_ready(&self)? {
                return Ok(true);
            }
            let ended = self
                .child
                .try_wait()
                .context("cannot wait for the server")?;
            match ended {
                Some(status) => bail!("the server ended with {status} before it was ready"),
                None => Ok(false),
            }
        });
        self.ready_after = self.started.elapsed();
        waited.map_err(|error| self.explain(&error))?;
        Ok(self)
    }

    /// An error with the end of the log.
    fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        let log = last_lines(&self.log(), 20);
        anyhow::anyhow!("{error:#}; it said:\n{log}")
    }

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
        match process::wait_limited(&mut self.child, self.limit)? {
            Some(status) => Ok((status, self.log())),
            None => Err(self.explain(&anyhow::anyhow!(
                "the server did not end within {} s",
                self.limit.as_secs()
            ))),
        }
    }

    /// As [`Server::wait`]: the exit code, or `None` if a signal killed it.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn exit_code(self) -> Result<Option<i32>> {
        Ok(self.wait()?.0.code())
    }

    /// Sends a signal, and waits as [`Server::wait`] does.
    ///
    /// # Errors
    /// It was gone already, or did not end in time.
    pub fn end_by(self, signal: Signal) -> Result<(ExitStatus, String)> {
        process::signal(&self.child, signal)?;
        self.wait().with_context(|| format!("after {signal:?}"))
    }

    /// Asks the server to end as a service manager would, which it must do in time and with
    /// success, and returns all it said.
    ///
    /// # Errors
    /// It did not end, or not with exit code 0, or one of its threads panicked.
    pub fn stop(self) -> Result<String> {
        let (status, log) = self.end_by(Signal::TERM)?;
        ensure!(
            status.success() && !log.contains("panicked"),
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
        Ok(self.end_by(Signal::KILL)?.1)
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

    fn pretender(script: &str) -> (tempfile::TempDir, Serve) {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a temporary directory");
        let binary = dir.path().join("ublkup");
        std::fs::write(&binary, format!("#!/bin/sh\n{script}\n")).expect("a script");
        std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o755)).expect("executable");
        let serve = Serve::new(&binary, crate::wait::PATIENCE);
        (dir, serve)
    }

    #[test]
    fn block_devices_are_found_in_what_the_server_said() {
        let text = "disk: ublk door /dev/ublkb12, vhost door /run/x\nother: /dev/ublkb3\n";
        let expected = [Path::new("/dev/ublkb12"), Path::new("/dev/ublkb3")];
        assert_eq!(block_devices_in(text), expected);
    }

    #[test]
    fn a_server_that_ends_early_shows_its_log() {
        let (_dir, serve) = pretender("echo no such file >&2; exit 1");
        let error = serve.start().expect_err("it ended");
        assert!(error.to_string().contains("no such file"), "{error}");
    }

    #[test]
    fn a_ready_server_is_stopped_by_a_signal() {
        let (_dir, serve) =
            pretender("trap 'exit 0' TERM; echo ready; while :; do sleep 0.01; done");
        let server = serve.start().expect("it is ready");
        assert!(server.stop().expect("it ends").contains("ready"));
    }

    #[test]
    fn a_server_that_fails_on_stop_is_an_error() {
        let (_dir, serve) =
            pretender("trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done");
        let server = serve.start().expect("it is ready");
        assert!(server.stop().is_err());
    }
}
