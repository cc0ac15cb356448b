//! What `stat` shows: counted by the queue threads, read by other threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::request::{Op, Outcome};

/// Makes the counters of a thread and their totals of one list.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The counters of one queue thread. Only that thread writes them, so a count is a plain load and
        /// store, and no cache line is shared with another writer.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct Counters {
            $($name: AtomicU64,)*
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
        if outcome.is_err() {
            self.count_rejected();
        }
    }

    /// Counts a request that a door refused before it became one.
    pub fn count_rejected(&self) {
        add(&self.errors, 1);
    }

    /// Counts a request that limits held back.
    pub fn count_throttled(&self, wait_ns: u64) {
        add(&self.throttled, 1);
        add(&self.throttled_ns, wait_ns);
    }

    /// Counts a round of the loop; `enters` is the ring's own running count.
    pub fn count_batch(&self, enters: u64) {
        add(&self.batches, 1);
        self.enters.store(enters, Ordering::Relaxed);
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
        }
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
    use crate::request::IoError;

    #[test]
    fn readings_of_several_threads_add_up() {
        let (a, b) = (Counters::default(), Counters::default());
        a.count(Op::Read, 512, Ok(()));
        b.count(Op::Read, 1024, Err(IoError::Io));
        b.count(Op::Flush, 0, Ok(()));
        b.count_rejected();
        let mut totals = Totals::default();
        a.add_to(&mut totals);
        b.add_to(&mut totals);
        assert_eq!((totals.reads, totals.read_bytes), (2, 1536));
        assert_eq!((totals.flushes, totals.errors), (1, 2));
    }

    #[test]
    fn threads_that_ended_still_count_and_count_once() {
        let set = CounterSet::default();
        let (a, b) = (set.register(), set.register());
        a.count(Op::Read, 512, Ok(()));
        b.count(Op::Read, 512, Ok(()));
        set.retire(&a);
        set.retire(&a);
        b.count(Op::Flush, 0, Ok(()));
        let totals = set.totals();
        assert_eq!((totals.reads, totals.flushes), (2, 1));
    }
}
