//! What `stat` shows: counted by the queue threads, read by other threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::latency::{Latencies, Latency, Sums};
use crate::request::{IoError, Op, Outcome};

/// Makes the counters of a thread and their totals of one list.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one queue thread. Only that thread writes them, so a count is a plain load and
        /// store, and no cache line is shared with another writer.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct Counters {
            $($name: AtomicU64,)*
            /// Requests that have not ended.
            in_flight: AtomicU64,
            latencies: Latencies,
        }

        /// A reading of one or more [`Counters`].
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct Totals {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Adds a reading of these counters to `totals`.
            pub fn add_to(&self, totals: &mut Totals) {
                $(totals.$name += self.$name.load(Ordering::Relaxed);)*
            }
        }
    };
}

counters! {
    /// Reads completed.
    reads,
    /// Bytes read.
    read_bytes,
    /// Writes completed.
    writes,
    /// Bytes written.
    write_bytes,
    /// Writes among them that had to be durable at completion (FUA, write-through).
    forced_writes,
    /// Flushes completed.
    flushes,
    /// Discards completed.
    discards,
    /// Write-zeroes completed.
    write_zeroes,
    /// Requests of any kind that failed (they count above as well).
    errors,
    /// Those among them that failed with EIO.
    errors_eio,
    /// With EOPNOTSUPP.
    errors_eopnotsupp,
    /// With EPERM: writes to a read-only disk.
    errors_eperm,
    /// With ENOSPC.
    errors_enospc,
    /// With EBADE: writes at a door while a client of the other has the disk.
    errors_ebade,
    /// How often a queue thread waited for work.
    sleeps,
    /// Requests that limits held back for a while.
    throttled,
    /// For how long in all, in nanoseconds.
    throttled_ns,
    /// Rounds of the loop.
    batches,
    /// `io_uring_enter` calls.
    enters,
}

impl Counters {
    /// Counts a finished request of `len_bytes`.
    #[inline]
    pub fn count(&self, op: Op, len_bytes: u64, outcome: Outcome) {
        match op {
            Op::Read => {
                add(&self.reads, 1);
                add(&self.read_bytes, len_bytes);
            }
            Op::Write { fua } => {
                add(&self.writes, 1);
                add(&self.forced_writes, u64::from(fua));
                add(&self.write_bytes, len_bytes);
            }
            Op::Flush => add(&self.flushes, 1),
            Op::Discard => add(&self.discards, 1),
            Op::WriteZeroes { .. } => add(&self.write_zeroes, 1),
        }
        if let Err(error) = outcome {
            self.count_error(error);
        }
    }

    /// Counts a failure. A request that a door refused before it became one counts nowhere else.
    #[cold]
    pub fn count_error(&self, error: IoError) {
        add(&self.errors, 1);
        let errno = match error {
            IoError::Io => &self.errors_eio,
            IoError::Unsupported => &self.errors_eopnotsupp,
            IoError::ReadOnly => &self.errors_eperm,
            IoError::NoSpace => &self.errors_enospc,
            IoError::Conflict => &self.errors_ebade,
        };
        add(errno, 1);
    }

    /// Counts the time of a request that the storage did not complete at once: when it came, and when the storage got it.
    pub(super) fn count_time(&self, op: Op, came_and_began_ns: (u64, u64), now_ns: u64) {
        self.latencies.count(op, came_and_began_ns, now_ns);
    }

    /// Counts a sleep.
    pub(super) fn count_sleep(&self) {
        add(&self.sleeps, 1);
    }

    /// Counts a request that limits held back.
    pub fn count_throttled(&self, wait_ns: u64) {
        add(&self.throttled, 1);
        add(&self.throttled_ns, wait_ns);
    }

    /// Counts a round of the loop; `enters` is the ring's own running count, `in_flight` the requests that go on.
    pub fn count_batch(&self, enters: u64, in_flight: usize) {
        add(&self.batches, 1);
        self.enters.store(enters, Ordering::Relaxed);
        self.in_flight.store(in_flight as u64, Ordering::Relaxed);
    }
}

/// The counters of threads that come and go: nothing is lost when a thread ends.
#[derive(Debug, Default)]
pub struct CounterSet {
    inner: Mutex<Threads>,
}

#[derive(Debug, Default)]
struct Threads {
    running: Vec<Arc<Counters>>,
    ended: Totals,
    ended_latencies: Sums,
}

impl CounterSet {
    fn threads(&self) -> MutexGuard<'_, Threads> {
        // No code that holds the lock can panic between two changes.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counters for a new thread.
    #[must_use]
    pub fn register(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.threads().running.push(Arc::clone(&counters));
        counters
    }

    /// Keeps the totals of a thread that ended.
    pub fn retire(&self, counters: &Arc<Counters>) {
        let mut threads = self.threads();
        let before = threads.running.len();
        threads
            .running
            .retain(|other| !Arc::ptr_eq(other, counters));
        if threads.running.len() < before {
            counters.add_to(&mut threads.ended);
            counters.latencies.add_to(&mut threads.ended_latencies);
        }
    }

    /// Requests that have not ended.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let threads = self.threads();
        let counts = threads.running.iter();
        counts
            .map(|counters| counters.in_flight.load(Ordering::Relaxed))
            .sum()
    }

    /// How long the requests of all threads took, ended threads included.
    #[must_use]
    pub fn latencies(&self) -> Vec<Latency> {
        let threads = self.threads();
        let mut sums = threads.ended_latencies.clone();
        for counters in &threads.running {
            counters.latencies.add_to(&mut sums);
        }
        drop(threads);
        // A request is timed before it is counted, so none of those timed is missing here.
        let totals = self.totals();
        sums.latencies([
            totals.reads,
            totals.writes,
            totals.flushes,
            totals.discards,
            totals.write_zeroes,
        ])
    }

    /// What all threads counted, ended ones included.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let threads = self.threads();
        let mut totals = threads.ended;
        for counters in &threads.running {
            counters.add_to(&mut totals);
        }
        totals
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    // One writer per counter: no read-modify-write needed.
    counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_of_several_threads_add_up() {
        let (a, b) = (Counters::default(), Counters::default());
        a.count(Op::Read, 512, Ok(()));
        b.count(Op::Read, 1024, Err(IoError::Io));
        b.count(Op::Flush, 0, Ok(()));
        b.count_error(IoError::Unsupported);
        let mut totals = Totals::default();
        a.add_to(&mut totals);
        b.add_to(&mut totals);
        assert_eq!((totals.reads, totals.read_bytes), (2, 1536));
        assert_eq!((totals.flushes, totals.errors), (1, 2));
        assert_eq!((totals.errors_eio, totals.errors_eopnotsupp), (1, 1));
    }

    #[test]
    fn threads_that_ended_still_count_and_count_once() {
        let set = CounterSet::default();
        let (a, b) = (set.register(), set.register());
        a.count(Op::Read, 512, Ok(()));
        b.count(Op::Read, 512, Ok(()));
        a.count_time(Op::Read, (0, 0), 5000);
        a.count_batch(0, 7);
        b.count_batch(0, 2);
        assert_eq!(set.in_flight(), 9);
        set.retire(&a);
        set.retire(&a);
        assert_eq!(set.in_flight(), 2);
        b.count(Op::Flush, 0, Ok(()));
        let latencies = set.latencies();
        assert_eq!(latencies.len(), 2, "{latencies:?}");
        assert_eq!(
            (latencies[0].request.count, latencies[0].request.sum_ns),
            (2, 5000)
        );
        let totals = set.totals();
        assert_eq!((totals.reads, totals.flushes), (2, 1));
    }
}
