//! The server's side of an admin socket.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use upgrade_proto::Peer;

use super::protocol::{
    Changed, Command, ExportStatus, Left, MAX_LINE_BYTES, Opened, Request, Resized, Stopped,
    Wanted, Wants, answer_with, understand,
};
use super::stream;
use crate::engine::event_loop::Registration;
use crate::engine::events::{Ender, Reader};
use crate::engine::line::read_line;
use crate::engine::listen;
use crate::engine::socket::{Socket, SocketAccess};
use crate::engine::{SnapshotProgress, SnapshotStep};

/// How long a client may take to say what it wants, and to read the answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);

/// How long a client may take to open something: longer than it waits for others.
const OPENING_LIMIT: Duration = Duration::from_secs(10);

/// Clients that are answered at once, per export.
const MAX_CLIENTS: usize = 16;

/// Clients that watch events at once, per socket.
const MAX_WATCHERS: usize = 16;

/// What a client gets.
pub enum Reply {
    /// One line.
    Answer(Value),
    /// Events.
    Events(Reader),
}

/// What answers at an admin socket.
pub trait Answerer: Send + Sync + 'static {
    /// Does what a client asks.
    ///
    /// # Errors
    ///
    /// Why not.
    fn answer(&self, request: Request, client: Client) -> Result<Reply>;
}

/// Who asks.
#[derive(Debug)]
pub struct Client {
    /// Its user, if that is known.
    pub uid: Option<u32>,
    /// What came with the request.
    pub descriptors: Vec<OwnedFd>,
    /// Its connection.
    stream: Arc<UnixStream>,
}

impl Client {
    /// Has the client open something; the descriptors that it hands over.
    ///
    /// # Errors
    ///
    /// Why the client has not opened it.
    pub fn open(&self, wanted: Wanted) -> Result<Vec<OwnedFd>> {
        let mut stream = &*self.stream;
        let line = serde_json::to_string(&Wants { wants: wanted })?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        let deadline = Instant::now() + OPENING_LIMIT;
        let (line, descriptors) = read_line(stream, MAX_LINE_BYTES, deadline)?;
        let Opened { opened: _ } = understand(&line)?;
        Ok(descriptors)
    }
}

impl<S: Service> Answerer for S {
    fn answer(&self, request: Request, _: Client) -> Result<Reply> {
        let name = self.name();
        if let Some(other) = request.export.filter(|export| export != name) {
            bail!("this is the admin socket of '{name}', not of '{other}'");
        }
        answer_for(self, request.command)
    }
}

/// Does what an export is asked.
///
/// # Errors
///
/// Why not.
pub fn answer_for(export: &impl Service, command: Command) -> Result<Reply> {
    let answer = match command {
        Command::Stat {} => serde_json::to_value(export.status()),
        Command::Stop { force, openers } => {
            export.stop(force, openers)?;
            serde_json::to_value(Stopped { stopped: true })
        }
        Command::Leave {} => {
            export.leave()?;
            serde_json::to_value(Left { left: true })
        }
        Command::Resize { size_bytes, shrink } => {
            serde_json::to_value(export.resize(size_bytes, shrink)?)
        }
        Command::Snapshot { step } => serde_json::to_value(export.snapshot(step)?),
        Command::Set { options } => {
            export.set(options)?;
            serde_json::to_value(Changed { changed: true })
        }
        Command::Events {} => {
            let own = export.name().to_owned();
            return Ok(Reply::Events(Reader::new(move |name| name == own)?));
        }
        Command::Server {} | Command::Add(_) => {
            bail!("this is the admin socket of an export: ask that of its server")
        }
    };
    Ok(Reply::Answer(answer?))
}

/// What an export does for its admin socket.
pub trait Service: Send + Sync + 'static {
    /// Its name.
    fn name(&self) -> &str;
    /// Answers `stat`.
    fn status(&self) -> ExportStatus;
    /// Answers `resize`.
    ///
    /// # Errors
    ///
    /// Why it keeps its size.
    fn resize(&self, size_bytes: Option<u64>, shrink: bool) -> Result<Resized>;
    /// Answers `snapshot`.
    ///
    /// # Errors
    ///
    /// Why the step is not done.
    fn snapshot(&self, step: SnapshotStep) -> Result<SnapshotProgress>;
    /// Answers `stop`: returns when the export is gone. `openers` are the processes that have the block device open.
    ///
    /// # Errors
    ///
    /// Who uses it, unless that is no matter.
    fn stop(&self, force: bool, openers: Option<String>) -> Result<()>;
    /// Answers `set`.
    ///
    /// # Errors
    ///
    /// What cannot be changed; then nothing is.
    fn set(&self, options: BTreeMap<String, String>) -> Result<()>;
    /// Answers `leave`: returns when another server may take the export over.
    ///
    /// # Errors
    ///
    /// Why that is not possible.
    fn leave(&self) -> Result<()>;
}

/// Listens on `path` and answers each client on a thread of its own, until the process ends or the
/// returned handle is dropped.
///
/// # Errors
///
/// When the socket cannot be made.
pub fn serve(
    what: &str,
    path: &Path,
    access: &SocketAccess,
    service: Arc<impl Answerer>,
) -> Result<Listening> {
    listen_at(what, Socket::bind(path, access)?, service)
}

/// As [`serve`], on a socket that is there.
///
/// # Errors
///
/// When it cannot be watched.
pub fn listen_at(what: &str, listener: Socket, service: Arc<impl Answerer>) -> Result<Listening> {
    let clients = Arc::<Clients>::default();
    let accepting = {
        let clients = Arc::clone(&clients);
        let on_client = move |stream| answer_apart(stream, &service, &clients);
        listen(format!("{what}: admin socket"), listener, on_client)
    };
    Ok(Listening {
        accepting: Some(accepting.context("cannot watch the admin socket")?),
        clients,
    })
}

/// The clients that are connected, and a bell for when one has its answer.
#[derive(Debug, Default)]
struct Clients {
    connected: Mutex<Connected>,
    one_left: Condvar,
}

#[derive(Debug, Default)]
struct Connected {
    last_number: u64,
    closing: bool,
    /// In the order in which they came, each with its connection as long as it has not said what it wants.
    clients: BTreeMap<u64, Option<Arc<UnixStream>>>,
    /// Those that watch events, which are no longer among `clients`.
    watchers: BTreeMap<u64, Ender>,
}

impl Clients {
    fn connected(&self) -> MutexGuard<'_, Connected> {
        // No code that can panic runs under the lock.
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client that is connected, until it is dropped.
struct Connection {
    clients: Arc<Clients>,
    number: u64,
    stream: Arc<UnixStream>,
}

impl Connection {
    /// Makes room for the client by hanging up on the one that has been silent for longest. `None` if all others wait for
    /// their answers.
    fn new(clients: &Arc<Clients>, stream: &Arc<UnixStream>) -> Option<Self> {
        let mut connected = clients.connected();
        if connected.clients.len() >= MAX_CLIENTS {
            let silent = |(number, stream): (&u64, &Option<_>)| Some((*number, stream.clone()?));
            let (number, stream) = connected.clients.iter().find_map(silent)?;
            connected.clients.remove(&number);
            // Its thread reads an end of file. It fails only when the client was faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
        connected.last_number += 1;
        let number = connected.last_number;
        connected.clients.insert(number, Some(Arc::clone(stream)));
        Some(Self {
            clients: Arc::clone(clients),
            number,
            stream: Arc::clone(stream),
        })
    }

    /// The client has said what it wants, and is no longer hung up on. Returns false if it was before.
    fn has_asked(&self) -> bool {
        let mut connected = self.clients.connected();
        let client = connected.clients.get_mut(&self.number);
        client.is_some_and(|silent| silent.take().is_some())
    }

    /// From now on the client watches events, and takes no place of those that ask.
    fn watches(&self, events: &Reader) -> Result<()> {
        let mut connected = self.clients.connected();
        ensure!(
            connected.watchers.len() < MAX_WATCHERS,
            "busy: {MAX_WATCHERS} clients watch events already"
        );
        connected.clients.remove(&self.number);
        connected.watchers.insert(self.number, events.ender());
        if connected.closing {
            events.ender().end();
        }
        Ok(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut connected = self.clients.connected();
        connected.clients.remove(&self.number);
        connected.watchers.remove(&self.number);
        drop(connected);
        self.clients.one_left.notify_all();
    }
}

/// An admin socket that listens. Dropping it waits until all clients have their answers.
#[derive(Debug)]
pub struct Listening {
    accepting: Option<Registration>,
    clients: Arc<Clients>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        drop(self.accepting.take());
        let mut connected = self.clients.connected();
        connected.closing = true;
        for watcher in connected.watchers.values() {
            watcher.end();
        }
        // Every exchange is bounded by CLIENT_LIMIT on both sides, and a watcher that is ended waits for nothing.
        let _ =
            self.clients
                .one_left
                .wait_timeout_while(connected, 3 * CLIENT_LIMIT, |connected| {
                    !connected.clients.is_empty() || !connected.watchers.is_empty()
                });
    }
}

fn answer_apart(stream: UnixStream, service: &Arc<impl Answerer>, clients: &Arc<Clients>) {
    let stream = Arc::new(stream);
    let Some(client) = Connection::new(clients, &stream) else {
        tracing::warn!("too many admin clients at once; one was turned away");
        turn_away(&stream);
        return;
    };
    let service = Arc::clone(service);
    let spawned = std::thread::Builder::new()
        .name("admin-client".into())
        .spawn(move || {
            if let Err(error) = answer(&client, &*service) {
                tracing::debug!(%error, "admin client");
            }
            // After the answer, and only then: `Listening` waits for this.
            drop(client);
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot serve an admin client");
    }
}

/// Tells a client that the server is busy. The thread of all listeners waits for no client.
fn turn_away(mut stream: &UnixStream) {
    let busy = anyhow!("busy: {MAX_CLIENTS} commands are being answered; try again");
    if let Ok(answer) = answer_with::<Value>(Err(busy))
        && stream.set_nonblocking(true).is_ok()
    {
        // A client that has gone does not hear it.
        let _ = stream.write_all(format!("{answer}\n").as_bytes());
    }
}

fn answer(client: &Connection, service: &impl Answerer) -> io::Result<()> {
    let mut stream = &*client.stream;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
    let deadline = Instant::now() + CLIENT_LIMIT;
    let (line, descriptors) = read_line(stream, MAX_LINE_BYTES, deadline)?;
    if !client.has_asked() {
        return Ok(());
    }
    let asks = Client {
        uid: Peer::of(stream).ok().map(|peer| peer.uid),
        descriptors,
        stream: Arc::clone(&client.stream),
    };
    let reply = Request::parse(&line)
        .map_err(|error| anyhow!("not a command: {error}"))
        .and_then(|request| service.answer(request, asks));
    let answer = match reply {
        Ok(Reply::Events(events)) => match client.watches(&events) {
            Ok(()) => return stream::send(stream, &events),
            Err(error) => answer_with::<Value>(Err(error)),
        },
        Ok(Reply::Answer(answer)) => answer_with(Ok(answer)),
        Err(error) => answer_with::<Value>(Err(error)),
    }?;
    stream.write_all(format!("{answer}\n").as_bytes())
}

/// Answers one client, on the calling thread.
#[cfg(feature = "testing")]
pub(super) fn answer_one(stream: UnixStream, service: &impl Service) -> io::Result<()> {
    let clients = Arc::<Clients>::default();
    // A client that watches events sees the beginning and the end.
    clients.connected().closing = true;
    let client = Connection::new(&clients, &Arc::new(stream));
    answer(&client.expect("there is room for one"), service)
}
