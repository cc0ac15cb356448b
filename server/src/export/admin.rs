//! The admin socket of each export: one line of JSON asks, one line answers.
//!
//! `{"command":"stat"}` → [`ExportStatus`]; `{"command":"stop"}` → `{"stopped":true}` once the
//! export is drained and gone; `{"command":"leave"}` → `{"left":true}` once it is another server's.
//! Anything else → `{"error":"…"}`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::door::ownership::OwnershipState;
use crate::door::ublk::DataPath;
use crate::door::vhost::SessionState;
use crate::engine::counters::Totals;

/// A request may be this long.
const MAX_LINE_BYTES: u64 = 4096;

/// An answer may be this long.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// A client may take this long to say what it wants.
const PATIENCE: Duration = Duration::from_secs(5);

/// Conversations at once per export.
const MAX_CLIENTS: usize = 16;

/// What a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
pub enum Command {
    /// How is the export?
    Stat,
    /// Drain it and take it down.
    Stop {
        /// Also if somebody uses it.
        #[serde(default)]
        force: bool,
    },
    /// End serving it, and leave its block device and its clients to another server.
    Leave,
    /// Give it another size.
    Resize {
        /// Which; that of the storage if there is none.
        size_bytes: Option<u64>,
        /// Whether something may be cut off.
        shrink: bool,
    },
}

/// What an export says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// `serving` or `stopping`.
    pub state: String,
    /// Who may write.
    pub access: OwnershipState,
    /// The server's process.
    pub pid: u32,
    /// The backend, as a SPEC.
    pub backend: String,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Logical block.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether completed writes need a flush to be durable.
    pub write_cache: bool,
    /// What the disk calls itself.
    pub serial: String,
    /// How long an idle queue thread looks for work, as `--poll-us` says it.
    pub poll_us: String,
    /// The processors of the queue threads, if they have some of their own.
    pub cpus: Option<String>,
    /// The block door, if it is open.
    pub ublk: Option<UblkStatus>,
    /// The vhost door, if it is open.
    pub vhost: Option<VhostStatus>,
}

/// What the block door says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UblkStatus {
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// Hardware queues, each with a thread.
    pub queues: u16,
    /// Requests under way per queue at most.
    pub depth: u16,
    /// How data gets to the backend and back.
    pub data: DataPath,
    /// What it has of what the driver offers, as the driver names it.
    pub features: Vec<String>,
    /// The processors of each queue's thread, if it keeps to where the requests come from.
    pub affinity: Option<Vec<String>>,
    /// What it did.
    pub counters: Totals,
}

/// What the vhost door says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostStatus {
    /// Where it listens.
    pub socket: PathBuf,
    /// Queues that clients are told to use.
    pub queues: u16,
    /// Threads that serve the queues of a client.
    pub threads: u16,
    /// How clients come from the block device: `kernel`, `registry`; empty if they cannot.
    pub upgrade: Vec<String>,
    /// Who is connected.
    pub sessions: Vec<SessionStatus>,
    /// What it did, ended sessions included.
    pub counters: Totals,
}

/// One front-end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its process, as the kernel told it when it connected.
    pub pid: Option<i32>,
    /// What it is doing.
    pub state: SessionState,
    /// Virtqueues being served.
    pub vrings: usize,
    /// Seconds since it connected.
    pub age_seconds: u64,
}

#[derive(Serialize, Deserialize)]
struct Stopped {
    stopped: bool,
}

#[derive(Serialize, Deserialize)]
struct Left {
    left: bool,
}

/// What became of a disk that got another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resized {
    /// Its size now.
    pub size_bytes: u64,
    /// Its size before.
    pub old_size_bytes: u64,
    /// Clients of the vhost door that cannot be told.
    pub untold_clients: usize,
}

#[derive(Serialize, Deserialize)]
struct Refused {
    error: String,
}

/// What an export does for its admin socket.
pub trait Service: Send + Sync + 'static {
    /// Answers `stat`.
    fn status(&self) -> ExportStatus;
    /// Answers `resize`.
    ///
    /// # Errors
    ///
    /// Why it keeps its size.
    fn resize(&self, size_bytes: Option<u64>, shrink: bool) -> Result<Resized>;
    /// Answers `stop`: returns when the export is gone.
    ///
    /// # Errors
    ///
    /// Who uses it, unless that is no matter.
    fn stop(&self, force: bool) -> Result<()>;
    /// Answers `leave`: returns when the export is another server's to go on with.
    ///
    /// # Errors
    ///
    /// Why that is not possible.
    fn leave(&self) -> Result<()>;
}

/// Listens on `path` and answers from a thread of its own, until the process ends or the returned
/// handle is dropped.
///
/// # Errors
///
/// When the socket or the thread cannot be made.
pub fn listen(path: &Path, service: Arc<impl Service>) -> Result<Listening> {
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let listening = Listening {
        listener: Arc::new(listener),
        clients: Arc::default(),
    };
    let (listener, clients) = (
        Arc::clone(&listening.listener),
        Arc::clone(&listening.clients),
    );
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            // Ends with an error when `Listening` shuts the socket down.
            while let Ok((stream, _)) = listener.accept() {
                serve_apart(stream, &service, &clients);
            }
        })
        .context("cannot start the admin thread")?;
    Ok(listening)
}

/// How many conversations there are, and a bell for when one ends.
#[derive(Debug, Default)]
struct Clients {
    count: Mutex<usize>,
    one_left: Condvar,
}

impl Clients {
    fn count(&self) -> MutexGuard<'_, usize> {
        // A number is whole whoever panicked.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One conversation; counts until it is dropped.
struct Client(Arc<Clients>);

impl Client {
    fn new(clients: &Arc<Clients>) -> Option<Self> {
        let mut count = clients.count();
        if *count >= MAX_CLIENTS {
            return None;
        }
        *count += 1;
        Some(Self(Arc::clone(clients)))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.one_left.notify_all();
    }
}

/// An admin socket that listens. Dropping it waits until those who asked have their answers.
#[derive(Debug)]
pub struct Listening {
    listener: Arc<UnixListener>,
    clients: Arc<Clients>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Wakes the thread in accept, which then ends. Nothing to do if it already has.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        // Every conversation is bounded by PATIENCE on both sides.
        let _ =
            self.clients
                .one_left
                .wait_timeout_while(self.clients.count(), 3 * PATIENCE, |count| *count > 0);
    }
}

fn serve_apart(stream: UnixStream, service: &Arc<impl Service>, clients: &Arc<Clients>) {
    let Some(client) = Client::new(clients) else {
        tracing::warn!("too many admin clients at once; one was turned away");
        return;
    };
    let service = Arc::clone(service);
    let spawned = std::thread::Builder::new()
        .name("admin-client".into())
        .spawn(move || {
            if let Err(error) = converse(&stream, &*service) {
                tracing::debug!(%error, "admin client");
            }
            // After the answer, and only then: `Listening` waits for this.
            drop(client);
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot serve an admin client");
    }
}

fn converse(mut stream: &UnixStream, service: &impl Service) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE_BYTES)).read_line(&mut line)?;
    let answer = match serde_json::from_str(&line) {
        Ok(Command::Stat) => serde_json::to_string(&service.status()),
        Ok(Command::Stop { force }) => {
            answer_with(service.stop(force).map(|()| Stopped { stopped: true }))
        }
        Ok(Command::Leave) => answer_with(service.leave().map(|()| Left { left: true })),
        Ok(Command::Resize { size_bytes, shrink }) => {
            answer_with(service.resize(size_bytes, shrink))
        }
        Err(error) => answer_with::<()>(Err(anyhow::anyhow!("not a command: {error}"))),
    }?;
    stream.write_all(format!("{answer}\n").as_bytes())
}

fn answer_with<A: Serialize>(result: Result<A>) -> serde_json::Result<String> {
    match result {
        Ok(answer) => serde_json::to_string(&answer),
        Err(error) => serde_json::to_string(&Refused {
            error: super::explain(&error),
        }),
    }
}

/// Asks the export whose admin socket is `path` how it is.
///
/// # Errors
///
/// When nobody answers, or not within `limit`.
pub fn stat(path: &Path, limit: Duration) -> Result<ExportStatus> {
    ask(path, Command::Stat, limit)
}

/// Tells the export whose admin socket is `path` to stop, and waits until it has.
///
/// # Errors
///
/// When somebody uses it, unless `force` is true; when nobody answers, or not within `limit`.
pub fn stop(path: &Path, force: bool, limit: Duration) -> Result<()> {
    let Stopped { stopped: _ } = ask(path, Command::Stop { force }, limit)?;
    Ok(())
}

/// Tells the export whose admin socket is `path` to make way for another server, and waits until it
/// has.
///
/// # Errors
///
/// When it cannot be gone on with, when nobody answers, or not within `limit`.
pub fn leave(path: &Path, limit: Duration) -> Result<()> {
    let Left { left: _ } = ask(path, Command::Leave, limit)?;
    Ok(())
}

/// Gives an export another size.
///
/// # Errors
///
/// When the server refuses or does not answer.
pub fn resize(
    path: &Path,
    size_bytes: Option<u64>,
    shrink: bool,
    limit: Duration,
) -> Result<Resized> {
    ask(path, Command::Resize { size_bytes, shrink }, limit)
}

fn ask<A: for<'a> Deserialize<'a>>(path: &Path, command: Command, limit: Duration) -> Result<A> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    (&stream).write_all(format!("{}\n", serde_json::to_string(&command)?).as_bytes())?;
    let mut line = String::new();
    match BufReader::new((&stream).take(MAX_ANSWER_BYTES)).read_line(&mut line) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            bail!("no answer within {} s", limit.as_secs())
        }
        Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        other => other?,
    };
    if let Ok(Refused { error }) = serde_json::from_str(&line) {
        bail!("{error}");
    }
    serde_json::from_str(&line).context("the answer makes no sense (another version?)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Fake(AtomicBool);

    impl Service for Fake {
        fn status(&self) -> ExportStatus {
            ExportStatus {
                name: "a".into(),
                state: "serving".into(),
                access: OwnershipState::Free,
                pid: 1,
                backend: "mem:1M".into(),
                size_bytes: 1 << 20,
                block_bytes: 512,
                read_only: false,
                write_cache: false,
                serial: "a".into(),
                poll_us: "100".into(),
                cpus: Some("2,3".into()),
                ublk: None,
                vhost: None,
            }
        }
        fn resize(&self, size_bytes: Option<u64>, _: bool) -> Result<Resized> {
            let size_bytes = size_bytes.context("no size")?;
            Ok(Resized {
                size_bytes,
                old_size_bytes: 1 << 20,
                untold_clients: 0,
            })
        }
        fn stop(&self, force: bool) -> Result<()> {
            anyhow::ensure!(force, "in use");
            self.0.store(true, Ordering::SeqCst);
            Ok(())
        }
        fn leave(&self) -> Result<()> {
            anyhow::ensure!(self.0.load(Ordering::SeqCst), "not yet");
            Ok(())
        }
    }

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn commands_are_answered_and_nonsense_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("control");
        let fake = Arc::new(Fake::default());
        let listening = listen(&path, Arc::clone(&fake)).unwrap();
        assert_eq!(stat(&path, LIMIT).unwrap(), fake.status());
        assert_eq!(resize(&path, Some(7), false, LIMIT).unwrap().size_bytes, 7);
        let refused = resize(&path, None, false, LIMIT).unwrap_err();
        assert_eq!(refused.to_string(), "no size");
        assert_eq!(leave(&path, LIMIT).unwrap_err().to_string(), "not yet");
        assert_eq!(stop(&path, false, LIMIT).unwrap_err().to_string(), "in use");
        stop(&path, true, LIMIT).unwrap();
        leave(&path, LIMIT).unwrap();
        assert!(fake.0.load(Ordering::SeqCst));
        for nonsense in ["\n", "{}\n", "{\"command\":\"format\"}\n", "\u{0}\n"] {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(nonsense.as_bytes()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("not a command"), "{nonsense}: {answer}");
        }
        // A flood without a line's end is cut off, not collected.
        let mut stream = UnixStream::connect(&path).unwrap();
        let _ = stream.write_all(&vec![b'x'; 1 << 20]);
        drop(listening);
    }

    #[test]
    fn nobody_listens_after_the_handle_is_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("control");
        drop(listen(&path, Arc::new(Fake::default())).unwrap());
        assert!(stat(&path, LIMIT).is_err());
    }
}
