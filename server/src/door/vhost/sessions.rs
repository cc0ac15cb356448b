//! The sessions of a door: which clients are admitted, and when a session is over.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::SystemTime;

use super::connection::Connection;
use super::session::Ending;
use crate::door::ownership::Ownership;
use crate::engine::socket::peer_pid;
use crate::request::Limits;

/// Clients that may be connected at once. Of a writable disk only one of them gets vrings.
const MAX_CLIENTS: usize = 16;

/// Sessions that there may be, those of clients that have hung up included: the storage may keep them
/// from ending.
const MAX_SESSIONS: usize = 2 * MAX_CLIENTS;

/// The state of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionState {
    /// Connected, no vring is served.
    Idle,
    /// Vrings are served.
    Running,
    /// Hung up; requests in flight are being finished.
    Ending,
}

/// A session as `stat` shows it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SessionInfo {
    /// The number of the session on this door, from 1.
    pub id: u64,
    /// The client's process, if the kernel told.
    pub peer_pid: Option<i32>,
    /// When it connected.
    pub since: SystemTime,
    /// Vrings being served.
    pub vrings: usize,
    /// What it is doing.
    pub state: SessionState,
}

impl SessionInfo {
    pub(super) fn of(connection: &Connection) -> Self {
        let vrings = connection.vrings.load(Ordering::Relaxed);
        Self {
            id: connection.id(),
            peer_pid: connection.peer_pid(),
            since: connection.since(),
            vrings,
            state: match vrings {
                _ if connection.is_ending() => SessionState::Ending,
                0 => SessionState::Idle,
                _ => SessionState::Running,
            },
        }
    }
}

/// A protocol thread's main function.
type Serve = dyn Fn(&Arc<Connection>) -> Ending + Send + Sync;

pub(super) struct Shared {
    pub(super) name: String,
    pub(super) limits: Limits,
    pub(super) serve: Box<Serve>,
    pub(super) ownership: Arc<Ownership>,
    pub(super) sessions: Mutex<Sessions>,
    /// A session has gone.
    pub(super) changed: Condvar,
}

#[derive(Default)]
pub(super) struct Sessions {
    pub(super) list: Vec<Arc<Connection>>,
    last_id: u64,
    pub(super) closing: bool,
}

impl Shared {
    pub(super) fn sessions(&self) -> MutexGuard<'_, Sessions> {
        // The list is whole whatever its holder panicked about.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a session on a thread of its own, if there is room for one. Does not wait.
///
/// # Errors
///
/// Why the client is refused.
pub(super) fn admit(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let peer_pid = peer_pid(&stream);
    let peer = peer_pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
    stream.set_nonblocking(false)?;
    let connection = {
        let mut sessions = shared.sessions();
        if sessions.closing {
            return Err(io::Error::other("the door is closing"));
        }
        if is_full(&sessions) {
            return Err(io::Error::other(format!(
                "too many clients (limit {MAX_CLIENTS}), refused pid {peer}"
            )));
        }
        // Better now than when its guest has booted that far.
        if let Some(owner) = shared.ownership.obstacle() {
            return Err(io::Error::other(format!(
                "disk is in use by {owner}, refused pid {peer}"
            )));
        }
        sessions.last_id += 1;
        let limits = shared.limits.clone();
        let connection = Connection::new(&shared.name, sessions.last_id, peer_pid, limits, stream);
        let connection = Arc::new(connection);
        sessions.list.push(Arc::clone(&connection));
        connection
    };
    let guard = Membership {
        shared: Arc::clone(shared),
        connection,
    };
    Builder::new()
        .name(format!("vhost-{}", guard.connection.id()))
        .spawn(move || {
            let connection = &guard.connection;
            tracing::info!(
                export = connection.export(),
                session = connection.id(),
                peer,
                "client connected"
            );
            let ending = (guard.shared.serve)(connection);
            report(connection, ending);
        })?;
    Ok(())
}

/// Whether there is no room for another client. One that reconnects at once must not be refused
/// because its last session is about to end: those whose client has hung up do not count.
fn is_full(sessions: &Sessions) -> bool {
    let all = &sessions.list;
    all.len() >= MAX_SESSIONS
        || all.len() >= MAX_CLIENTS
            && all.iter().filter(|one| !one.hung_up()).count() >= MAX_CLIENTS
}

fn report(connection: &Connection, ending: Ending) {
    let (export, session) = (connection.export(), connection.id());
    match (connection.reason(), ending) {
        (Some(reason), _) => tracing::info!(export, session, "session ended: {reason}"),
        (None, Ending::Left) => tracing::info!(export, session, "client left"),
        (None, Ending::Died) => {
            tracing::warn!(export, session, "client hung up with vrings running");
        }
        (None, Ending::Failed(error)) => {
            tracing::warn!(export, session, "session ended: {error}");
        }
    }
}

/// A session's place in the list, which it leaves when its thread ends, with a panic too.
struct Membership {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut sessions = self.shared.sessions();
        sessions
            .list
            .retain(|other| !Arc::ptr_eq(other, &self.connection));
        drop(sessions);
        self.shared.changed.notify_all();
    }
}
