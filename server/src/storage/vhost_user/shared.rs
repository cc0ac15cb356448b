//! What the queues of a disk and its control thread share.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::disk::Disk;
use super::flushes::{Flushes, Known, Pause};
use super::memory::{BounceMemory, Regions};
use super::virtqueue::Virtqueue;
use super::vring::Violation;
use crate::engine::{Changed, MappedFile, SharedMemory, Sharing};
use crate::request::Capacity;
use crate::storage::failures::Failures;

/// How long a client waits for the server to map its memory. After that requests are copied until it has.
const SHARE_LIMIT: Duration = Duration::from_secs(2);

/// What the control thread is asked for.
pub(super) enum Order {
    /// Have the server map a region, and say so when that has been tried.
    Share(u64, mpsc::Sender<()>),
    /// Have the server unmap it.
    Unshare(u64),
    /// Read the server's configuration, and say how large the disk is.
    Look(mpsc::Sender<Result<u64, String>>),
    /// Leave the server and end.
    End,
}

/// The connection as others see it.
#[derive(Debug)]
struct Connection {
    epoch: u64,
    pause: Pause,
    /// To end it.
    stream: Option<UnixStream>,
    /// Since when there is none, and why.
    away: Option<(Instant, String)>,
    /// How the server broke the protocol.
    violation: Option<Violation>,
}

pub(super) struct Shared {
    pub(super) export: String,
    pub(super) socket: PathBuf,
    /// What the doors were told of. What a server offers later is the same or more, except for its size.
    pub(super) disk: Disk,
    /// The size that the disk has for its users.
    pub(super) capacity: Capacity,
    pub(super) regions: Arc<Regions>,
    pub(super) bounce: Arc<BounceMemory>,
    pub(super) queues: Box<[Arc<Virtqueue>]>,
    /// What flushes have to answer for, if the disk has a cache.
    flushes: Option<Arc<Flushes>>,
    pub(super) failures: Failures,
    /// Requests whose data was copied.
    pub(super) copied: Arc<AtomicU64>,
    /// The size of the disk as the server told it last.
    pub(super) size_bytes: AtomicU64,
    pub(super) on_change: OnceLock<Changed>,
    /// The export was told that the size has changed, and has not asked for it yet: it follows in a thread each time that
    /// it is told.
    pub(super) is_told_of_change: AtomicBool,
    orders: mpsc::Sender<Order>,
    /// Wakes the control thread.
    bell: Arc<OwnedFd>,
    connection: Mutex<Connection>,
}

impl Shared {
    pub(super) fn new(
        (export, socket): (String, PathBuf),
        (disk, capacity): (Disk, Capacity),
        (queues, flushes): (Box<[Arc<Virtqueue>]>, Option<Arc<Flushes>>),
        bounce: BounceMemory,
        (orders, bell): (mpsc::Sender<Order>, Arc<OwnedFd>),
    ) -> Self {
        Self {
            export,
            socket,
            size_bytes: disk.size_bytes.into(),
            disk,
            capacity,
            regions: Arc::default(),
            bounce: Arc::new(bounce),
            queues,
            flushes,
            failures: Failures::default(),
            copied: Arc::default(),
            on_change: OnceLock::new(),
            is_told_of_change: AtomicBool::new(false),
            orders,
            bell,
            connection: Mutex::new(Connection {
                epoch: 0,
                pause: Pause::default(),
                stream: None,
                away: None,
                violation: None,
            }),
        }
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // Its parts do not depend on each other.
        (self.connection.lock()).unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of the storage, for messages.
    pub(super) fn name(&self) -> String {
        format!("vhost-user:{}", self.socket.display())
    }

    /// Asks the control thread for something. Without effect when it has ended.
    pub(super) fn ask(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            // It fails only if the counter is at its end, and then it is readable.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// Tells the export that the disk has another size, once until it has looked.
    pub(super) fn tell_change(&self) {
        if let Some(tell) = self.on_change.get()
            && !self.is_told_of_change.swap(true, Ordering::AcqRel)
        {
            tell();
        }
    }

    /// Asks the server how large the disk is.
    pub(super) fn look(&self, limit: Duration) -> Result<u64, String> {
        let (sender, answer) = mpsc::channel();
        self.ask(Order::Look(sender));
        match answer.recv_timeout(limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err("the server does not answer".into()),
            Err(RecvTimeoutError::Disconnected) => Err("the disk is being closed".into()),
        }
    }

    /// There is a connection; returns its number.
    pub(super) fn connected(&self, stream: UnixStream) -> u64 {
        let mut connection = self.connection();
        connection.epoch += 1;
        connection.stream = Some(stream);
        connection.violation = None;
        connection.epoch
    }

    /// Requests are served.
    pub(super) fn arrived(&self) {
        self.connection().away = None;
    }

    /// Ends the connection, whatever the control thread waits for.
    pub(super) fn hang_up(&self) {
        if let Some(stream) = &self.connection().stream {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// There is none any more. Returns how the server broke the protocol, if it was that.
    pub(super) fn disconnected(&self) -> Option<Violation> {
        let mut connection = self.connection();
        connection.stream = None;
        connection.violation.take()
    }

    /// Notes why there is no server. Returns whether that is new.
    pub(super) fn set_away(&self, why: &str) -> bool {
        let mut connection = self.connection();
        let is_new = connection.away.as_ref().is_none_or(|(_, was)| was != why);
        let since = connection
            .away
            .as_ref()
            .map_or_else(Instant::now, |(since, _)| *since);
        connection.away = Some((since, why.to_owned()));
        is_new
    }

    /// The server broke the protocol in the connection with this number, which ends.
    #[cold]
    pub(super) fn violated(&self, (epoch, violation): (u64, Violation)) {
        let mut connection = self.connection();
        if connection.epoch == epoch && connection.violation.is_none() {
            connection.violation = Some(violation);
            if let Some(stream) = &connection.stream {
                // The control thread finds it closed.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }

    /// The server is gone, and no virtqueue has it any more. Flushes fail if it may have lost what it had answered; returns
    /// how many writes these are.
    fn fail_flushes(&self) -> u64 {
        let Some(flushes) = &self.flushes else {
            return 0;
        };
        let lost = flushes.lost();
        if lost > 0 {
            let failed = self.queues.iter().map(|queue| queue.fail_flushes());
            if failed.sum::<usize>() > 0 {
                flushes.told();
            }
        }
        lost
    }

    /// The server is about to be ended by who started it, who says [`settle`](Self::settle) with what came of it. False if that
    /// is so already.
    pub(super) fn pause(&self) -> bool {
        self.connection().pause.begin()
    }

    /// Whether the connection ends because the server is being ended on purpose.
    pub(super) fn is_paused(&self) -> bool {
        self.connection().pause.is_begun()
    }

    /// The server has flushed all that it had answered before it ended, or that is not known.
    pub(super) fn settle(&self, is_flushed: bool) {
        let known = self.connection().pause.settle(is_flushed);
        self.learn(known);
    }

    /// No virtqueue has the server any more. Returns how many answered writes it may have lost, if that is known.
    pub(super) fn forgotten(&self) -> u64 {
        let known = self.connection().pause.disconnected();
        self.learn(known)
    }

    /// No server has requests, and one is about to get them: what the one before may have lost is settled now.
    pub(super) fn end_pause(&self) {
        let known = self.connection().pause.end();
        self.learn(known);
    }

    fn learn(&self, known: Known) -> u64 {
        match (known, &self.flushes) {
            (Known::Lost, _) => self.fail_flushes(),
            (Known::Flushed, Some(flushes)) => {
                flushes.all_flushed();
                0
            }
            _ => 0,
        }
    }

    /// How many requests there are that have not ended.
    pub(super) fn pending(&self) -> usize {
        self.queues.iter().map(|queue| queue.counts().1).sum()
    }

    /// Why requests wait, if there is no server.
    pub(super) fn waits_for(&self) -> Option<String> {
        let connection = self.connection();
        let (since, why) = connection.away.as_ref()?;
        let seconds = since.elapsed().as_secs();
        let name = self.name();
        let why = why.strip_prefix(&format!("{name}: ")).unwrap_or(why);
        Some(format!("{name} has been away for {seconds} s: {why}"))
    }

    /// Counts a request whose data is copied.
    pub(super) fn count_copy(&self) {
        self.copied.fetch_add(1, Ordering::Relaxed);
    }
}

/// Where doors share memory.
pub(super) struct Memory(pub(super) Arc<Shared>);

/// A region that requests lie in.
struct Hold {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.regions.set_gone(self.id);
        self.shared.ask(Order::Unshare(self.id));
    }
}

impl Sharing for Memory {
    fn share(&self, memory: MappedFile<'_>) -> std::io::Result<SharedMemory> {
        let shared = Arc::clone(&self.0);
        let id = shared.regions.add(memory)?.id;
        let hold = Hold { shared, id };
        let (sender, tried) = mpsc::channel();
        hold.shared.ask(Order::Share(id, sender));
        if self.0.connection().away.is_none() {
            // If it takes longer, requests are copied meanwhile.
            let _ = tried.recv_timeout(SHARE_LIMIT);
        }
        Ok(SharedMemory::new(hold))
    }
}
