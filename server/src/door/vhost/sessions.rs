//! The sessions of a door: which clients are admitted, and when a session is over.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::SystemTime;

use super::connection::Connection;
use super::refusals::Refusals;
use super::session::Ending;
use crate::door::ownership::Ownership;
use crate::engine::events::{self, What};
use crate::engine::repeats::Repeats;
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
    /// Apart from the rest, and with it the storage, for threads that see off a client after the door has closed.
    pub(super) refusals: Arc<Refusals>,
    pub(super) log: Log,
    /// A session has gone.
    pub(super) changed: Condvar,
}

/// What the log says of clients. None can fill it by coming again and again.
pub(super) struct Log {
    /// Clients that come and go.
    orderly: Repeats,
    /// Clients that are turned away or break the protocol.
    failed: Repeats,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            orderly: Repeats::new(10),
            failed: Repeats::new(1),
        }
    }
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

/// Starts a session on a thread of its own, if there is room for one; otherwise the client is turned away. Does not
/// wait.
///
/// # Errors
///
/// Why the client is refused. It is logged.
pub(super) fn admit(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let peer_pid = peer_pid(&stream);
    stream.set_nonblocking(false)?;
    let mut sessions = shared.sessions();
    if let Some(why) = obstacle(shared, &sessions) {
        drop(sessions);
        let why = io::Error::other(why);
        refuse(shared, peer_pid, &why);
        let refusals = Arc::clone(&shared.refusals);
        let thread = Builder::new().name("vhost-refused".into());
        // Without a thread the client is cut off.
        let _ = thread.spawn(move || refusals.see_off(&stream));
        return Err(why);
    }
    sessions.last_id += 1;
    let (id, limits) = (sessions.last_id, shared.limits.clone());
    let connection = Arc::new(Connection::new(&shared.name, id, peer_pid, limits, stream));
    sessions.list.push(Arc::clone(&connection));
    drop(sessions);
    start(shared, connection).inspect_err(|why| refuse(shared, peer_pid, why))
}

/// Why no other client can be admitted, if that is so.
fn obstacle(shared: &Shared, sessions: &Sessions) -> Option<String> {
    if sessions.closing {
        return Some("the door is closing".into());
    }
    if is_full(sessions) {
        return Some(format!("too many clients (limit {MAX_CLIENTS})"));
    }
    // Better now than when its guest has booted that far.
    let owner = shared.ownership.obstacle()?;
    Some(format!("disk is in use by {owner}"))
}

fn start(shared: &Arc<Shared>, connection: Arc<Connection>) -> io::Result<()> {
    let guard = Membership {
        shared: Arc::clone(shared),
        connection,
    };
    Builder::new()
        .name(format!("vhost-{}", guard.connection.id()))
        .spawn(move || {
            let (shared, connection) = (Arc::clone(&guard.shared), Arc::clone(&guard.connection));
            if let Some(omitted) = shared.log.orderly.due("connected") {
                tracing::info!(
                    export = connection.export(),
                    session = connection.id(),
                    peer = shown(connection.peer_pid()),
                    "client connected{omitted}"
                );
            }
            let pid = connection.peer_pid();
            events::tell(connection.export(), What::ClientCame { pid });
            let ending = (shared.serve)(&connection);
            report(&shared, &connection, &ending);
            let refusals = Arc::clone(&shared.refusals);
            drop((shared, guard));
            if let Ending::Failed(_) = ending {
                refusals.see_off(connection.stream());
            }
        })?;
    Ok(())
}

/// A client's process, for messages.
fn shown(peer_pid: Option<i32>) -> String {
    peer_pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())
}

/// Logs and notes why a client is not admitted.
fn refuse(shared: &Shared, peer_pid: Option<i32>, why: &io::Error) {
    shared.refusals.note(peer_pid, why);
    let refused = What::ClientRefused {
        pid: peer_pid,
        why: why.to_string(),
    };
    events::tell(&shared.name, refused);
    if let Some(omitted) = shared.log.failed.due_whatever_numbers(&why.to_string()) {
        let (export, pid) = (&shared.name, shown(peer_pid));
        tracing::warn!(
            export,
            "a client was refused: {why}, refused pid {pid}{omitted}"
        );
    }
}

/// Whether there is no room for another client. One that reconnects at once must not be refused
/// because its last session is about to end: those whose client has hung up do not count.
fn is_full(sessions: &Sessions) -> bool {
    let all = &sessions.list;
    all.len() >= MAX_SESSIONS
        || all.len() >= MAX_CLIENTS
            && all.iter().filter(|one| !one.hung_up()).count() >= MAX_CLIENTS
}

/// Publishes as an event how a session ended.
fn tell_end(connection: &Connection, ending: &Ending) {
    let (how, why) = match (connection.reason(), ending) {
        (Some(reason), _) => ("disconnected", reason.to_owned()),
        (None, Ending::Left) => ("left", "it had stopped its vrings".to_owned()),
        (None, Ending::Died { unanswered }) => {
            let why = format!("it had not stopped its vrings; {unanswered} requests under way");
            ("died", why)
        }
        (None, Ending::Failed(why)) => ("failed", why.to_string()),
    };
    let left = What::ClientLeft {
        pid: connection.peer_pid(),
        how: how.into(),
        why,
    };
    events::tell(connection.export(), left);
}

/// Logs how a session ended.
fn report(shared: &Shared, connection: &Connection, ending: &Ending) {
    tell_end(connection, ending);
    let (export, session) = (connection.export(), connection.id());
    let orderly = |text: &str| {
        if let Some(omitted) = shared.log.orderly.due(text) {
            tracing::info!(export, session, "{text}{omitted}");
        }
    };
    match (connection.reason(), ending) {
        (Some(reason), _) => orderly(&format!("session ended: {reason}")),
        (None, Ending::Left) => orderly("client left"),
        // Clients are known that never stop their vrings: libblkio and what is built on it.
        (None, Ending::Died { unanswered: 0 }) => {
            orderly("client hung up without stopping its vrings; no request was under way");
        }
        (None, Ending::Died { unanswered }) => {
            if let Some(omitted) = shared.log.failed.due("died") {
                tracing::warn!(
                    export,
                    session,
                    unanswered,
                    "client hung up with requests under way{omitted}"
                );
            }
        }
        (None, Ending::Failed(why)) => {
            shared.refusals.note(connection.peer_pid(), why);
            let text = why.to_string();
            if let Some(omitted) = shared.log.failed.due_whatever_numbers(&text) {
                tracing::warn!(export, session, "session ended: {text}{omitted}");
            }
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
