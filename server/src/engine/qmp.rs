//! A client of QEMU's machine protocol: commands, answers, descriptors, and the one event that is waited for.

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
    /// How long an answer is waited for.
    pub(crate) answer_limit: Duration,
    /// The `id` of the last command.
    last_id: u64,
    /// The device that was asked to leave last. No other event than its end is kept: the peer may send any number.
    leaving: Option<String>,
    left: Option<Unplugged>,
}

/// What became of a device that was asked to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unplugged {
    /// The guest has released it.
    Gone,
    /// The guest keeps it.
    Refused,
}

/// A command was not answered: QEMU may have done it, or may still do it.
#[derive(Debug, thiserror::Error)]
#[error("QEMU does not answer {0}")]
pub struct Unanswered(pub &'static str);

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
        Self::over(stream).with_context(|| format!("{} is no monitor of QEMU", socket.display()))
    }

    /// Completes the capabilities negotiation on a connection.
    ///
    /// # Errors
    ///
    /// As for [`connect`](Self::connect).
    pub fn over(stream: UnixStream) -> Result<Self> {
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        let mut qmp = Self {
            stream,
            unread: Vec::new(),
            answer_limit: ANSWER_LIMIT,
            last_id: 0,
            leaving: None,
            left: None,
        };
        let greeting = qmp
            .message(Instant::now() + ANSWER_LIMIT)?
            .context("it does not greet: another client may be connected to this monitor")?;
        if greeting.get("QMP").is_none() {
            bail!("it is not a QMP socket");
        }
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The monitor's connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Runs a command; what it returns.
    ///
    /// # Errors
    ///
    /// A [`Refusal`]; [`Unanswered`] when QEMU does not answer or has gone.
    pub fn command(&mut self, name: &'static str, arguments: Value) -> Result<Value> {
        self.command_with(name, arguments, &[])
    }

    /// [`Qmp::command`] that hands descriptors over.
    ///
    /// # Errors
    ///
    /// As [`Qmp::command`].
    pub fn command_with(
        &mut self,
        name: &'static str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value> {
        let mut answer = (self.ask(name, arguments, fds)).context(Unanswered(name))?;
        if let Some(error) = answer.get("error") {
            let description = error["desc"].as_str().unwrap_or("no reason given");
            return Err(anyhow!(Refusal {
                command: name.to_owned(),
                description: description.to_owned(),
            }));
        }
        Ok(answer["return"].take())
    }

    /// Asks the guest to release a device. [`Qmp::unplugged`] tells what became of it.
    ///
    /// # Errors
    ///
    /// As [`Qmp::command`].
    pub fn unplug(&mut self, device: &str) -> Result<()> {
        self.leaving = Some(device.to_owned());
        self.left = None;
        self.command("device_del", json!({ "id": device }))?;
        Ok(())
    }

    /// What became of the device that was asked to leave; `None` when that is not known within `limit`.
    ///
    /// # Errors
    ///
    /// [`Unanswered`] when QEMU has gone.
    pub fn unplugged(&mut self, limit: Duration) -> Result<Option<Unplugged>> {
        let deadline = Instant::now() + limit;
        while self.left.is_none() {
            match self.message(deadline).context(Unanswered("device_del"))? {
                Some(message) => self.note(&message),
                None => break,
            }
        }
        Ok(self.left)
    }

    /// Sends a command; the answer to it and to no other. An earlier command's may come after it was given up.
    fn ask(&mut self, name: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Result<Value> {
        self.last_id += 1;
        let id = self.last_id;
        let command = json!({ "execute": name, "arguments": arguments, "id": id });
        self.send(format!("{command}\n").as_bytes(), fds)
            .context("cannot send it")?;
        let deadline = Instant::now() + self.answer_limit;
        loop {
            let Some(message) = self.message(deadline)? else {
                bail!("nothing came within {} s", self.answer_limit.as_secs());
            };
            let is_answer = message.get("return").is_some() || message.get("error").is_some();
            if is_answer && message["id"] == id {
                return Ok(message);
            }
            self.note(&message);
        }
    }

    fn note(&mut self, event: &Value) {
        let what = match event["event"].as_str() {
            Some("DEVICE_DELETED") => Unplugged::Gone,
            Some("DEVICE_UNPLUG_GUEST_ERROR") => Unplugged::Refused,
            _ => return,
        };
        let data = &event["data"];
        if (self.leaving.as_deref()).is_some_and(|id| data["device"] == id || data["path"] == id) {
            self.left.get_or_insert(what);
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
