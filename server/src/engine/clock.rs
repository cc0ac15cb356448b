//! The clock of the queue threads.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since the machine was started, without those in which it was suspended. The same for all threads.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Neither part is ever negative.
    let [seconds, nanoseconds] = [now.tv_sec, now.tv_nsec].map(i64::cast_unsigned);
    seconds * 1_000_000_000 + nanoseconds
}
