//! A client of QEMU's monitor.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::wait::wait_for;

/// A session with a monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects as soon as the monitor is there.
    ///
    /// # Errors
    /// It is not there within `limit`, or does not answer.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self> {
        let what = format!("QEMU's monitor answers at {}", socket.display());
        let stream = wait_for(&what, limit, || Ok(UnixStream::connect(socket).ok()))?;
        stream.set_read_timeout(Some(limit))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        ensure!(qmp.message()?.get("QMP").is_some(), "no greeting");
        qmp.command("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; what it returns. Events are dropped.
    ///
    /// # Errors
    /// QEMU refuses, does not answer, or has gone.
    pub fn command(&mut self, name: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut message = self.message().with_context(|| name.to_owned())?;
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {name}: {error}");
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(
            self.stream
                .read_line(&mut line)
                .context("QEMU does not answer")?
                > 0,
            "QEMU closed its monitor"
        );
        serde_json::from_str(&line).context("QEMU's answer is no JSON")
    }
}
