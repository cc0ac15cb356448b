//! How a session starts its queue threads.

use std::sync::Arc;
use std::time::Duration;

use super::connection::Connection;
use super::queue::{Command, VhostQueues};
use super::session::{QueueHandle, Spawn};
use crate::engine::counters::CounterSet;
use crate::engine::mailbox::Mailbox;
use crate::engine::queue_thread::QueueThread;
use crate::engine::threads::ThreadOptions;
use crate::engine::throttle::Throttle;
use crate::engine::{End, Storage, spawn_queue};

/// How long a queue thread may take to make its ring.
const START_LIMIT: Duration = Duration::from_secs(30);

/// What the queue threads of a session have in common.
#[derive(Clone, Debug)]
pub(super) struct QueueOptions {
    /// How many there may be.
    pub count: u16,
    /// How they run.
    pub threads: ThreadOptions,
    /// What clients may do.
    pub throttle: Arc<Throttle>,
}

/// What starts the queue threads of a session. A client whose queue thread fails or panics is hung up
/// on.
pub(super) fn spawner<B: Storage>(
    connection: Arc<Connection>,
    options: QueueOptions,
    disk: Arc<B>,
    counter_set: Arc<CounterSet>,
) -> Spawn {
    Box::new(move |number| {
        let (mail, mailbox) = Mailbox::new()?;
        let counters = counter_set.register();
        let make = {
            let (connection, counters) = (Arc::clone(&connection), Arc::clone(&counters));
            let (options, disk) = (options.clone(), Arc::clone(&disk));
            move || {
                let QueueOptions {
                    count,
                    threads,
                    throttle,
                } = options;
                threads.settle(number)?;
                let queues = VhostQueues::new(connection, Arc::clone(&counters), count);
                QueueThread::new(queues, &*disk, mailbox, &counters, &threads, &throttle)
            }
        };
        let on_end = {
            let (connection, counters) = (Arc::clone(&connection), Arc::clone(&counters));
            let counter_set = Arc::clone(&counter_set);
            move |end| {
                counter_set.retire(&counters);
                report(&connection, number, &end);
            }
        };
        let name = format!("vhost-{}-q{number}", connection.id());
        let started = spawn_queue(name, make, on_end)
            .and_then(|spawned| spawned.wait_started(START_LIMIT).map(|()| spawned));
        match started {
            Ok(spawned) => Ok(QueueHandle {
                mail,
                thread: spawned.into_thread(),
            }),
            Err(error) => {
                // One that is late, not dead, is to end.
                let _ = mail.send(Command::Exit);
                counter_set.retire(&counters);
                Err(error)
            }
        }
    })
}

/// Tells the client, by hanging up, that nothing answers its requests any more.
fn report(connection: &Connection, queue: u16, end: &End) {
    let reason = match end {
        End::Finished => return,
        End::Failed(_) => "a queue thread failed",
        End::Panicked(_) => "a queue thread panicked",
    };
    let (export, session) = (connection.export(), connection.id());
    tracing::error!(export, session, queue, "{reason}: {end}");
    connection.hang_up(reason);
}
