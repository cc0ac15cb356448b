//! A client of QEMU's machine protocol: commands, answers, events, descriptors.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use upgrade_proto::connect_within;

/// How long QEMU may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The longest answer that is read; QEMU's are some kilobytes.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// A session with one monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<Value>,
}

/// QEMU said no to a command.
#[derive(Debug, thiserror::Error)]
#[error("QEMU refuses {command}: {description}")]
pub struct Refusal {
    command: String,
    description: String,
}

impl Qmp {
    /// Connects to a monitor and completes the capabilities negotiation.
    ///
    /// # Errors
    ///
    /// When there is no answer, or none of QEMU.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = connect_within(socket, ANSWER_LIMIT)
            .with_context(|| format!("cannot connect to QEMU at {}", socket.display()))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Self {
            stream,
            unread: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp
            .message(Instant::now() + ANSWER_LIMIT)?
            .context("it does not greet: another client may be connected to this monitor")?;
        if greeting.get("QMP").is_none() {
            bail!("{} is not a QMP socket", socket.display());
        }
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The monitor's connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Runs a command; what it returns. A [`Refusal`] is among the errors.
    ///
    /// # Errors
    ///
    /// When QEMU refuses, does not answer, or has gone.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        self.command_with(name, arguments, &[])
    }

    /// [`Qmp::command`] that hands descriptors over.
    ///
    /// # Errors
    ///
    /// As [`Qmp::command`].
    pub fn command_with(
        &mut self,
        name: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value> {
        let mut line = json!({ "execute": name, "arguments": arguments }).to_string();
        line.push('\n');
        self.send(line.as_bytes(), fds)
            .with_context(|| format!("cannot send {name}"))?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let Some(mut message) = self.message(deadline)? else {
                bail!("QEMU does not answer {name}");
            };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                let description = error["desc"].as_str().unwrap_or("no reason given");
                return Err(anyhow!(Refusal {
                    command: name.to_owned(),
                    description: description.to_owned(),
                }));
            } else if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    /// The next event that `wanted` picks, out of those that came or will come within `limit`.
    /// Others are dropped.
    ///
    /// # Errors
    ///
    /// When QEMU has gone.
    pub fn event(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Option<Value>> {
        let deadline = Instant::now() + limit;
        loop {
            let next = match self.events.pop_front() {
                Some(event) => event,
                None => match self.message(deadline)? {
                    Some(message) => message,
                    None => return Ok(None),
                },
            };
            if wanted(&next) {
                return Ok(Some(next));
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if !fds.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                bail!("too many descriptors for one message");
            }
            let sent = sendmsg(
                self.stream.as_fd(),
                &[IoSlice::new(bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            )?;
            bytes = &bytes[sent..];
        }
        Ok(self.stream.write_all(bytes)?)
    }

    /// The next message; `None` when none came in time.
    fn message(&mut self, deadline: Instant) -> Result<Option<Value>> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let message = serde_json::from_slice(&line).context("QEMU's answer is no JSON")?;
                return Ok(Some(message));
            }
            if self.unread.len() > MAX_ANSWER_BYTES {
                bail!("QEMU's answer does not end");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("QEMU closed the monitor"),
                Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error).context("cannot read from QEMU"),
            }
        }
    }
}
