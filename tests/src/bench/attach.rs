//! Client processes (see [`super::client`]) from the outside.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testkit::process;
use testkit::shell::last_lines;

use super::client::{Answer, End, Order, SUBCOMMAND};

/// A client at work.
#[derive(Debug)]
pub struct Client {
    child: Child,
    stdout: File,
    stderr: File,
    limit: Duration,
}

impl Client {
    /// Starts a client.
    ///
    /// # Errors
    /// There is no process to be had.
    pub fn start(order: &Order) -> Result<Self> {
        let file = || tempfile::tempfile().context("cannot make a temporary file");
        let (mut stdin, stdout, stderr) = (file()?, file()?, file()?);
        serde_json::to_writer(&mut stdin, order).context("cannot write the client's order")?;
        stdin.seek(SeekFrom::Start(0)).context("cannot rewind")?;
        let child = process::spawn_bound(
            Command::new("/proc/self/exe")
                .arg(SUBCOMMAND)
                .stdin(Stdio::from(stdin))
                .stdout(stdout.try_clone().context("cannot share a file")?)
                .stderr(stderr.try_clone().context("cannot share a file")?),
        )?;
        let expected_ms = match order.window {
            End::Milliseconds(ms) => ms * 2 + 30_000,
            End::Requests(_) => 120_000,
        };
        Ok(Client {
            child,
            stdout,
            stderr,
            limit: Duration::from_millis(expected_ms + order.hold_ms),
        })
    }

    /// Waits for the client to end, and returns what it measured.
    ///
    /// # Errors
    /// It failed, or got no answers from the server.
    pub fn finish(mut self) -> Result<Answer> {
        let Some(status) = process::wait_limited(&mut self.child, self.limit)? else {
            self.child.kill().context("cannot kill the client")?;
            let _stuck = process::wait_limited(&mut self.child, Duration::from_secs(5))?;
            bail!("the client did not end within {} s", self.limit.as_secs());
        };
        let (said, complaint) = (text(&mut self.stdout)?, text(&mut self.stderr)?);
        ensure!(status.success(), "{}", last_lines(&complaint, 10));
        serde_json::from_str(&said).context("the client gave no answer")
    }
}

fn text(file: &mut File) -> Result<String> {
    file.seek(SeekFrom::Start(0)).context("cannot rewind")?;
    std::io::read_to_string(file).context("cannot read what the client said")
}
