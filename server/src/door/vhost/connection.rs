//! A client's connection: what all threads of its session share.

use std::fmt;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

use super::message;
use crate::engine::process::Process;
use crate::engine::repeats::{Omitted, Repeats};
use crate::request::{IoError, Limits};

/// What drivers do wrong with their vrings. Of all exports: a driver can do it again and again, in new sessions too.
static WRONG_VRINGS: Repeats = Repeats::new(3);

/// A client's connection and the state of its session.
#[derive(Debug)]
pub(super) struct Connection {
    export: String,
    id: u64,
    peer_pid: Option<i32>,
    process: Option<Process>,
    since: SystemTime,
    limits: Limits,
    /// The writeback byte of the configuration space: whether a completed write may be volatile.
    pub writeback: AtomicBool,
    /// Vrings that are being served.
    pub vrings: AtomicUsize,
    /// Requests that the client had no answer to when it hung up.
    pub unanswered: AtomicUsize,
    ending: AtomicBool,
    stream: UnixStream,
    /// Where the client takes messages, if it does.
    channel: Mutex<Option<OwnedFd>>,
    reason: Mutex<Option<&'static str>>,
    /// Whether the log has a line about memory that is not shared.
    told_unshared: AtomicBool,
    /// A bit for each kind of error of a request that the log has a line about.
    told_refused: AtomicU8,
}

impl Connection {
    pub(super) fn new(
        export: &str,
        id: u64,
        peer_pid: Option<i32>,
        limits: Limits,
        stream: UnixStream,
    ) -> Self {
        Self {
            export: export.to_owned(),
            id,
            peer_pid,
            process: peer_pid.and_then(Process::of),
            since: SystemTime::now(),
            writeback: AtomicBool::new(limits.write_cache),
            limits,
            vrings: AtomicUsize::new(0),
            unanswered: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
            stream,
            channel: Mutex::new(None),
            reason: Mutex::new(None),
            told_unshared: AtomicBool::new(false),
            told_refused: AtomicU8::new(0),
        }
    }

    /// The name of the export.
    pub(super) fn export(&self) -> &str {
        &self.export
    }

    /// The number of the session on its export.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The client's process, if the kernel told.
    pub(super) fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// That process, told from others that get its number later, if this user may see it.
    pub(super) fn process(&self) -> Option<Process> {
        self.process
    }

    /// The client, for messages.
    pub(super) fn client(&self) -> String {
        let pid = self.peer_pid.map_or("?".to_owned(), |pid| pid.to_string());
        format!("session {} of process {pid}", self.id)
    }

    /// When the client connected.
    pub(super) fn since(&self) -> SystemTime {
        self.since
    }

    /// The limits of the disk.
    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The connection itself.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Where the client takes messages from now on.
    pub(super) fn set_channel(&self, channel: OwnedFd) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
    }

    /// Tells the client to read the configuration space again (vhost-user, "Back-end message types"). Returns
    /// whether it can be told. A client that does not read its messages is not waited for: those that it has not
    /// read say the same.
    pub(super) fn tell_config_change(&self) -> bool {
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        (channel.as_ref())
            .is_some_and(|channel| send(channel, &message::config_change(), flags).is_ok())
    }

    /// Logs, once, why the client's guest waits: something that it uses is in memory that it did not share. QEMU says
    /// nothing then, and the guest has no way to.
    #[cold]
    pub(super) fn tell_unshared(&self, what: fmt::Arguments<'_>) {
        if !self.told_unshared.swap(true, Ordering::Relaxed)
            && let Some(omitted) = self.due("unshared memory")
        {
            tracing::warn!(
                export = self.export,
                session = self.id,
                "{what}: all of a guest's memory must be shared (QEMU: -object memory-backend-memfd,…,share=on -machine \
                 memory-backend=…){omitted}"
            );
        }
    }

    /// Whether the log gets a line about something wrong with a vring.
    #[cold]
    pub(super) fn due(&self, what: &str) -> Option<Omitted> {
        WRONG_VRINGS.due(&format!("{} {what}", self.export))
    }

    /// Logs that a request of the driver was failed before the storage saw it: once in a session for each kind of error,
    /// so that a driver that does it again and again costs nothing more.
    #[cold]
    pub(super) fn tell_refused(&self, vring: u16, error: IoError, request: impl fmt::Display) {
        let kind = 1 << error as u8;
        if self.told_refused.fetch_or(kind, Ordering::Relaxed) & kind == 0
            && let Some(omitted) = self.due(&error.to_string())
        {
            tracing::warn!(
                export = self.export,
                session = self.id,
                pid = self.peer_pid,
                vring,
                "the driver made a request that was failed, {error}: {request}{omitted}"
            );
        }
    }

    /// Ends the session: its protocol thread reads an end of file. The first reason counts.
    pub(super) fn hang_up(&self, reason: &'static str) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(reason);
        drop(first);
        self.ending.store(true, Ordering::Release);
        // It fails only when the client was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Why the server ended the session, if it did.
    pub(super) fn reason(&self) -> Option<&'static str> {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session takes no more messages.
    pub(super) fn set_ending(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Whether the client is gone, as far as the kernel knows; its session may not have noticed.
    pub(super) fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec::default();
        self.is_ending() || poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Whether the session takes no more messages.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }
}
