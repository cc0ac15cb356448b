//! The loop: reap completions, let door and storage act, submit once.
//!
//! One thread, one ring, one door queue, one storage queue. Reaping never runs anything: the
//! completions are copied out first, then dispatched. Nothing here allocates once it runs, and
//! nothing is shared with other threads but the mailbox and the counters.

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::clock;
use crate::engine::counters::Counters;
use crate::engine::mailbox::Mailbox;
use crate::engine::polling::{IdleAction, Poller};
use crate::engine::threads::ThreadOptions;
use crate::engine::throttle::{Gate, Throttle};
use crate::engine::{DoorQueue, End, Next};
use crate::engine::{Storage, StorageQueue};
use crate::io::{Completion, Owner, Ring, Slot, SlotTable};
use crate::request::{IoError, Op, Outcome, Progress, Request};

/// Completions dispatched per round at most.
const BATCH: usize = 256;

/// Requests begun and ended per round at most: answers are published in batches of this size, so
/// that the client can process them while the next requests are served.
const ANSWERS: u64 = 16;

/// Requests given to the storage per round: two while it has nothing to do, as many again as it has
/// when it is busy anyway. From the third submission of one system call on the kernel collects them,
/// and a storage that has run empty sees none before all have been prepared (docs/decisions.md).
const LEAST_BEGUN: usize = 2;
const MOST_BEGUN: usize = 32;

/// An idle thread that polls reads the clock once per this many polls.
const POLLS_PER_CLOCK: u32 = 64;

/// How long a thread that ends waits for operations it cancelled.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Drives one door queue over one storage queue.
pub struct QueueThread<D: DoorQueue, B: Storage> {
    ring: Ring,
    mailbox: Mailbox<D::Command>,
    door: D,
    storage: B::Queue,
    running: SlotTable<Running>,
    /// How many requests the storage has.
    in_flight: usize,
    /// Requests the storage had no room for, in order.
    backlog: VecDeque<Slot>,
    batch: Vec<Completion>,
    counters: Arc<Counters>,
    poller: Poller,
    gate: Gate,
    /// The time, once it was asked for in this round.
    now_ns: Option<u64>,
    /// Requests ended so far.
    answered: u64,
    /// Whether a request was begun in this round that has not ended at once.
    begun: bool,
}

impl<D: DoorQueue, B: Storage> QueueThread<D, B> {
    /// Makes the ring and everything on it. Must be called on the thread that will [`run`] it.
    ///
    /// [`run`]: Self::run
    ///
    /// # Errors
    ///
    /// When the kernel refuses the ring or what the storage needs on it.
    pub fn new(
        door: D,
        disk: &B,
        mailbox: Mailbox<D::Command>,
        counters: &Arc<Counters>,
        options: &ThreadOptions,
        throttle: &Arc<Throttle>,
    ) -> io::Result<Self> {
        let slots = door.slots();
        // Each request has at most one operation on the ring, the mailbox one, and a cancellation
        // completes beside what it cancels.
        let mut ring = Ring::new(slots + 2 * door.ring_operations() + 2 * B::RING_OPERATIONS + 2)?;
        let storage = disk.queue(&mut ring, slots)?;
        let beside_clients = door.is_beside_clients();
        let longest_hold = door.longest_hold();
        let slots = slots as usize;
        Ok(Self {
            ring,
            mailbox,
            door,
            storage,
            running: SlotTable::new(slots),
            in_flight: 0,
            backlog: VecDeque::with_capacity(slots),
            batch: Vec::with_capacity(BATCH),
            counters: Arc::clone(counters),
            poller: Poller::new(&options.polling, beside_clients),
            gate: Gate::new(throttle, slots, longest_hold),
            now_ns: None,
            answered: 0,
            begun: false,
        })
    }

    /// Makes room for `count` buffers in the ring's table.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn reserve_buffers(&self, count: u32) -> io::Result<()> {
        self.ring.register_buffer_table(count)
    }

    /// Serves until the door is closed, and says how that ended.
    ///
    /// When it fails or panics, requests under way are lost to the door's clients, as if the server
    /// had died. Memory that the kernel may still write to is freed in no case: what is on the ring
    /// is cancelled and waited for, and if that takes too long everything is leaked.
    pub fn run(self) -> End {
        // Unwinding must not drop the fields: buffers would be freed while the kernel uses them.
        let mut this = ManuallyDrop::new(self);
        let end = End::of(catch_unwind(AssertUnwindSafe(|| this.serve())));
        // Senders that wait for an answer learn at once that there will be none.
        this.mailbox.close();
        let drained = catch_unwind(AssertUnwindSafe(|| this.drain(&end))).unwrap_or(false);
        if !drained {
            tracing::error!(
                operations = this.ring.in_flight(),
                "the kernel or the storage still holds buffers of a queue thread that ends; they are leaked"
            );
            return end;
        }
        if !matches!(end, End::Finished) {
            // The requests that are lost end without an outcome, which dropping them would report.
            std::mem::forget(std::mem::replace(&mut this.running, SlotTable::new(0)));
        }
        let freed = catch_unwind(AssertUnwindSafe(move || {
            drop(ManuallyDrop::into_inner(this));
        }));
        match (end, freed) {
            (End::Finished, Err(panic)) => End::panicked(&*panic),
            (end, _) => end,
        }
    }

    /// Waits until the kernel has let go of all buffers; false if that takes too long.
    fn drain(&mut self, end: &End) -> bool {
        if !matches!(end, End::Finished) {
            self.door.on_failure();
        }
        let abandoned = self.door.abandons_operations().then_some(Owner::Door);
        self.ring.drain(DRAIN_LIMIT, abandoned) && self.storage.quiesce(DRAIN_LIMIT)
    }

    fn serve(&mut self) -> io::Result<()> {
        let full = |_| io::Error::other("the ring has no room for the door");
        self.mailbox.arm(&mut self.ring).map_err(full)?;
        self.door.start(&mut self.ring).map_err(full)?;
        loop {
            self.begun = false;
            self.now_ns = None;
            let before = self.answered;
            self.dispatch()?;
            let completed = self.answered - before;
            self.start_requests();
            let in_flight = self.in_flight + self.gate.len();
            self.counters.count_batch(self.ring.enters(), in_flight);
            if self.begun || self.answered > before {
                self.poller.worked(completed);
            }
            let mut want = match self.door.end_batch(&mut self.ring) {
                Next::Exit if self.in_flight == 0 && self.gate.is_empty() => return Ok(()),
                // A backlog waits for completions like everything else.
                Next::Exit => 1,
                Next::Again => usize::from(!self.backlog.is_empty()),
                Next::Idle => usize::from(!self.poll()? && self.door.listen(&mut self.ring)),
            };
            if want > 0 && !self.storage.listen(&mut self.ring) {
                want = 0;
            }
            if want > 0 {
                self.counters.count_sleep();
            }
            match self.throttled_wait(want) {
                Some(limit) => self.ring.submit_and_wait_for(limit)?,
                None => self.ring.submit_and_wait(want)?,
            }
            self.ring.reap(&mut self.batch);
        }
    }

    /// How long to sleep at the longest, if the thread is to sleep and holds requests back.
    fn throttled_wait(&mut self, want: usize) -> Option<Duration> {
        // While the storage has no room, only a completion helps.
        if want == 0 || self.gate.is_empty() || !self.backlog.is_empty() {
            return None;
        }
        if self.door.drains() {
            // One round did not start all of them.
            return Some(Duration::ZERO);
        }
        let now_ns = self.now_ns();
        self.gate.wait(now_ns)
    }

    /// The time, exact to this round.
    fn now_ns(&mut self) -> u64 {
        *self.now_ns.get_or_insert_with(clock::now_ns)
    }

    /// Polls for work for as long as the poller says. Returns whether there is some.
    fn poll(&mut self) -> io::Result<bool> {
        if !self.gate.is_empty() {
            // The thread must wake up when the next held request is due.
            return Ok(false);
        }
        if self.poller.polls_briefly(self.in_flight) {
            // Submit first: others wait for what is queued.
            self.ring.submit_and_wait(0)?;
            if self.poll_briefly() {
                self.poller.found_at_once();
                return Ok(true);
            }
        }
        let until = match self.poller.idle_action(self.in_flight) {
            IdleAction::Sleep => return Ok(false),
            IdleAction::PollUntil(end) => Some(end),
            IdleAction::PollForEver => None,
        };
        self.ring.submit_and_wait(0)?;
        loop {
            if self.poll_briefly() {
                return Ok(true);
            }
            let is_over = match until {
                Some(until) => Instant::now() >= until,
                None => self.poller.is_told_otherwise(),
            };
            if is_over {
                return Ok(false);
            }
        }
    }

    /// Polls for about a microsecond.
    fn poll_briefly(&mut self) -> bool {
        for _ in 0..POLLS_PER_CLOCK {
            if self.ring.has_completions() || self.door.has_work() || self.storage.has_results() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Hands each completion of the batch to its owner.
    fn dispatch(&mut self) -> io::Result<()> {
        // Taken out so that the owners can be called; put back with its capacity.
        let mut batch = std::mem::take(&mut self.batch);
        for completion in batch.drain(..) {
            match completion.token.owner {
                Owner::None => {}
                Owner::Mailbox => self.take_messages(completion.result),
                Owner::Door => self.door.event(&mut self.ring, completion),
                Owner::Storage => {
                    let token = completion.token;
                    self.advance(token.index, token.kind, completion.result);
                }
                // A thread that nothing wakes would have to look again and again.
                Owner::Bell if completion.result == -libc::EACCES => {
                    return Err(io::Error::other(
                        "the ring may not do what the storage is to wake the thread by",
                    ));
                }
                Owner::Bell => self.storage.rang(&mut self.ring, completion.token.kind),
            }
        }
        self.batch = batch;
        while let Some((slot, result)) = self.storage.next_result() {
            self.advance(slot, 0, result);
        }
        Ok(())
    }

    #[inline(always)]
    fn advance(&mut self, slot: Slot, kind: u16, result: i32) {
        let request = &mut self.running.get_mut(slot).request;
        let progress = (self.storage).advance(&mut self.ring, slot, request, kind, result);
        self.settle(slot, progress);
    }

    fn take_messages(&mut self, result: i32) {
        while let Some(command) = self.mailbox.take() {
            self.door.command(&mut self.ring, command);
        }
        if self.door.abandons_requests() {
            self.storage.abandon();
        }
        if result >= 0 && self.mailbox.arm(&mut self.ring).is_err() {
            // One operation just completed, so there is room for one.
            unreachable!("no room on the ring for the mailbox");
        }
    }

    /// Starts what waits: first the backlog, then new requests while the storage takes them.
    fn start_requests(&mut self) {
        for _ in 0..self.backlog.len() {
            let Some(slot) = self.backlog.pop_front() else {
                break;
            };
            if self.start(slot) == Started::NoRoom {
                // Keep the order: it was the first and still is.
                self.backlog.rotate_right(1);
                return;
            }
        }
        let enough = self.answered + ANSWERS;
        let busy = self.in_flight;
        let most = busy + busy.clamp(LEAST_BEGUN, MOST_BEGUN);
        let is_limited = self.gate.is_in_use();
        if is_limited && self.start_held(enough, most) == Started::NoRoom {
            return;
        }
        while self.answered < enough && self.in_flight < most {
            let Some((slot, mut request)) = self.door.next(&mut self.ring) else {
                return;
            };
            if is_limited && !self.lets_pass(slot, (request.op(), request.len_bytes())) {
                self.hold(slot, request);
                continue;
            }
            match self.storage.start(&mut self.ring, slot, &mut request) {
                // What is done at once need not be kept.
                Progress::Done(outcome) => self.finish(slot, request, outcome),
                Progress::Pending => self.keep(slot, request),
                Progress::Full => {
                    self.keep(slot, request);
                    self.backlog.push_back(slot);
                    return;
                }
            }
        }
    }

    /// Starts what limits held back and now let pass. `enough` have been answered in this round then, and the storage is
    /// to have `most`.
    #[cold]
    #[inline(never)]
    fn start_held(&mut self, enough: u64, most: usize) -> Started {
        let now_ns = self.now_ns();
        let at_once = self.door.drains();
        while self.answered < enough && self.in_flight < most {
            let Some((slot, wait_ns)) = self.gate.release(at_once, now_ns) else {
                break;
            };
            self.counters.count_throttled(wait_ns);
            self.begun = true;
            self.in_flight += 1;
            self.running.get_mut(slot).began_ns = now_ns;
            if self.start(slot) == Started::NoRoom {
                return Started::NoRoom;
            }
        }
        Started::Yes
    }

    /// Whether limits let a request start that has just come.
    #[cold]
    #[inline(never)]
    fn lets_pass(&mut self, slot: Slot, what: (Op, u64)) -> bool {
        let now_ns = self.now_ns();
        self.gate.lets_pass(slot, what, now_ns)
    }

    /// Keeps a request that limits hold back.
    #[cold]
    #[inline(never)]
    fn hold(&mut self, slot: Slot, request: Request) {
        trace_begin(slot, &request);
        let now_ns = self.now_ns();
        self.running.put(slot, Running::new(request, now_ns));
    }

    fn keep(&mut self, slot: Slot, request: Request) {
        trace_begin(slot, &request);
        self.begun = true;
        self.in_flight += 1;
        let now_ns = self.now_ns();
        self.running.put(slot, Running::new(request, now_ns));
    }

    fn start(&mut self, slot: Slot) -> Started {
        let request = &mut self.running.get_mut(slot).request;
        let progress = self.storage.start(&mut self.ring, slot, request);
        self.settle(slot, progress)
    }

    fn settle(&mut self, slot: Slot, progress: Progress) -> Started {
        match progress {
            Progress::Done(outcome) => self.complete(slot, outcome),
            Progress::Pending => {}
            Progress::Full => {
                self.backlog.push_back(slot);
                return Started::NoRoom;
            }
        }
        Started::Yes
    }

    fn complete(&mut self, slot: Slot, outcome: Outcome) {
        let now_ns = self.now_ns();
        let Running {
            request,
            came_ns,
            began_ns,
        } = self.running.take(slot);
        self.in_flight -= 1;
        trace_end(slot, &request, outcome);
        (self.counters).count_time(request.op(), (came_ns, began_ns), now_ns);
        self.finish(slot, request, outcome);
    }

    #[inline(always)]
    fn finish(&mut self, slot: Slot, request: Request, outcome: Outcome) {
        self.answered += 1;
        self.counters
            .count(request.op(), request.len_bytes(), outcome);
        self.door.complete(&mut self.ring, slot, request, outcome);
    }
}

/// The probe `ublkup:request_begin`: a request has come that does not end at once. Without a tracer the arguments are not
/// made.
fn trace_begin(slot: Slot, request: &Request) {
    probe::probe_lazy!(
        ublkup,
        request_begin,
        slot,
        request.op().number(),
        request.offset_bytes(),
        request.len_bytes()
    );
}

/// The probe `ublkup:request_end`: the client is about to get the answer.
fn trace_end(slot: Slot, request: &Request, outcome: Outcome) {
    probe::probe_lazy!(
        ublkup,
        request_end,
        slot,
        request.op().number(),
        request.offset_bytes(),
        request.len_bytes(),
        outcome.map_or_else(IoError::errno, |()| 0)
    );
}

/// A request that the storage has or will get.
struct Running {
    request: Request,
    /// When it came.
    came_ns: u64,
    /// When the storage was given it first.
    began_ns: u64,
}

impl Running {
    fn new(request: Request, now_ns: u64) -> Self {
        Self {
            request,
            came_ns: now_ns,
            began_ns: now_ns,
        }
    }
}

/// Whether the storage had room.
#[derive(PartialEq, Eq)]
enum Started {
    Yes,
    NoRoom,
}

#[cfg(test)]
#[path = "queue_thread_tests.rs"]
mod tests;
