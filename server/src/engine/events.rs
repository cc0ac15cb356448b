//! What happens to exports, for programs that watch: the event stream of the admin protocol (docs/admin.md).
//!
//! Each reader has a queue of its own with a fixed bound. Whatever a reader does, an event costs the thread that tells it
//! one lock and, where a reader sleeps, one `write(2)`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fmt, io};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

/// Events that may wait for one reader.
const MAX_WAITING: usize = 1024;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts the events of a server from 1, those that no reader saw included.
    pub sequence: u64,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub time_unix_ms: u64,
    /// The export.
    pub export: String,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// The export is served.
    Started,
    /// The export is served with the block device that an earlier server left, or handed over.
    Recovered {
        /// The block device.
        device: PathBuf,
    },
    /// The export is no longer served.
    Stopped {
        /// Whether all its requests had ended.
        in_order: bool,
    },
    /// The export was left to another server.
    HandedOver,
    /// A door closed by itself.
    DoorClosed {
        /// `ublk` or `vhost-user-blk`.
        door: String,
        /// Why.
        why: String,
    },
    /// A vhost-user client connected.
    ClientCame {
        /// Its process, as the kernel told it.
        pid: Option<i32>,
    },
    /// A vhost-user client's session ended.
    ClientLeft {
        /// Its process.
        pid: Option<i32>,
        /// How: `left` (it stopped its vrings), `died`, `failed` (it broke the protocol), `disconnected` (by the server).
        how: String,
        /// More about that, for people.
        why: String,
    },
    /// A vhost-user client was not admitted.
    ClientRefused {
        /// Its process.
        pid: Option<i32>,
        /// Why.
        why: String,
    },
    /// A vhost-user client has the disk: the block device takes no writes meanwhile.
    Upgraded {
        /// The client.
        client: String,
    },
    /// The disk is no longer a vhost-user client's.
    Returned,
    /// The disk has another size.
    Resized {
        /// Its size now.
        size_bytes: u64,
        /// Its size before.
        old_size_bytes: u64,
    },
    /// An option of the export was changed while it is served.
    Changed {
        /// The option.
        key: String,
        /// Its value now.
        value: String,
    },
    /// Requests are held back, because of a limit. Told once within ten seconds.
    Throttled,
    /// The storage failed a request. As in the log, the same within ten seconds is told once.
    Error {
        /// Operation, length and offset in bytes, cause.
        error: String,
    },
    /// Flushes fail from now on, because one failed and what it was to save may be lost.
    Fenced {
        /// Why.
        why: String,
    },
}

/// What a reader gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// The next event.
    Event(Event),
    /// So many events were dropped here, because this reader was too slow.
    Lost(u64),
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Event>,
    lost: u64,
    ended: bool,
}

/// Whether a reader is told of an export.
struct Wants(Box<dyn Fn(&str) -> bool + Send + Sync>);

impl fmt::Debug for Wants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wants")
    }
}

/// One reader's queue.
#[derive(Debug)]
struct Queue {
    wants: Wants,
    waiting: Mutex<Waiting>,
    bell: OwnedFd,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // The queue is whole after any panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, event: &Event) {
        if !(self.wants.0)(&event.export) {
            return;
        }
        let mut waiting = self.waiting();
        // None after the first that is lost, so that the reader sees where the gap is.
        if waiting.lost > 0 || waiting.events.len() >= MAX_WAITING {
            waiting.lost += 1;
            return;
        }
        waiting.events.push_back(event.clone());
        let wakes = waiting.events.len() == 1;
        drop(waiting);
        if wakes {
            self.ring();
        }
    }

    fn ring(&self) {
        // It fails only if the counter is at its end, and then the eventfd is readable already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

static SEQUENCE: AtomicU64 = AtomicU64::new(0);
static READERS: Mutex<Vec<Arc<Queue>>> = Mutex::new(Vec::new());

fn readers() -> MutexGuard<'static, Vec<Arc<Queue>>> {
    READERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells all readers what happened to an export.
pub fn tell(export: &str, what: What) {
    // Counted under the lock, so that all readers see one order.
    let readers = readers();
    let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed) + 1;
    if readers.is_empty() {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let event = Event {
        sequence,
        time_unix_ms: now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX)),
        export: export.to_owned(),
        what,
    };
    for queue in readers.iter() {
        queue.put(&event);
    }
}

/// The events from now on, of some exports. Its [descriptor](AsFd) is readable when there may be some.
#[derive(Debug)]
pub struct Reader(Arc<Queue>);

/// Ends a reader from another thread.
#[derive(Clone, Debug)]
pub struct Ender(Arc<Queue>);

impl Reader {
    /// Of the exports with names that `wants` takes. It is asked by the thread that tells of an event, and tells none itself.
    ///
    /// # Errors
    ///
    /// When there is no descriptor for it.
    pub fn new(wants: impl Fn(&str) -> bool + Send + Sync + 'static) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            wants: Wants(Box::new(wants)),
            waiting: Mutex::default(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        readers().push(Arc::clone(&queue));
        Ok(Self(queue))
    }

    /// The next, without waiting.
    #[must_use]
    pub fn next(&self) -> Option<Item> {
        let mut waiting = self.0.waiting();
        if let Some(event) = waiting.events.pop_front() {
            return Some(Item::Event(event));
        }
        // Not before the queue is empty: what comes later rings again. The bell of the end stays rung.
        if !waiting.ended {
            self.quiet();
        }
        let lost = std::mem::take(&mut waiting.lost);
        (lost > 0).then_some(Item::Lost(lost))
    }

    /// Makes the descriptor unreadable until something else happens, also if events wait.
    pub fn quiet(&self) {
        let _ = rustix::io::read(&self.0.bell, &mut [0; 8]);
    }

    /// Whether an [`Ender`] was used: nothing comes any more after what waits.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.0.waiting().ended
    }

    /// What ends it.
    #[must_use]
    pub fn ender(&self) -> Ender {
        Ender(Arc::clone(&self.0))
    }
}

impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.bell.as_fd()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        readers().retain(|queue| !Arc::ptr_eq(queue, &self.0));
    }
}

impl Ender {
    /// Ends the reader after what waits for it.
    pub fn end(&self) {
        self.0.waiting().ended = true;
        self.0.ring();
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_readable(reader: &Reader) -> bool {
        let now = Timespec::default();
        poll(&mut [PollFd::new(reader, PollFlags::IN)], Some(&now)) == Ok(1)
    }

    fn resized(size_bytes: u64) -> What {
        What::Resized {
            size_bytes,
            old_size_bytes: 0,
        }
    }

    /// The sizes that a reader is told of.
    fn sizes(reader: &Reader) -> Vec<u64> {
        let next = || match reader.next()? {
            Item::Event(Event {
                what: What::Resized { size_bytes, .. },
                ..
            }) => Some(size_bytes),
            other => panic!("{other:?}"),
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_reader_gets_what_happens_to_its_export_from_then_on() {
        let name = "events of one";
        tell(name, What::Started);
        let reader = Reader::new(move |export| export == name).unwrap();
        assert!(!is_readable(&reader));
        tell("another export", What::Started);
        assert!(!is_readable(&reader));
        tell(name, resized(1));
        tell(name, resized(2));
        assert!(is_readable(&reader));
        assert_eq!(sizes(&reader), [1, 2]);
        assert!(!is_readable(&reader));
        tell(name, resized(3));
        assert!(is_readable(&reader));
        reader.ender().end();
        assert!(reader.is_ended());
        assert_eq!(sizes(&reader), [3]);
        assert!(is_readable(&reader), "a reader that was about to sleep");
    }

    #[test]
    fn a_reader_that_does_not_read_loses_events_where_it_is_told_so_and_no_other_does() {
        let name = "events that are lost";
        let [slow, quick] = [(); 2].map(|()| Reader::new(move |export| export == name).unwrap());
        let count = MAX_WAITING as u64 + 5;
        let mut seen = Vec::new();
        for number in 0..count {
            tell(name, resized(number));
            seen.extend(sizes(&quick));
        }
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
        let events = (0..MAX_WAITING).map(|_| slow.next().unwrap());
        assert!(
            events
                .into_iter()
                .all(|item| matches!(item, Item::Event(_)))
        );
        tell(name, resized(count));
        assert_eq!(slow.next(), Some(Item::Lost(6)), "and not what came since");
        assert_eq!(slow.next(), None);
        tell(name, resized(7));
        assert!(is_readable(&slow));
        assert_eq!(sizes(&slow), [7]);
    }
}
