//! The vhost door: a vhost-user-blk socket (QEMU's docs/interop/vhost-user.rst, virtio 1.3).
//!
//! A [`VhostDoor`] owns a listening socket and a thread that sleeps in poll(2). Each client gets a
//! session: a protocol thread, and queue threads that are started with the first vring they serve.
//! All of them end with the session, and nothing of it stays.

mod block;
mod channel;
mod connection;
mod dirty;
mod inflight;
mod memory;
mod queue;
mod session;
mod sigbus;
mod socket;
mod spawn;
mod virtqueue;
mod vring;

pub use socket::SocketError;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::door::ownership::Ownership;
use crate::engine::Storage;
use crate::engine::counters::CounterSet;
use crate::engine::threads::ThreadOptions;
use connection::Connection;
use session::{Ending, Sizes};
use socket::Socket;
use spawn::{QueueOptions, spawner};

/// Vrings one session may have. A vring costs nothing before it is set up.
pub const MAX_VRINGS: u16 = 256;

/// Clients that may be connected at once. Of a writable disk only one of them gets vrings.
const MAX_SESSIONS: usize = 16;

/// How long a new client waits for one that hung up to be gone.
const SUCCESSION_LIMIT: Duration = Duration::from_secs(10);

/// How long dropping a door waits for its sessions.
const DROP_GRACE: Duration = Duration::from_secs(10);

/// What a door is made of.
#[derive(Clone, Debug)]
pub struct VhostConfig {
    /// The name of the export, for messages.
    pub name: String,
    /// Where clients connect.
    pub socket: PathBuf,
    /// Virtqueues that clients are told to use; they may have [`MAX_VRINGS`].
    pub queues: u16,
    /// Queue threads per session, 1 at least and [`MAX_VRINGS`] at most.
    pub queue_threads: u16,
    /// How they run.
    pub threads: ThreadOptions,
    /// Who may write.
    pub access: Arc<Ownership>,
}

/// Why a door cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The number of queue threads.
    #[error("{0} queue threads per client are not possible; choose 1 to {MAX_VRINGS}")]
    QueueThreads(u16),
    /// Threads or descriptors.
    #[error("cannot start the vhost door: {0}")]
    System(#[from] io::Error),
}

/// The state of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SessionState {
    /// Connected, no vring is served.
    Idle,
    /// Vrings are served.
    Running,
    /// Hung up; what is under way is being finished.
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

/// An open door. It is closed by [`stop`](Self::stop), or when it is dropped.
pub struct VhostDoor {
    shared: Arc<Shared>,
    path: PathBuf,
    listening: Option<JoinHandle<()>>,
}

/// A protocol thread's main function.
type Serve = dyn Fn(&Arc<Connection>) -> io::Result<Ending> + Send + Sync;

struct Shared {
    name: String,
    limits: crate::request::Limits,
    serve: Box<Serve>,
    access: Arc<Ownership>,
    sessions: Mutex<Sessions>,
    /// A session has gone, or the door closes.
    changed: Condvar,
    /// Wakes the listening thread when the door closes.
    bell: OwnedFd,
}

#[derive(Default)]
struct Sessions {
    list: Vec<Arc<Connection>>,
    last_id: u64,
    closing: bool,
}

impl VhostDoor {
    /// Opens the door to `disk`.
    ///
    /// # Errors
    ///
    /// [`StartError`], each with what to do about it.
    pub fn start<B: Storage>(
        config: VhostConfig,
        disk: Arc<B>,
        counters: Arc<CounterSet>,
    ) -> Result<Self, StartError> {
        let VhostConfig {
            name,
            socket,
            queues,
            queue_threads,
            threads,
            access,
        } = config;
        if !(1..=MAX_VRINGS).contains(&queue_threads) {
            return Err(StartError::QueueThreads(queue_threads));
        }
        let socket = Socket::bind(&socket)?;
        let limits = disk.limits().clone();
        let serve = {
            let access = Arc::clone(&access);
            move |link: &Arc<Connection>| {
                let options = QueueOptions {
                    count: queue_threads,
                    threads: threads.clone(),
                };
                let (link_of_queues, disk) = (Arc::clone(link), Arc::clone(&disk));
                let spawn = spawner(link_of_queues, options, disk, Arc::clone(&counters));
                let sizes = Sizes {
                    queues,
                    threads: queue_threads,
                };
                session::serve_connection(link, sizes, spawn, &access)
            }
        };
        let shared = Arc::new(Shared {
            name,
            limits,
            serve: Box::new(serve),
            access,
            sessions: Mutex::default(),
            changed: Condvar::new(),
            bell: eventfd(0, EventfdFlags::CLOEXEC).map_err(io::Error::from)?,
        });
        let path = socket.path().to_owned();
        let listening = Builder::new().name("vhost-listen".into()).spawn({
            let shared = Arc::clone(&shared);
            move || listen(&shared, &socket)
        })?;
        Ok(Self {
            shared,
            path,
            listening: Some(listening),
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves a client that is connected already, as if it had come through the socket.
    ///
    /// # Errors
    ///
    /// When another client has the disk, there are too many, or the door is closing.
    pub fn adopt(&self, stream: UnixStream) -> io::Result<()> {
        admit(&self.shared, stream)
    }

    /// [`adopt`](Self::adopt) for another thread, which may outlive the door.
    pub fn adopter(&self) -> impl Fn(UnixStream) -> io::Result<()> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move |stream| admit(&shared, stream)
    }

    /// The sessions there are.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let sessions = self.shared.sessions();
        let info = |link: &Arc<Connection>| {
            let vrings = link.vrings.load(Ordering::Relaxed);
            let state = if link.is_ending() {
                SessionState::Ending
            } else if vrings > 0 {
                SessionState::Running
            } else {
                SessionState::Idle
            };
            SessionInfo {
                id: link.id(),
                peer_pid: link.peer_pid(),
                since: link.since(),
                vrings,
                state,
            }
        };
        sessions.list.iter().map(info).collect()
    }

    /// Tells all clients that the size of the disk has changed. Returns how many cannot be told: they
    /// see it when they connect anew.
    #[must_use]
    pub fn tell_new_size(&self) -> usize {
        let sessions = self.shared.sessions();
        let told = |link: &&Arc<Connection>| !link.tell_config_change();
        sessions.list.iter().filter(told).count()
    }

    /// Closes the door: removes the socket, hangs up on all clients, and finishes what they had
    /// under way. Returns how many sessions were not finished within `grace`.
    pub fn stop(mut self, grace: Duration) -> usize {
        self.close(grace)
    }

    fn close(&mut self, grace: Duration) -> usize {
        let Some(listening) = self.listening.take() else {
            return 0;
        };
        self.shared.sessions().closing = true;
        self.shared.changed.notify_all();
        // The write fails only if the counter is at its end, and then the bell is ringing anyway.
        let _ = rustix::io::write(&self.shared.bell, &1u64.to_ne_bytes());
        if listening.join().is_err() {
            tracing::error!(export = self.shared.name, "the listening thread panicked");
        }
        let sessions = self.shared.sessions();
        for link in &sessions.list {
            link.hang_up("the server closed the door");
        }
        let (sessions, _) = self
            .shared
            .changed
            .wait_timeout_while(sessions, grace, |sessions| !sessions.list.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        sessions.list.len()
    }
}

impl Drop for VhostDoor {
    fn drop(&mut self) {
        let left = self.close(DROP_GRACE);
        if left > 0 {
            tracing::error!(export = self.shared.name, left, "sessions did not end");
        }
    }
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        // The list is whole whatever its holder panicked about.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Accepts clients until the bell rings.
fn listen(shared: &Arc<Shared>, socket: &Socket) {
    loop {
        let mut fds = [
            PollFd::new(socket.listener(), PollFlags::IN),
            PollFd::new(&shared.bell, PollFlags::IN),
        ];
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(export = shared.name, %error, "cannot wait for clients");
            return;
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        match socket.listener().accept() {
            Ok((stream, _)) => {
                if let Err(error) = stream
                    .set_nonblocking(false)
                    .and_then(|()| admit(shared, stream))
                {
                    tracing::warn!(export = shared.name, "a client was refused: {error}");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(export = shared.name, %error, "cannot accept a client");
                // Out of descriptors, say: the client stays in the queue and must not make this
                // thread spin.
                let sessions = shared.sessions();
                let _ = shared
                    .changed
                    .wait_timeout_while(sessions, Duration::from_secs(1), |s| !s.closing);
            }
        }
    }
}

/// Starts a session, if there is room for one.
fn admit(shared: &Arc<Shared>, stream: UnixStream) -> io::Result<()> {
    let peer_pid = socket::peer_pid(&stream);
    let peer = peer_pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
    let link = {
        let mut sessions = wait_for_room(shared);
        if sessions.closing {
            return Err(io::Error::other("the door is closing"));
        }
        if sessions.list.len() >= MAX_SESSIONS {
            return Err(io::Error::other(format!(
                "process {peer} is one too many, the export serves {MAX_SESSIONS} at once"
            )));
        }
        // Better now than when its guest has booted that far.
        if let Some(holder) = shared.access.obstacle() {
            return Err(io::Error::other(format!(
                "process {peer} comes too late, {holder} has the disk"
            )));
        }
        sessions.last_id += 1;
        let limits = shared.limits.clone();
        let link = Connection::new(&shared.name, sessions.last_id, peer_pid, limits, stream);
        let link = Arc::new(link);
        sessions.list.push(Arc::clone(&link));
        link
    };
    let guard = Membership {
        shared: Arc::clone(shared),
        link,
    };
    Builder::new()
        .name(format!("vhost-{}", guard.link.id()))
        .spawn(move || {
            let link = &guard.link;
            tracing::info!(
                export = link.export(),
                session = link.id(),
                peer,
                "client connected"
            );
            let ending = (guard.shared.serve)(link);
            report(link, ending);
        })?;
    Ok(())
}

/// Waits while the only thing in a new client's way are sessions that are about to end: whoever
/// reconnects at once must not be refused because of its own past.
fn wait_for_room(shared: &Shared) -> MutexGuard<'_, Sessions> {
    let deadline = Instant::now() + SUCCESSION_LIMIT;
    let mut sessions = shared.sessions();
    loop {
        let full = sessions.list.len() >= MAX_SESSIONS;
        let now = Instant::now();
        if sessions.closing
            || !full
            || now >= deadline
            || !sessions.list.iter().any(|link| link.hung_up())
        {
            return sessions;
        }
        sessions = shared
            .changed
            .wait_timeout(sessions, deadline - now)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

fn report(link: &Connection, ending: io::Result<Ending>) {
    let (export, session) = (link.export(), link.id());
    match (link.reason(), ending) {
        (Some(reason), _) => tracing::info!(export, session, "session ended: {reason}"),
        (None, Ok(Ending::Left)) => tracing::info!(export, session, "client left"),
        (None, Ok(Ending::Died)) => {
            tracing::warn!(export, session, "client hung up with vrings running");
        }
        (None, Ok(Ending::Failed(error))) => {
            tracing::warn!(export, session, "session ended: {error}");
        }
        (None, Err(error)) => tracing::error!(export, session, "session failed: {error}"),
    }
}

/// A session's place in the list; it is given up when the session's thread ends, however it does.
struct Membership {
    shared: Arc<Shared>,
    link: Arc<Connection>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut sessions = self.shared.sessions();
        sessions.list.retain(|link| !Arc::ptr_eq(link, &self.link));
        drop(sessions);
        self.shared.changed.notify_all();
    }
}
