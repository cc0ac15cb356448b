//! The server's side of an admin socket.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::line::read_line;
use super::protocol::{Command, ExportStatus, Left, MAX_LINE_BYTES, Refused, Resized, Stopped};
use crate::engine::event_loop::Registration;
use crate::engine::listen;
use crate::engine::socket::Socket;

/// How long a client may take to say what it wants, and to read the answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);

/// Clients that are answered at once, per export.
const MAX_CLIENTS: usize = 16;

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
    /// Answers `stop`: returns when the export is gone. `openers` are the processes that have the block device open.
    ///
    /// # Errors
    ///
    /// Who uses it, unless that is no matter.
    fn stop(&self, force: bool, openers: Option<String>) -> Result<()>;
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
pub fn serve(export: &str, path: &Path, service: Arc<impl Service>) -> Result<Listening> {
    let listener = Socket::bind(path)?;
    let clients = Arc::<Clients>::default();
    let accepting = {
        let clients = Arc::clone(&clients);
        let on_client = move |stream| answer_apart(stream, &service, &clients);
        listen(format!("{export}: admin socket"), listener, on_client)
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
    /// In the order in which they came, each with its connection as long as it has not said what it wants.
    clients: BTreeMap<u64, Option<Arc<UnixStream>>>,
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
struct Client {
    clients: Arc<Clients>,
    number: u64,
    stream: Arc<UnixStream>,
}

impl Client {
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
}

impl Drop for Client {
    fn drop(&mut self) {
        self.clients.connected().clients.remove(&self.number);
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
        // Every exchange is bounded by CLIENT_LIMIT on both sides.
        let _ = self.clients.one_left.wait_timeout_while(
            self.clients.connected(),
            3 * CLIENT_LIMIT,
            |connected| !connected.clients.is_empty(),
        );
    }
}

fn answer_apart(stream: UnixStream, service: &Arc<impl Service>, clients: &Arc<Clients>) {
    let stream = Arc::new(stream);
    let Some(client) = Client::new(clients, &stream) else {
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
    let busy = anyhow::anyhow!("busy: {MAX_CLIENTS} commands are being answered; try again");
    if let Ok(answer) = answer_with::<()>(Err(busy))
        && stream.set_nonblocking(true).is_ok()
    {
        // A client that has gone does not hear it.
        let _ = stream.write_all(format!("{answer}\n").as_bytes());
    }
}

fn answer(client: &Client, service: &impl Service) -> io::Result<()> {
    let mut stream = &*client.stream;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
    let line = read_line(stream, MAX_LINE_BYTES, Instant::now() + CLIENT_LIMIT)?;
    if !client.has_asked() {
        return Ok(());
    }
    let answer = match serde_json::from_str(&line) {
        Ok(Command::Stat) => serde_json::to_string(&service.status()),
        Ok(Command::Stop { force, openers }) => {
            let stopped = service.stop(force, openers);
            answer_with(stopped.map(|()| Stopped { stopped: true }))
        }
        Ok(Command::Leave) => answer_with(service.leave().map(|()| Left { left: true })),
        Ok(Command::Resize { size_bytes, shrink }) => {
            answer_with(service.resize(size_bytes, shrink))
        }
        Err(error) => answer_with::<()>(Err(anyhow::anyhow!("not a command: {error}"))),
    }?;
    stream.write_all(format!("{answer}\n").as_bytes())
}

/// Answers one client, on the calling thread.
#[cfg(feature = "testing")]
pub(super) fn answer_one(stream: UnixStream, service: &impl Service) -> io::Result<()> {
    let client = Client::new(&Arc::default(), &Arc::new(stream));
    answer(&client.expect("there is room for one"), service)
}

fn answer_with<A: Serialize>(result: Result<A>) -> serde_json::Result<String> {
    match result {
        Ok(answer) => serde_json::to_string(&answer),
        Err(error) => serde_json::to_string(&Refused {
            error: crate::export::explain(&error),
        }),
    }
}
