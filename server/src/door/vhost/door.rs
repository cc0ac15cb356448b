//! An open vhost door, as the rest of the server sees it.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::config::{MAX_VRINGS, StartError, VhostConfig};
use super::connection::Connection;
use super::refusals::Refusal;
use super::session::{Session, Sizes};
use super::sessions::{Log, SessionInfo, Shared, admit};
use super::spawn::{QueueOptions, spawner};
use crate::engine::counters::CounterSet;
use crate::engine::event_loop::Registration;
use crate::engine::{Storage, listen};

/// How long dropping a door waits for its sessions.
const DROP_GRACE: Duration = Duration::from_secs(10);

/// An open door. It is closed by [`stop`](Self::stop), or when it is dropped.
pub struct VhostDoor {
    shared: Arc<Shared>,
    path: PathBuf,
    removes_socket: bool,
    listening: Option<Registration>,
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
            throttle,
            ownership,
        } = config;
        if !(1..=MAX_VRINGS).contains(&queue_threads) {
            return Err(StartError::QueueThreads(queue_threads));
        }
        let limits = disk.limits().clone();
        let sharing = disk.sharing();
        let serve = {
            let ownership = Arc::clone(&ownership);
            move |connection: &Arc<Connection>| {
                let options = QueueOptions {
                    count: queue_threads,
                    threads: threads.clone(),
                    throttle: Arc::clone(&throttle),
                };
                let (disk, counters) = (Arc::clone(&disk), Arc::clone(&counters));
                let spawn = spawner(Arc::clone(connection), options, disk, counters);
                let sizes = Sizes {
                    queues,
                    threads: queue_threads,
                };
                let connection = Arc::clone(connection);
                let mut session = Session::new(connection, sizes, spawn, Arc::clone(&ownership));
                session.share_memory(sharing.clone());
                session.serve()
            }
        };
        let shared = Arc::new(Shared {
            name,
            limits,
            serve: Box::new(serve),
            ownership,
            sessions: Mutex::default(),
            refusals: Arc::default(),
            log: Log::default(),
            changed: Condvar::new(),
        });
        let (path, removes_socket) = (socket.path().to_owned(), socket.is_own());
        let listening = listen(format!("{}: vhost socket", shared.name), socket, {
            let shared = Arc::clone(&shared);
            move |stream| {
                // A refusal is logged there.
                let _ = admit(&shared, stream);
            }
        })?;
        Ok(Self {
            shared,
            path,
            removes_socket,
            listening: Some(listening),
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the socket's file goes away with the door.
    #[must_use]
    pub fn removes_socket(&self) -> bool {
        self.removes_socket
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
        sessions
            .list
            .iter()
            .map(|one| SessionInfo::of(one))
            .collect()
    }

    /// The last client that was turned away.
    #[must_use]
    pub fn last_refusal(&self) -> Option<Refusal> {
        self.shared.refusals.last()
    }

    /// Tells all clients that the size of the disk has changed. Returns how many cannot be told: they
    /// see it when they connect anew.
    #[must_use]
    pub fn tell_new_size(&self) -> usize {
        let sessions = self.shared.sessions();
        let untold = |connection: &&Arc<Connection>| !connection.tell_config_change();
        sessions.list.iter().filter(untold).count()
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
        drop(listening);
        let sessions = self.shared.sessions();
        for connection in &sessions.list {
            connection.hang_up("the server closed the door");
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
