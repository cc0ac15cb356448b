//! One limit as a bucket of tokens that fills at a constant rate.
//!
//! The bucket is kept as a time, the one at which all tokens taken so far will have flowed in (the virtual scheduling
//! algorithm of ITU-T I.371, known as GCRA). Taking tokens moves it on by the time that they take to flow in, and
//! returns where it was: the taker may use them from then on. So a request for more tokens than the bucket holds is
//! let pass when its turn has come and delays those after it, and threads that wait are served in the order in which
//! they took, each with one atomic operation.

use std::sync::atomic::{AtomicU64, Ordering};

const NS_PER_SECOND: u128 = 1_000_000_000;

/// Takes per second at which a busy thread aims, so that a cache line is not fought for.
const TAKES_PER_SECOND: u64 = 200;

/// One limit of an export. Times are nanoseconds of one clock.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: u64,
    burst_ns: u64,
    /// When the tokens taken so far have flowed in.
    filled_at_ns: AtomicU64,
}

impl Bucket {
    /// A bucket that is empty at `now_ns`, fills with `per_second` tokens, and holds as many as flow in during `burst_ns`.
    pub(super) fn new(per_second: u64, burst_ns: u64, now_ns: u64) -> Self {
        Self {
            per_second,
            burst_ns,
            filled_at_ns: AtomicU64::new(now_ns),
        }
    }

    /// Takes tokens, and returns from when on they may be used.
    pub(super) fn take(&self, tokens: u64, now_ns: u64) -> u64 {
        let cost_ns = u128::from(tokens) * NS_PER_SECOND / u128::from(self.per_second);
        let cost_ns = u64::try_from(cost_ns).unwrap_or(u64::MAX);
        // What flows into a full bucket is lost.
        let full = now_ns.saturating_sub(self.burst_ns);
        // Only the time itself is shared, so no order with other memory is needed.
        let before = self
            .filled_at_ns
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |at| {
                Some(at.max(full).saturating_add(cost_ns))
            });
        let (Ok(before) | Err(before)) = before;
        before.max(full)
    }

    /// How many tokens a thread takes at once that uses one after the other: so few that it is soon the others' turn.
    pub(super) fn chunk(&self) -> u64 {
        (self.per_second / TAKES_PER_SECOND).max(1)
    }
}
