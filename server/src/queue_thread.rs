//! The loop: reap completions, let door and backend act, submit once.
//!
//! One thread, one ring, one door queue, one backend queue. Reaping never runs anything: the
//! completions are copied out first, then dispatched. Nothing here allocates once it runs, and
//! nothing is shared with other threads but the mailbox and the counters.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Backend, BackendQueue};
use crate::counters::Counters;
use crate::door::{DoorQueue, Next};
use crate::io::mailbox::Mailbox;
use crate::io::{Completion, Owner, Ring, Slot, SlotTable};
use crate::request::{Op, Outcome, Progress, Request};

/// Completions dispatched per round at most.
const BATCH: usize = 256;

/// How long a thread that ends waits for operations it cancelled.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// A request under way and what the counters want to know when it ends.
struct Running {
    request: Request,
    op: Op,
    len_bytes: u64,
}

/// Drives one door queue over one backend queue.
pub struct QueueThread<D: DoorQueue, B: Backend> {
    ring: Ring,
    mailbox: Mailbox<D::Command>,
    door: D,
    backend: B::Queue,
    running: SlotTable<Running>,
    /// Requests the backend had no room for, in order.
    backlog: VecDeque<Slot>,
    batch: Vec<Completion>,
    counters: Arc<Counters>,
}

impl<D: DoorQueue, B: Backend> QueueThread<D, B> {
    /// Makes the ring and everything on it. Must be called on the thread that will [`run`] it.
    ///
    /// [`run`]: Self::run
    ///
    /// # Errors
    ///
    /// When the kernel refuses the ring or what the backend needs on it.
    pub fn new(
        door: D,
        disk: &B,
        mailbox: Mailbox<D::Command>,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let slots = door.slots();
        // Each request has at most one operation on the ring, the mailbox one, and a cancellation
        // completes beside what it cancels.
        let mut ring = Ring::new(slots + 2 * door.ring_operations() + 2)?;
        let backend = disk.queue(&mut ring, slots)?;
        let slots = slots as usize;
        Ok(Self {
            ring,
            mailbox,
            door,
            backend,
            running: SlotTable::new(slots),
            backlog: VecDeque::with_capacity(slots),
            batch: Vec::with_capacity(BATCH),
            counters,
        })
    }

    /// Serves until the door is closed.
    ///
    /// # Errors
    ///
    /// When the ring is broken. Requests under way are then lost to the door's clients, as if the
    /// server had died.
    pub fn run(mut self) -> io::Result<()> {
        let result = self.serve();
        // Whoever owned a buffer may free it only after the kernel let go of it.
        let abandoned = self.door.abandons_operations().then_some(Owner::Door);
        if !self.ring.drain(DRAIN_LIMIT, abandoned) {
            tracing::error!(
                operations = self.ring.in_flight(),
                "the kernel still holds buffers of a queue thread that ends; they are leaked"
            );
            std::mem::forget(self);
        }
        result
    }

    fn serve(&mut self) -> io::Result<()> {
        let full = |_| io::Error::other("the ring has no room for the door");
        self.mailbox.arm(&mut self.ring).map_err(full)?;
        self.door.start(&mut self.ring).map_err(full)?;
        loop {
            self.dispatch();
            self.start_requests();
            self.counters.count_batch(self.ring.enters());
            let want = match self.door.end_batch(&mut self.ring) {
                Next::Exit if self.running.used() == 0 => return Ok(()),
                // A backlog waits for completions like everything else.
                Next::Exit | Next::Sleep => 1,
                Next::Again => usize::from(!self.backlog.is_empty()),
            };
            self.ring.submit_and_wait(want)?;
            self.ring.reap(&mut self.batch);
        }
    }

    /// Hands each completion of the batch to its owner.
    fn dispatch(&mut self) {
        // Taken out so that the owners can be called; put back with its capacity.
        let mut batch = std::mem::take(&mut self.batch);
        for completion in batch.drain(..) {
            match completion.token.owner {
                Owner::Nobody => {}
                Owner::Mailbox => self.open_mail(completion.result),
                Owner::Door => self.door.event(&mut self.ring, completion),
                Owner::Backend => {
                    let slot = completion.token.index;
                    let running = self.running.get_mut(slot);
                    let progress = self.backend.advance(
                        &mut self.ring,
                        slot,
                        &mut running.request,
                        completion.token.kind,
                        completion.result,
                    );
                    self.settle(slot, progress);
                }
            }
        }
        self.batch = batch;
    }

    fn open_mail(&mut self, result: i32) {
        while let Some(command) = self.mailbox.take() {
            self.door.command(&mut self.ring, command);
        }
        if result >= 0 && self.mailbox.arm(&mut self.ring).is_err() {
            // One operation just completed, so there is room for one.
            unreachable!("no room on the ring for the mailbox");
        }
    }

    /// Starts what waits: first the backlog, then new requests while the backend takes them.
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
        // A client that refills its queue as fast as it is emptied must not keep the thread from
        // its other completions: one table full per round.
        for _ in 0..self.door.slots() {
            let Some((slot, request)) = self.door.next(&mut self.ring) else {
                return;
            };
            let running = Running {
                op: request.op,
                len_bytes: request.len_bytes,
                request,
            };
            self.running.put(slot, running);
            if self.start(slot) == Started::NoRoom {
                return;
            }
        }
    }

    fn start(&mut self, slot: Slot) -> Started {
        let request = &mut self.running.get_mut(slot).request;
        let progress = self.backend.start(&mut self.ring, slot, request);
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
        let running = self.running.take(slot);
        self.counters.count(running.op, running.len_bytes, outcome);
        self.door
            .complete(&mut self.ring, slot, running.request, outcome);
    }
}

/// Whether the backend had room.
#[derive(PartialEq, Eq)]
enum Started {
    Yes,
    NoRoom,
}
