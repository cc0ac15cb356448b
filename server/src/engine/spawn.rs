//! How queue threads are started, and how their ends are reported.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::end::End;
use super::queue_thread::QueueThread;
use super::{DoorQueue, Storage};

/// A queue thread that was started.
#[derive(Debug)]
pub struct Spawned {
    thread: JoinHandle<()>,
    started: mpsc::Receiver<io::Result<()>>,
}

impl Spawned {
    /// Waits, for at most `limit`, until the thread is about to serve.
    ///
    /// # Errors
    ///
    /// Why its loop could not be made, or that it was not within `limit`.
    pub fn wait_started(&self, limit: Duration) -> io::Result<()> {
        match self.started.recv_timeout(limit) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => {
                Err(io::Error::other("its thread was not ready in time"))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(io::Error::other("its thread panicked at its start"))
            }
        }
    }

    /// The thread, to be joined.
    #[must_use]
    pub fn into_thread(self) -> JoinHandle<()> {
        self.thread
    }
}

/// Starts a queue thread. On that thread `make` puts it where it belongs and makes its loop, and
/// [`Spawned::wait_started`] returns what came of it.
///
/// `on_end` is called with the end of a loop that was made, on the thread and as its last action:
/// ring, descriptors and memory of the loop have been let go of, or leaked. If the loop could not be
/// made, `on_end` is dropped.
///
/// # Errors
///
/// When there can be no more threads.
pub fn spawn_queue<D: DoorQueue, B: Storage>(
    name: String,
    make: impl FnOnce() -> io::Result<QueueThread<D, B>> + Send + 'static,
    on_end: impl FnOnce(End) + Send + 'static,
) -> io::Result<Spawned> {
    let (report, started) = mpsc::channel();
    let thread = Builder::new().name(name).spawn(move || {
        let made = catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|panic| {
            let end = End::panicked(&*panic);
            Err(io::Error::other(end.to_string()))
        });
        // Without a receiver the thread is about to be told by its mailbox to end.
        match made {
            Ok(thread) => {
                let _ = report.send(Ok(()));
                on_end(thread.run());
            }
            Err(error) => {
                drop(on_end);
                let _ = report.send(Err(error));
            }
        }
    })?;
    Ok(Spawned { thread, started })
}
