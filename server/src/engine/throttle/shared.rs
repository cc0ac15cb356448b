//! The limits of an export.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bucket::Bucket;
use super::limits::{LIMITS, RateLimits};
use crate::engine::clock;
use crate::engine::events::{self, What};

/// The limits of an export, shared by its doors.
#[derive(Debug, Default)]
pub struct Throttle {
    /// How often the limits have changed; zero: there never were any.
    generation: AtomicU64,
    current: Mutex<Current>,
    export: String,
    /// When it was last told that requests are held back; zero: never.
    told_ns: AtomicU64,
}

/// How often that is told at the most.
const TELL_INTERVAL_NS: u64 = 10_000_000_000;

#[derive(Debug, Default)]
struct Current {
    limits: RateLimits,
    buckets: Option<Arc<Buckets>>,
}

/// A bucket for each limit that is set.
pub(super) type Buckets = [Option<Bucket>; LIMITS];

impl Throttle {
    /// With these limits from the beginning.
    #[must_use]
    pub fn new(export: &str, limits: RateLimits) -> Arc<Self> {
        let throttle = Self {
            export: export.to_owned(),
            ..Self::default()
        };
        throttle.set(limits);
        Arc::new(throttle)
    }

    /// Changes the limits. Queue threads follow at their next request, or within 50 ms if they hold requests
    /// back. What was saved up or owed under the old limits is forgotten.
    pub fn set(&self, limits: RateLimits) {
        self.set_at(limits, clock::now_ns());
    }

    pub(super) fn set_at(&self, limits: RateLimits, now_ns: u64) {
        let burst_ns = u64::from(limits.burst_ms) * 1_000_000;
        let bucket = |rate| (rate > 0).then(|| Bucket::new(rate, burst_ns, now_ns));
        let buckets = (limits.are_set()).then(|| Arc::new(limits.rates().map(bucket)));
        let mut current = self.current();
        if current.limits == limits {
            return;
        }
        *current = Current { limits, buckets };
        // After the limits: a thread that sees the number finds them under the lock.
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> RateLimits {
        self.current().limits
    }

    /// The number of the limits that there are now.
    #[inline]
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// A request is held back: tells so, unless that was told lately.
    pub(super) fn holds_back(&self, now_ns: u64) {
        let told_ns = self.told_ns.load(Ordering::Relaxed);
        if told_ns != 0 && now_ns.saturating_sub(told_ns) < TELL_INTERVAL_NS {
            return;
        }
        // Of several threads one tells.
        let order = Ordering::Relaxed;
        if (self
            .told_ns
            .compare_exchange(told_ns, now_ns.max(1), order, order))
        .is_ok()
        {
            events::tell(&self.export, What::Throttled);
        }
    }

    pub(super) fn buckets(&self) -> Option<Arc<Buckets>> {
        self.current().buckets.clone()
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        // It is replaced as a whole.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
