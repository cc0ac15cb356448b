//! The clock of the queue threads.

/// Nanoseconds since the machine was started, without those in which it was suspended. The same for all threads.
#[must_use]
pub fn now_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // rustix's function panics without a complete vDSO, as in User Mode Linux.
    // SAFETY: the call writes one timespec, to `now`. It cannot fail for a clock that every kernel has.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    // Neither part is ever negative.
    let [seconds, nanoseconds] = [now.tv_sec, now.tv_nsec].map(i64::cast_unsigned);
    seconds * 1_000_000_000 + nanoseconds
}
