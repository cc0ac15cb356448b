//! Results of requests that end outside of their queue thread: on a thread of a library, in another process.
//!
//! A queue that gives a request away [expects](Inbox::expect) its result and hands the ticket out. The thread that has done the
//! work, any one, [posts](Post::deliver) the result with that ticket. The eventfd that wakes the queue thread is
//! written to only while the thread sleeps.
//!
//! A ticket is good for one result. What comes a second time is dropped: no later request in the same slot is taken for
//! ended.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::io::{Owner, Ring, Slot, Token};

/// A request that ends elsewhere: its slot, and which of the requests in this slot it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    slot: Slot,
    turn: u64,
}

#[derive(Debug)]
struct Shared {
    results: Mutex<Vec<(Ticket, i32)>>,
    /// How many these are, for a look without the lock.
    waiting: AtomicUsize,
    /// Whether the queue thread sleeps, or is about to.
    asleep: AtomicBool,
    bell: OwnedFd,
}

impl Shared {
    fn results(&self) -> MutexGuard<'_, Vec<(Ticket, i32)>> {
        // No code that holds the lock can panic between two changes.
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where results are posted.
#[derive(Clone, Debug)]
pub struct Post(Arc<Shared>);

impl Post {
    /// Posts the result of a request, to be given to [`StorageQueue::advance`]. Without effect if its queue is gone.
    ///
    /// [`StorageQueue::advance`]: super::StorageQueue::advance
    pub fn deliver(&self, ticket: Ticket, result: i32) {
        let mut results = self.0.results();
        results.push((ticket, result));
        self.0.waiting.store(results.len(), Ordering::Release);
        drop(results);
        // The thread says that it sleeps and looks into the inbox after that, under the lock: it sees this result, or
        // it is seen here to sleep.
        self.wake();
    }

    /// Wakes the queue thread if it sleeps. It has to look for what there is to see after it has said that it sleeps, under
    /// a lock that the caller has held for the change.
    pub fn wake(&self) {
        if self.0.asleep.swap(false, Ordering::Relaxed) {
            // The write fails only if the counter is at its end, and then the eventfd is readable already.
            let _ = rustix::io::write(&self.0.bell, &1u64.to_ne_bytes());
        }
    }
}

/// What is known of a slot.
#[derive(Clone, Copy, Debug, Default)]
struct Awaited {
    turn: u64,
    is_awaited: bool,
}

/// The results for one queue.
#[derive(Debug)]
pub struct Inbox {
    shared: Arc<Shared>,
    slots: Box<[Awaited]>,
    /// How many of the slots are awaited.
    awaited: usize,
    /// Taken out of `shared`, the oldest first.
    taken: VecDeque<(Ticket, i32)>,
    /// What `taken` is filled from; empty otherwise.
    spare: Vec<(Ticket, i32)>,
    /// Results that no request waited for.
    strays: u64,
    /// Where the kernel puts the bell's counter. On the heap: its address must not change.
    count: Box<u64>,
    /// Whether the ring has a read of the bell.
    is_armed: bool,
}

impl Inbox {
    /// Operations that it may have on the ring at once.
    pub const RING_OPERATIONS: u32 = 1;

    /// An empty one, for requests in slots 0 to `slots` - 1.
    ///
    /// # Errors
    ///
    /// When no eventfd can be had.
    pub fn new(slots: u32) -> io::Result<Self> {
        let slots = slots as usize;
        Ok(Self {
            shared: Arc::new(Shared {
                results: Mutex::new(Vec::with_capacity(slots)),
                waiting: AtomicUsize::new(0),
                asleep: AtomicBool::new(false),
                // Not O_NONBLOCK: the ring would not wait for it.
                bell: eventfd(0, EventfdFlags::CLOEXEC)?,
            }),
            slots: vec![Awaited::default(); slots].into(),
            awaited: 0,
            taken: VecDeque::with_capacity(slots),
            spare: Vec::with_capacity(slots),
            strays: 0,
            count: Box::new(0),
            is_armed: false,
        })
    }

    /// Where results are to be posted.
    #[must_use]
    pub fn post(&self) -> Post {
        Post(Arc::clone(&self.shared))
    }

    /// Expects a result for the request in `slot`.
    ///
    /// # Panics
    ///
    /// When one is expected already.
    pub fn expect(&mut self, slot: Slot) -> Ticket {
        let awaited = &mut self.slots[slot as usize];
        assert!(!awaited.is_awaited, "slot {slot} is awaited already");
        awaited.is_awaited = true;
        awaited.turn += 1;
        self.awaited += 1;
        Ticket {
            slot,
            turn: awaited.turn,
        }
    }

    /// The next result that a request waits for.
    pub fn next_result(&mut self) -> Option<(Slot, i32)> {
        if self.shared.asleep.load(Ordering::Relaxed) {
            // Something else woke the thread: no bell is needed.
            self.shared.asleep.store(false, Ordering::Relaxed);
        }
        if self.taken.is_empty() {
            self.take()?;
        }
        while let Some((ticket, result)) = self.taken.pop_front() {
            if self.is_first(ticket) {
                return Some((ticket.slot, result));
            }
        }
        None
    }

    /// Whether there are results. Takes no lock and makes no system call.
    #[must_use]
    #[inline]
    pub fn has_results(&self) -> bool {
        !self.taken.is_empty() || self.shared.waiting.load(Ordering::Relaxed) > 0
    }

    /// Prepares for sleep: from now on a result completes an operation of [`Owner::Bell`] on the ring. Returns false if
    /// there are results already.
    pub fn listen(&mut self, ring: &mut Ring) -> bool {
        if !self.is_armed {
            let bell = types::Fd(self.shared.bell.as_raw_fd());
            let read = opcode::Read::new(bell, std::ptr::from_mut(&mut *self.count).cast(), 8);
            // SAFETY: `count` is on the heap, and the thread drains its ring before it drops the queue.
            if unsafe { ring.push(read.build(), Self::TOKEN) }.is_err() {
                // There is room after the next reap.
                return false;
            }
            self.is_armed = true;
        }
        self.sleeps()
    }

    /// The bell has rung: its operation has completed.
    pub fn rang(&mut self) {
        self.is_armed = false;
    }

    /// Waits, for at most `limit`, until all results have come, and drops them: then nothing outside works for this queue
    /// any more. Returns whether that was reached. To be called when the ring is empty.
    pub fn quiesce(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            while self.next_result().is_some() {}
            let left = deadline.saturating_duration_since(Instant::now());
            if self.awaited == 0 {
                return true;
            }
            if left.is_zero() {
                return false;
            }
            if self.sleeps() {
                let mut fds = [PollFd::new(&self.shared.bell, PollFlags::IN)];
                let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
                let left = Timespec {
                    tv_sec: seconds,
                    tv_nsec: left.subsec_nanos().into(),
                };
                if poll(&mut fds, Some(&left)) == Ok(1) {
                    // Nothing else reads it, so this does not wait.
                    let _ = rustix::io::read(&self.shared.bell, &mut [0; 8]);
                }
            }
        }
    }

    /// How many results came that no request waited for.
    #[must_use]
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Says that the thread sleeps, unless there are results.
    fn sleeps(&self) -> bool {
        self.shared.asleep.store(true, Ordering::Relaxed);
        let has_none = self.taken.is_empty() && self.shared.results().is_empty();
        if !has_none {
            self.shared.asleep.store(false, Ordering::Relaxed);
        }
        has_none
    }

    /// Takes what has been posted.
    fn take(&mut self) -> Option<()> {
        if self.shared.waiting.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut results = self.shared.results();
        std::mem::swap(&mut *results, &mut self.spare);
        self.shared.waiting.store(0, Ordering::Relaxed);
        drop(results);
        self.taken.extend(self.spare.drain(..));
        Some(())
    }

    /// Whether a request still waits for the result with this ticket; from now on it does not.
    fn is_first(&mut self, ticket: Ticket) -> bool {
        let awaited = &mut self.slots[ticket.slot as usize];
        if awaited.is_awaited && awaited.turn == ticket.turn {
            awaited.is_awaited = false;
            self.awaited -= 1;
            return true;
        }
        self.strays += 1;
        false
    }

    /// The kind of its operation's token.
    pub const KIND: u16 = 0;

    const TOKEN: Token = Token {
        owner: Owner::Bell,
        kind: Self::KIND,
        index: 0,
    };
}

#[cfg(test)]
#[path = "inbox_tests.rs"]
mod tests;
