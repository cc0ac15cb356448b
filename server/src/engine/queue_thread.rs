//! The loop: reap completions, let door and backend act, submit once.
//!
//! One thread, one ring, one door queue, one backend queue. Reaping never runs anything: the
//! completions are copied out first, then dispatched. Nothing here allocates once it runs, and
//! nothing is shared with other threads but the mailbox and the counters.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::counters::Counters;
use crate::engine::mailbox::Mailbox;
use crate::engine::polling::{IdleAction, Poller};
use crate::engine::threads::ThreadOptions;
use crate::engine::{DoorQueue, Next};
use crate::engine::{Storage, StorageQueue};
use crate::io::{Completion, Owner, Ring, Slot, SlotTable};
use crate::request::{Outcome, Progress, Request};

/// Completions dispatched per round at most.
const BATCH: usize = 256;

/// Requests begun and ended per round at most: answers are shown to the client in batches of this
/// size, so that it can go on while the next ones are being worked on.
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

/// Drives one door queue over one backend queue.
pub struct QueueThread<D: DoorQueue, B: Storage> {
    ring: Ring,
    mailbox: Mailbox<D::Command>,
    door: D,
    backend: B::Queue,
    running: SlotTable<Request>,
    /// How many requests the storage has.
    in_flight: usize,
    /// Requests the backend had no room for, in order.
    backlog: VecDeque<Slot>,
    batch: Vec<Completion>,
    counters: Arc<Counters>,
    poller: Poller,
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
    /// When the kernel refuses the ring or what the backend needs on it.
    pub fn new(
        door: D,
        disk: &B,
        mailbox: Mailbox<D::Command>,
        counters: &Arc<Counters>,
        options: &ThreadOptions,
    ) -> io::Result<Self> {
        let slots = door.slots();
        // Each request has at most one operation on the ring, the mailbox one, and a cancellation
        // completes beside what it cancels.
        let mut ring = Ring::new(slots + 2 * door.ring_operations() + 2)?;
        let backend = disk.queue(&mut ring, slots)?;
        let beside_clients = door.is_beside_clients();
        let slots = slots as usize;
        Ok(Self {
            ring,
            mailbox,
            door,
            backend,
            running: SlotTable::new(slots),
            in_flight: 0,
            backlog: VecDeque::with_capacity(slots),
            batch: Vec::with_capacity(BATCH),
            counters: Arc::clone(counters),
            poller: Poller::new(options.polling, beside_clients),
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
        self.ring.submitter().register_buffers_sparse(count)
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
            self.begun = false;
            let before = self.answered;
            self.dispatch();
            let completed = self.answered - before;
            self.start_requests();
            self.counters.count_batch(self.ring.enters());
            if self.begun || self.answered > before {
                self.poller.worked(completed);
            }
            let want = match self.door.end_batch(&mut self.ring) {
                Next::Exit if self.in_flight == 0 => return Ok(()),
                // A backlog waits for completions like everything else.
                Next::Exit => 1,
                Next::Again => usize::from(!self.backlog.is_empty()),
                Next::Idle => usize::from(!self.poll()? && self.door.listen(&mut self.ring)),
            };
            self.ring.submit_and_wait(want)?;
            self.ring.reap(&mut self.batch);
        }
    }

    /// Polls for work for as long as the poller says. Returns whether there is some.
    fn poll(&mut self) -> io::Result<bool> {
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
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(false);
            }
        }
    }

    /// Polls for about a microsecond.
    fn poll_briefly(&mut self) -> bool {
        for _ in 0..POLLS_PER_CLOCK {
            if self.ring.has_completions() || self.door.has_work() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// Hands each completion of the batch to its owner.
    fn dispatch(&mut self) {
        // Taken out so that the owners can be called; put back with its capacity.
        let mut batch = std::mem::take(&mut self.batch);
        for completion in batch.drain(..) {
            match completion.token.owner {
                Owner::None => {}
                Owner::Mailbox => self.open_mail(completion.result),
                Owner::Door => self.door.event(&mut self.ring, completion),
                Owner::Storage => {
                    let slot = completion.token.index;
                    let progress = self.backend.advance(
                        &mut self.ring,
                        slot,
                        self.running.get_mut(slot),
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
        let enough = self.answered + ANSWERS;
        let busy = self.in_flight;
        let most = busy + busy.clamp(LEAST_BEGUN, MOST_BEGUN);
        while self.answered < enough && self.in_flight < most {
            let Some((slot, mut request)) = self.door.next(&mut self.ring) else {
                return;
            };
            match self.backend.start(&mut self.ring, slot, &mut request) {
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

    fn keep(&mut self, slot: Slot, request: Request) {
        self.begun = true;
        self.in_flight += 1;
        self.running.put(slot, request);
    }

    fn start(&mut self, slot: Slot) -> Started {
        let request = self.running.get_mut(slot);
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
        let request = self.running.take(slot);
        self.in_flight -= 1;
        self.finish(slot, request, outcome);
    }

    #[inline(always)]
    fn finish(&mut self, slot: Slot, request: Request, outcome: Outcome) {
        self.answered += 1;
        self.counters.count(request.op, request.len_bytes, outcome);
        self.door.complete(&mut self.ring, slot, request, outcome);
    }
}

/// Whether the backend had room.
#[derive(PartialEq, Eq)]
enum Started {
    Yes,
    NoRoom,
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicU8, Ordering};
    use std::thread;
    use std::time::Instant;

    use io_uring::{opcode, squeue, types};

    use super::*;
    use crate::io::{Full, Token};
    use crate::request::small_disk;
    use crate::storage::Null;

    /// What a long read writes to. Both bytes are 1 until it does. Leaked: an abandoned operation
    /// has no end that anybody hears of.
    struct Target {
        begun: AtomicU8,
        ended: AtomicU8,
        vectors: Vec<libc::iovec>,
    }

    // SAFETY: nobody but the kernel follows the pointers.
    unsafe impl Send for Target {}
    // SAFETY: as above, and the bytes are atomic.
    unsafe impl Sync for Target {}

    /// The pieces between the first byte and the last, and how long each is. In all just less than
    /// the kernel moves at once.
    const PIECES: usize = 1022;
    const PIECE_BYTES: usize = 2 << 20;

    fn target() -> &'static Target {
        let target = Box::leak(Box::new(Target {
            begun: AtomicU8::new(1),
            ended: AtomicU8::new(1),
            vectors: Vec::new(),
        }));
        let piece = Box::leak(vec![1u8; PIECE_BYTES].into_boxed_slice());
        let vector = |base: *mut u8, len| libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        };
        let mut vectors = vec![vector(piece.as_mut_ptr(), PIECE_BYTES); PIECES];
        vectors.insert(0, vector(target.begun.as_ptr(), 1));
        vectors.push(vector(target.ended.as_ptr(), 1));
        target.vectors = vectors;
        target
    }

    /// A door with one operation that no cancellation ends once it has begun: a worker of the
    /// kernel reads 2 GiB of holes into the same memory again and again.
    struct Door {
        holes: File,
        target: &'static Target,
        quit: bool,
        abandons: bool,
    }

    impl DoorQueue for Door {
        type Command = ();

        fn slots(&self) -> u32 {
            1
        }

        fn ring_operations(&self) -> u32 {
            1
        }

        fn start(&mut self, ring: &mut Ring) -> Result<(), Full> {
            let vectors = &self.target.vectors;
            let count = u32::try_from(vectors.len()).expect("a thousand");
            let fd = types::Fd(self.holes.as_raw_fd());
            let read = opcode::Readv::new(fd, vectors.as_ptr(), count).build();
            let token = Token {
                owner: Owner::Door,
                kind: 0,
                index: 0,
            };
            // SAFETY: vectors and what they point to are leaked.
            unsafe { ring.push(read.flags(squeue::Flags::ASYNC), token) }
        }

        fn command(&mut self, _: &mut Ring, (): ()) {
            self.quit = true;
        }

        fn event(&mut self, _: &mut Ring, _: Completion) {}

        fn next(&mut self, _: &mut Ring) -> Option<(Slot, Request)> {
            None
        }

        fn complete(&mut self, _: &mut Ring, _: Slot, _: Request, _: Outcome) {
            unreachable!("there was no request")
        }

        fn end_batch(&mut self, _: &mut Ring) -> Next {
            if self.quit { Next::Exit } else { Next::Idle }
        }

        fn abandons_operations(&self) -> bool {
            self.abandons
        }
    }

    fn eventually(what: &str, byte: &AtomicU8) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while byte.load(Ordering::Acquire) != 0 {
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Lets a queue quit in the middle of the long read. Returns whether it waited for the end.
    fn quits_after_the_read(abandons: bool) -> bool {
        let target = target();
        let holes = rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&holes, 4 << 30).unwrap();
        let door = Door {
            holes: holes.into(),
            target,
            quit: false,
            abandons,
        };
        let (commands, mailbox) = Mailbox::new().unwrap();
        let thread = thread::spawn(move || {
            let disk = Null::new(small_disk(1 << 20));
            let thread = QueueThread::new(
                door,
                &disk,
                mailbox,
                &Arc::default(),
                &ThreadOptions::default(),
            )
            .unwrap();
            thread.run().unwrap();
            // The end of a thread waits for its kernel workers in any case: look before it.
            target.ended.load(Ordering::Acquire) == 0
        });
        eventually("the read begins", &target.begun);
        commands.send(());
        let ended = thread.join().unwrap();
        eventually("the read ends", &target.ended);
        ended
    }

    #[test]
    fn a_thread_that_ends_waits_for_what_its_door_has_on_the_ring() {
        assert!(quits_after_the_read(false));
    }

    #[test]
    fn a_thread_that_ends_does_not_wait_for_what_its_door_abandons() {
        assert!(!quits_after_the_read(true));
    }
}
