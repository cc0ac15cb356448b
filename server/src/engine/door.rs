//! What a queue thread needs of a door.

use std::time::Duration;

use crate::io::{Completion, Full, Ring, Slot};
use crate::request::{Outcome, Request};

/// The part of a door that one queue thread drives: one or more queues of one client.
///
/// In each round the thread calls [`command`](Self::command) and [`event`](Self::event) for what
/// arrived, then [`next`](Self::next) until there is no request, [`complete`](Self::complete) for
/// what ended, and [`end_batch`](Self::end_batch) last; before it sleeps it calls
/// [`listen`](Self::listen). Completions of what the door puts on the ring must carry
/// [`crate::io::Owner::Door`].
pub trait DoorQueue {
    /// What other threads may ask of this one.
    type Command: Send + 'static;

    /// How many requests can be in flight: slots are 0 to this number - 1.
    fn slots(&self) -> u32;

    /// How many operations the door itself may have on the ring at once.
    fn ring_operations(&self) -> u32;

    /// Puts the first operations on the ring.
    ///
    /// # Errors
    ///
    /// [`Full`] when they do not fit, which [`ring_operations`](Self::ring_operations) prevents.
    fn start(&mut self, ring: &mut Ring) -> Result<(), Full>;

    /// Does what another thread asked for.
    fn command(&mut self, ring: &mut Ring, command: Self::Command);

    /// Takes a completion of an operation that the door put on the ring.
    fn event(&mut self, ring: &mut Ring, completion: Completion);

    /// The next request, if there is one and a slot for it. Requests that the door itself refuses
    /// are answered here and not returned.
    fn next(&mut self, ring: &mut Ring) -> Option<(Slot, Request)>;

    /// Answers a request. The answer may be delayed until [`end_batch`](Self::end_batch).
    fn complete(&mut self, ring: &mut Ring, slot: Slot, request: Request, outcome: Outcome);

    /// Publishes the answers of this round, notifies clients, and says what the thread does next.
    fn end_batch(&mut self, ring: &mut Ring) -> Next;

    /// Whether there is work that no completion on the ring tells of. Called again and again by a
    /// thread that polls.
    fn has_work(&self) -> bool {
        false
    }

    /// Prepares for sleep: from now on new work completes an operation on the ring. Returns false
    /// when there is work already.
    fn listen(&mut self, _ring: &mut Ring) -> bool {
        true
    }

    /// Whether something waits for the requests of this queue to end: those that limits hold back start at once then.
    fn drains(&self) -> bool {
        false
    }

    /// For how long at the longest limits may hold a request back.
    fn longest_hold(&self) -> Duration {
        Duration::MAX
    }

    /// Whether all clients can run only on the one processor that this thread may use.
    fn is_beside_clients(&self) -> bool {
        false
    }

    /// Whether the client of the requests under way is gone: see [`StorageQueue::abandon`]. Asked after each
    /// [`command`](Self::command).
    ///
    /// [`StorageQueue::abandon`]: crate::engine::StorageQueue::abandon
    fn abandons_requests(&self) -> bool {
        false
    }

    /// The thread failed or panicked and will call nothing else of this but
    /// [`abandons_operations`](Self::abandons_operations): operations that no cancellation reaches
    /// are to be left to the kernel.
    fn on_failure(&mut self) {}

    /// Whether operations of the door that are still on the ring when the thread ends are left to
    /// the kernel, because no cancellation reaches them. The door then leaks the memory that these
    /// operations point to.
    fn abandons_operations(&self) -> bool {
        false
    }
}

/// What a queue thread does after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another round at once: there are requests waiting.
    Again,
    /// Nothing to do until something arrives.
    Idle,
    /// The door is closed and everything is answered: the thread ends.
    Exit,
}
