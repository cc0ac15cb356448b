//! The server's side of an admin socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

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
    /// Answers `stop`: returns when the export is gone.
    ///
    /// # Errors
    ///
    /// Who uses it, unless that is no matter.
    fn stop(&self, force: bool) -> Result<()>;
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

/// How many clients are being answered, and a bell for when one has its answer.
#[derive(Debug, Default)]
struct Clients {
    count: Mutex<usize>,
    one_left: Condvar,
}

impl Clients {
    fn count(&self) -> MutexGuard<'_, usize> {
        // A number is whole after any panic.
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client that is being answered; counts until it is dropped.
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
            self.clients.count(),
            3 * CLIENT_LIMIT,
            |count| *count > 0,
        );
    }
}

fn answer_apart(stream: UnixStream, service: &Arc<impl Service>, clients: &Arc<Clients>) {
    let Some(client) = Client::new(clients) else {
        tracing::warn!("too many admin clients at once; one was turned away");
        return;
    };
    let service = Arc::clone(service);
    let spawned = std::thread::Builder::new()
        .name("admin-client".into())
        .spawn(move || {
            if let Err(error) = answer(&stream, &*service) {
                tracing::debug!(%error, "admin client");
            }
            // After the answer, and only then: `Listening` waits for this.
            drop(client);
        });
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot serve an admin client");
    }
}

fn answer(mut stream: &UnixStream, service: &impl Service) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_LIMIT))?;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
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
            error: crate::export::explain(&error),
        }),
    }
}
