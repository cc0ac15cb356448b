//! A virtqueue of the server: which requests it has, and which wait for a server.
//!
//! A queue thread has one for itself where the server has enough; otherwise threads share it, so there is a lock, which
//! no other thread holds as a rule. Whichever thread finds that requests have been used posts the results of all.
//!
//! Requests wait while there is no server, while its memory table is being changed, and when the ring is full. When a
//! server goes away, what it had waits again, and is submitted again, in the order of before, to the one that comes back.
//! docs/decisions.md says why that is right.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::flushes::Flushes;
use super::vring::{Command, SIZE, Segment, Violation, Vring};
use crate::engine::inbox::{Post, Ticket};

/// An eventfd that the server gets too. Neither side waits for the other: io_uring tries a write to a blocking one again
/// and again, and then on a thread of its own.
pub(super) fn new_eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

/// Writes to an eventfd that the server has too, without waiting. Its counter may be at the end, where it is readable;
/// and the server can switch EFD_NONBLOCK off, which is a property of the file that both have.
pub(super) fn notify(eventfd: &EventFd) {
    // SAFETY: `eventfd` keeps it open.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    if poll(&mut fds, Some(&Timespec::default())) == Ok(1) {
        let _ = eventfd.write(1);
    }
}

/// A request.
#[derive(Debug)]
struct Entry {
    owner: usize,
    ticket: Ticket,
    command: Command,
    segments: Vec<Segment>,
    /// The order in which requests came.
    number: u64,
    /// Of a flush that the server has: the writes that it covers.
    covered: u64,
}

/// The server's side of it, while there is a server.
#[derive(Debug)]
pub(super) struct Live {
    pub vring: Vring,
    /// Not those of the server before: it could take what is meant for this one. The server writes to `call` when it has
    /// used requests.
    pub kick: Arc<EventFd>,
    pub call: Arc<EventFd>,
    /// Which connection it is.
    pub epoch: u64,
}

#[derive(Debug)]
struct State {
    live: Option<Live>,
    /// That of the last server.
    call: Arc<EventFd>,
    is_paused: bool,
    /// By head of its chain.
    in_flight: Box<[Option<Entry>]>,
    waiting: VecDeque<Entry>,
    /// Where the threads that use it get their results.
    owners: Vec<Option<Post>>,
    /// By owner: its client is gone.
    abandoned: Vec<bool>,
    /// Lists for entries to come.
    lists: Vec<Vec<Segment>>,
    last_number: u64,
    /// `None`: the disk has no cache.
    flushes: Option<Arc<Flushes>>,
}

/// Whether a thread may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Listening {
    Sleep,
    /// The server has used something.
    Used,
    /// There is another server, which notifies elsewhere.
    OtherCall,
}

/// A virtqueue.
#[derive(Debug)]
pub(super) struct Virtqueue {
    state: Mutex<State>,
}

impl Virtqueue {
    pub(super) fn new(flushes: Option<Arc<Flushes>>) -> io::Result<Self> {
        let state = State {
            live: None,
            call: Arc::new(new_eventfd()?),
            is_paused: false,
            in_flight: (0..SIZE).map(|_| None).collect(),
            waiting: VecDeque::with_capacity(SIZE.into()),
            owners: Vec::new(),
            abandoned: Vec::new(),
            lists: Vec::with_capacity(SIZE.into()),
            last_number: 0,
            flushes,
        };
        Ok(Self {
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What could panic under the lock is a mistake here, and leaves requests without an answer at worst.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the server notifies of used requests. A thread that sleeps is woken when it becomes another one.
    pub(super) fn call(&self) -> Arc<EventFd> {
        Arc::clone(&self.state().call)
    }

    /// A thread that gets its results here begins to use it. Returns its number.
    pub(super) fn join(&self, post: Post) -> usize {
        let mut state = self.state();
        let free = state.owners.iter().position(Option::is_none);
        let owner = free.unwrap_or(state.owners.len());
        match free {
            Some(owner) => state.owners[owner] = Some(post),
            None => {
                state.owners.push(Some(post));
                state.abandoned.push(false);
            }
        }
        state.abandoned[owner] = false;
        if let Some(live) = &state.live {
            // Threads that share it cannot say when all of them are awake.
            live.vring.notify(true);
        }
        owner
    }

    /// A thread uses it no more. Others are woken: a notification that was theirs may have come to this thread.
    pub(super) fn leave(&self, owner: usize) {
        let mut state = self.state();
        state.owners[owner] = None;
        state.waiting.retain(|entry| entry.owner != owner);
        state.wake_owners();
    }

    /// Gives the server a request, or keeps it until there is a server with room. Returns what is to be written to for the
    /// server to learn of it.
    pub(super) fn submit(
        &self,
        (owner, ticket): (usize, Ticket),
        command: Command,
        segments: &[Segment],
    ) -> Option<Arc<EventFd>> {
        let mut state = self.state();
        if command.kind == VIRTIO_BLK_T_FLUSH
            && state
                .flushes
                .as_ref()
                .is_some_and(|flushes| flushes.take_loss())
        {
            if let Some(Some(post)) = state.owners.get(owner) {
                post.deliver(ticket, -libc::EIO);
            }
            return None;
        }
        let mut list = state.lists.pop().unwrap_or_default();
        list.clear();
        list.extend_from_slice(segments);
        state.last_number += 1;
        let entry = Entry {
            owner,
            ticket,
            command,
            segments: list,
            number: state.last_number,
            covered: 0,
        };
        state.waiting.push_back(entry);
        state.submit_waiting()
    }

    /// Whether the server has used requests.
    pub(super) fn has_used(&self) -> bool {
        self.state().has_used()
    }

    /// Asks the server for notifications, or for none, which a thread that shares the virtqueue cannot. Returns whether it
    /// has used something already.
    pub(super) fn notify(&self, on: bool) -> bool {
        let state = self.state();
        let is_shared = || state.owners.iter().flatten().count() > 1;
        match &state.live {
            Some(live) if on || !is_shared() => live.vring.notify(on),
            _ => state.has_used(),
        }
    }

    /// Prepares for the sleep of a thread that hears of `call`.
    pub(super) fn listen(&self, call: &Arc<EventFd>) -> Listening {
        let state = self.state();
        let has_used = state
            .live
            .as_ref()
            .is_some_and(|live| live.vring.notify(true));
        match Arc::ptr_eq(call, &state.call) {
            false => Listening::OtherCall,
            true if has_used => Listening::Used,
            true => Listening::Sleep,
        }
    }

    /// Posts the results of what the server has used.
    ///
    /// # Errors
    ///
    /// When the server broke the protocol. It gets nothing more by this connection, whose number is returned.
    pub(super) fn reap(&self) -> Result<(), (u64, Violation)> {
        let mut state = self.state();
        let mut any = false;
        while let Some(live) = &mut state.live {
            match live.vring.reap() {
                Ok(None) => break,
                Ok(Some((head, status))) => {
                    any = true;
                    state.post(head, status);
                }
                Err(violation) => {
                    let epoch = live.epoch;
                    state.end();
                    return Err((epoch, violation));
                }
            }
        }
        let kick = match any {
            true => state.submit_waiting(),
            false => None,
        };
        drop(state);
        if let Some(kick) = kick {
            notify(&kick);
        }
        Ok(())
    }

    /// There is a server.
    pub(super) fn begin(&self, live: Live) {
        let mut state = self.state();
        state.call = Arc::clone(&live.call);
        state.live = Some(live);
        state.is_paused = false;
        state.wake_owners();
        self.resume_with(state);
    }

    /// The server is gone. What it had waits.
    pub(super) fn end(&self) {
        self.state().end();
    }

    /// Fails the flushes that wait. Returns how many that were.
    pub(super) fn fail_flushes(&self) -> usize {
        let mut state = self.state();
        let State {
            waiting, owners, ..
        } = &mut *state;
        let before = waiting.len();
        waiting.retain(|entry| {
            let is_flush = entry.command.kind == VIRTIO_BLK_T_FLUSH;
            if is_flush && let Some(Some(post)) = owners.get(entry.owner) {
                post.deliver(entry.ticket, -libc::EIO);
            }
            !is_flush
        });
        before - waiting.len()
    }

    /// Submits nothing more for the time being.
    pub(super) fn pause(&self) {
        self.state().is_paused = true;
    }

    /// Submits again.
    pub(super) fn resume(&self) {
        let mut state = self.state();
        state.is_paused = false;
        self.resume_with(state);
    }

    fn resume_with(&self, mut state: MutexGuard<'_, State>) {
        let kick = state.submit_waiting();
        drop(state);
        if let Some(kick) = kick {
            notify(&kick);
        }
    }

    /// How many requests the server has, and how many there are in all.
    pub(super) fn counts(&self) -> (usize, usize) {
        let state = self.state();
        let has = state.in_flight.iter().flatten().count();
        (has, has + state.waiting.len())
    }

    /// The client of a thread's requests is gone: those that no server has fail, now and when a server goes away. Submitted
    /// to the next one they could undo what another client has written meanwhile.
    pub(super) fn abandon(&self, owner: usize) {
        let mut state = self.state();
        state.abandoned[owner] = true;
        if state.live.is_none() {
            state.cancel_abandoned();
        }
    }
}

impl State {
    fn wake_owners(&self) {
        self.owners.iter().flatten().for_each(Post::wake);
    }

    fn cancel_abandoned(&mut self) {
        let State {
            waiting,
            owners,
            abandoned,
            ..
        } = self;
        waiting.retain(|entry| {
            let is_abandoned = abandoned[entry.owner];
            if is_abandoned && let Some(post) = &owners[entry.owner] {
                post.deliver(entry.ticket, -libc::EIO);
            }
            !is_abandoned
        });
    }

    fn has_used(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.vring.has_used())
    }

    /// Gives the server what waits, as far as there is room. Returns what to write to if it is to be told.
    fn submit_waiting(&mut self) -> Option<Arc<EventFd>> {
        let live = self.live.as_mut()?;
        let mut any = false;
        while !self.is_paused
            && let Some(entry) = self.waiting.front()
            && live.vring.has_room(entry.segments.len())
            && let Some(mut entry) = self.waiting.pop_front()
        {
            if entry.command.kind == VIRTIO_BLK_T_FLUSH
                && let Some(flushes) = &self.flushes
            {
                entry.covered = flushes.begin();
            }
            let head = live.vring.submit(&entry.command, &entry.segments);
            self.in_flight[usize::from(head)] = Some(entry);
            any = true;
        }
        (any && live.vring.wants_kick()).then(|| Arc::clone(&live.kick))
    }

    /// Posts the result of a request.
    fn post(&mut self, head: u16, status: u8) {
        // The ring gives out only heads that it has.
        let Some(entry) = self.in_flight[usize::from(head)].take() else {
            return;
        };
        let result = match u32::from(status) {
            VIRTIO_BLK_S_OK => 0,
            VIRTIO_BLK_S_IOERR => -libc::EIO,
            _ => -libc::EOPNOTSUPP,
        };
        if let Some(flushes) = self.flushes.as_ref().filter(|_| result == 0) {
            match entry.command.kind {
                VIRTIO_BLK_T_FLUSH => flushes.ended(entry.covered),
                VIRTIO_BLK_T_IN => {}
                _ => flushes.answered(),
            }
        }
        if let Some(Some(post)) = self.owners.get(entry.owner) {
            post.deliver(entry.ticket, result);
        }
        self.lists.push(entry.segments);
    }

    fn end(&mut self) {
        self.live = None;
        let mut had: Vec<_> = self.in_flight.iter_mut().filter_map(Option::take).collect();
        had.sort_unstable_by_key(|entry| entry.number);
        for entry in had.into_iter().rev() {
            self.waiting.push_front(entry);
        }
        self.cancel_abandoned();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::inbox::Inbox;
    use crate::io::Ring;
    use crate::storage::vhost_user::vring::RingMemory;

    const WRITE: Command = Command {
        kind: 1,
        sector: 0,
        range: None,
        is_read: false,
    };

    fn live(epoch: u64) -> Live {
        let memory = RingMemory::new(1, 1 << 30).unwrap();
        Live {
            vring: Vring::new(Arc::new(memory), 0, true),
            kick: Arc::new(new_eventfd().unwrap()),
            call: Arc::new(new_eventfd().unwrap()),
            epoch,
        }
    }

    #[test]
    fn an_eventfd_that_the_server_has_filled_holds_nothing_up() {
        let (sender, done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let queue = Virtqueue::new(None).unwrap();
            let mut inbox = Inbox::new(300).unwrap();
            let owner = queue.join(inbox.post());
            let live = live(1);
            live.kick.write(u64::MAX - 1).unwrap();
            live.call.write(u64::MAX - 1).unwrap();
            queue.pause();
            queue.begin(live);
            queue.pause();
            queue.submit((owner, inbox.expect(0)), WRITE, &[]);
            queue.resume();
            queue.leave(owner);
            sender.send(()).unwrap();
        });
        let limit = std::time::Duration::from_secs(20);
        assert_eq!(done.recv_timeout(limit), Ok(()), "it waits for the server");
    }

    #[test]
    fn a_server_notifies_by_an_eventfd_that_none_had_before_and_sleeping_threads_hear_of_it() {
        let queue = Virtqueue::new(None).unwrap();
        let mut ring = Ring::new(8).unwrap();
        let mut inbox = Inbox::new(1).unwrap();
        let owner = queue.join(inbox.post());
        let mut before = queue.call();
        for epoch in 1..4 {
            assert!(inbox.listen(&mut ring));
            let live = live(epoch);
            let call = Arc::clone(&live.call);
            queue.begin(live);
            assert!(!Arc::ptr_eq(&before, &call) && Arc::ptr_eq(&queue.call(), &call));
            ring.submit_and_wait_for(Duration::from_secs(20)).unwrap();
            let mut completions = Vec::with_capacity(8);
            ring.reap(&mut completions);
            assert_eq!(completions.len(), 1, "the thread sleeps");
            inbox.rang();
            before = call;
        }
        queue.leave(owner);
    }

    #[test]
    fn what_a_server_had_is_submitted_again_in_order_and_before_what_came_later() {
        let queue = Virtqueue::new(None).unwrap();
        let mut inbox = Inbox::new(300).unwrap();
        let owner = queue.join(inbox.post());
        let mut submit = |slot: u32| {
            let ticket = inbox.expect(slot);
            let sector = slot.into();
            queue.submit((owner, ticket), Command { sector, ..WRITE }, &[])
        };
        assert!(submit(0).is_none(), "there is no server");
        queue.begin(live(1));
        assert!(submit(1).is_some());
        assert_eq!(queue.counts(), (2, 2));
        queue.end();
        submit(2);
        assert_eq!(queue.counts(), (0, 3));
        let sectors = || -> Vec<u64> {
            let state = queue.state();
            let waiting = state.waiting.iter().map(|entry| entry.command.sector);
            waiting.collect()
        };
        assert_eq!(sectors(), [0, 1, 2]);
        queue.pause();
        queue.begin(live(2));
        (3..300).for_each(|slot| drop(submit(slot)));
        assert_eq!(queue.counts(), (256, 300));
        queue.end();
        assert!(sectors().is_sorted());
        queue.abandon(owner);
        assert_eq!(queue.counts(), (0, 0));
        let mut results = std::iter::from_fn(|| inbox.next_result());
        assert!(results.all(|(_, result)| result == -libc::EIO));
    }
}
