//! What one queue thread lets pass, and what it holds back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::limits::{Direction, LIMITS, uses};
use super::shared::{Buckets, Throttle};
use crate::io::Slot;
use crate::request::Op;

/// The limits as one queue thread sees them. Times are those of [`clock`](crate::engine::clock).
#[derive(Debug)]
pub(crate) struct Gate {
    throttle: Arc<Throttle>,
    /// The limits that `shares` is of.
    generation: u64,
    shares: Option<Shares>,
    /// Requests held back, by [`Direction`], the oldest first.
    held: [VecDeque<Held>; 2],
    /// The direction that goes first when both may start.
    turn: Direction,
    slots: usize,
    /// For how long a request may be held back at the longest.
    longest_ns: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    slot: Slot,
    op: Op,
    len_bytes: u64,
    since_ns: u64,
    /// From when on it may pass, once it has been paid for.
    due_ns: Option<u64>,
}

/// What the thread has taken from the buckets.
#[derive(Debug)]
struct Shares {
    buckets: Arc<Buckets>,
    /// Of each, what is left, and from when on it may be used.
    left: [(u64, u64); LIMITS],
}

impl Shares {
    /// Pays for a request, and returns from when on it may pass.
    fn pay(&mut self, op: Op, direction: Direction, len_bytes: u64, now_ns: u64) -> u64 {
        let mut due_ns = 0;
        for (number, tokens) in uses(op, direction, len_bytes) {
            let Some(bucket) = &self.buckets[number] else {
                continue;
            };
            let (left, usable_ns) = &mut self.left[number];
            if *left < tokens {
                let taken = (tokens - *left).max(bucket.chunk());
                *usable_ns = bucket.take(taken, now_ns);
                *left += taken;
            }
            *left -= tokens;
            due_ns = due_ns.max(*usable_ns);
        }
        due_ns
    }
}

impl Gate {
    /// Longest time for which a thread that holds requests back sleeps, in order to see that the limits have changed.
    pub(crate) const LONGEST_WAIT: Duration = Duration::from_millis(50);

    /// A gate for a thread with so many slots, which holds no request back for longer than that.
    pub(crate) fn new(throttle: &Arc<Throttle>, slots: usize, longest_hold: Duration) -> Self {
        Self {
            throttle: Arc::clone(throttle),
            generation: 0,
            shares: None,
            held: Default::default(),
            turn: Direction::Read,
            slots,
            longest_ns: u64::try_from(longest_hold.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// Whether requests have to pass here.
    #[inline]
    pub(crate) fn is_in_use(&mut self) -> bool {
        if self.generation != self.throttle.generation() {
            self.follow();
        }
        self.shares.is_some() || !self.is_empty()
    }

    /// Begins with the limits that there are now.
    #[cold]
    fn follow(&mut self) {
        // If they change in between they are followed once more.
        self.generation = self.throttle.generation();
        let left = [(0, 0); LIMITS];
        self.shares = (self.throttle.buckets()).map(|buckets| Shares { buckets, left });
        for held in &mut self.held {
            // So that holding a request back allocates nothing.
            held.reserve_exact(self.slots - held.len());
            held.iter_mut().for_each(|held| held.due_ns = None);
        }
    }

    /// Whether a request that has just arrived may start. If not it is held back.
    pub(crate) fn lets_pass(
        &mut self,
        slot: Slot,
        (op, len_bytes): (Op, u64),
        now_ns: u64,
    ) -> bool {
        let (Some(direction), Some(shares)) = (Direction::of(op), &mut self.shares) else {
            return true;
        };
        let held = &mut self.held[direction as usize];
        let due_ns = match held.is_empty() {
            true => Some(shares.pay(op, direction, len_bytes, now_ns)),
            false => None,
        };
        if due_ns.is_some_and(|due_ns| due_ns <= now_ns) {
            return true;
        }
        self.throttle.holds_back(now_ns);
        held.push_back(Held {
            slot,
            op,
            len_bytes,
            since_ns: now_ns,
            due_ns: due_ns.map(|due_ns| due_ns.min(now_ns.saturating_add(self.longest_ns))),
        });
        false
    }

    /// A request that was held back and may start; any of them if they must not wait any longer. Of a read and a write
    /// it is the one whose turn came first. Also returns for how long it was held back.
    pub(crate) fn release(&mut self, at_once: bool, now_ns: u64) -> Option<(Slot, u64)> {
        let mut next: Option<(u64, Direction)> = None;
        let longest_ns = self.longest_ns;
        for direction in [self.turn, self.turn.other()] {
            let Some(first) = self.held[direction as usize].front_mut() else {
                continue;
            };
            // Without limits, any time.
            let due_ns = self.shares.as_mut().map_or(0, |shares| {
                let pay = || {
                    let due_ns = shares.pay(first.op, direction, first.len_bytes, now_ns);
                    due_ns.min(first.since_ns.saturating_add(longest_ns))
                };
                *first.due_ns.get_or_insert_with(pay)
            });
            if next.is_none_or(|(earlier_ns, _)| due_ns < earlier_ns) {
                next = Some((due_ns, direction));
            }
        }
        // One that is let go at once has been paid for as well, and delays those that come after it.
        let (_, direction) = next.filter(|(due_ns, _)| *due_ns <= now_ns || at_once)?;
        let held = self.held[direction as usize].pop_front()?;
        self.turn = direction.other();
        Some((held.slot, now_ns.saturating_sub(held.since_ns)))
    }

    /// Whether nothing is held back.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.held.iter().all(VecDeque::is_empty)
    }

    /// How many requests are held back.
    pub(crate) fn len(&self) -> usize {
        self.held.iter().map(VecDeque::len).sum()
    }

    /// How long to sleep at the longest, if something is held back.
    pub(crate) fn wait(&self, now_ns: u64) -> Option<Duration> {
        let first = self.held.iter().filter_map(VecDeque::front);
        let due_ns = first.map(|held| held.due_ns.unwrap_or(0)).min()?;
        let wait = Duration::from_nanos(due_ns.saturating_sub(now_ns));
        Some(wait.min(Self::LONGEST_WAIT))
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
