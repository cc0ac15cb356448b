//! Parts of the door that fuzz targets (`tests/fuzz`) drive by themselves: the virtqueues of a queue thread without
//! the thread, a session on a socket of the target's, and the record of chains in flight.
//!
//! Only in builds with the feature `testing`.

mod memory;
mod queues;
mod record;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::connection::Connection;
use super::session::{Ending, Session, Sizes};
use super::spawn::{QueueOptions, spawner};
use crate::door::ownership::Ownership;
use crate::engine::Storage;
use crate::engine::counters::CounterSet;
use crate::engine::polling::Polling;
use crate::engine::threads::ThreadOptions;

pub use super::access::at_each_access;
pub use memory::{GuestMemory, GuestRegion, PageLog};
pub use queues::{Queues, Vring};
pub use record::{Record, RecordQueue};

/// How a session ended.
#[derive(Debug)]
pub enum SessionEnd {
    /// The client stopped all its vrings and hung up.
    Left,
    /// The client hung up with vrings running.
    Died,
    /// The client was refused.
    Refused(io::Error),
}

/// Serves a client on the calling thread until it hangs up, with two queue threads, as the door would.
pub fn serve_session<B: Storage>(
    stream: UnixStream,
    disk: Arc<B>,
    ownership: Arc<Ownership>,
) -> SessionEnd {
    let threads = 2;
    let limits = disk.limits().clone();
    let connection = Arc::new(Connection::new("fuzz", 1, None, limits, stream));
    let options = QueueOptions {
        count: threads,
        threads: ThreadOptions {
            polling: Arc::new(Polling::Never.into()),
            cpus: None,
        },
        throttle: Arc::default(),
    };
    let counters = Arc::<CounterSet>::default();
    let spawn = spawner(Arc::clone(&connection), options, disk, counters);
    let sizes = Sizes { queues: 2, threads };
    match Session::new(connection, sizes, spawn, ownership).serve() {
        Ending::Left => SessionEnd::Left,
        Ending::Died { .. } => SessionEnd::Died,
        Ending::Failed(error) => SessionEnd::Refused(error),
    }
}
