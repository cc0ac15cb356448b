//! Crash points: places where a test has the server die as by SIGKILL, to examine what it leaves on disk and in
//! the driver between any two steps.
//!
//! They work in builds with the feature `testing`. In all others a point is an empty function.

#[cfg(feature = "testing")]
pub use armed::{POINTS, REQUEST_POINTS, VARIABLE};

/// Kills this process if the environment chose this point.
#[inline(always)]
pub fn point(name: &str) {
    #[cfg(feature = "testing")]
    armed::reach(name);
    #[cfg(not(feature = "testing"))]
    let _ = name;
}

/// As [`point`], on the way of a request.
#[inline(always)]
pub fn request_point(name: &str) {
    point(name);
}

#[cfg(feature = "testing")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    /// The environment variable that chooses a point: its name, or the name, a colon and a number N, to die
    /// when the point is reached for the Nth time.
    pub const VARIABLE: &str = "UBLKUP_TEST_CRASH";

    /// The points of a take-over, in the order in which they are reached: the first four by the server that
    /// leaves, the others by the one that follows.
    pub const POINTS: [&str; 14] = [
        "asked-to-leave",
        "quiesced",
        "block-door-left",
        "doors-left",
        "claimed",
        "device-recorded",
        "mark-noted",
        "device-added",
        "before-start",
        "disk-started",
        "id-written",
        "id-noted",
        "export-written",
        "export-noted",
    ];

    /// The points of a request of a vhost-user client with an in-flight record, in the order in which they are
    /// reached; the last two by a server that finds a record.
    pub const REQUEST_POINTS: [&str; 10] = [
        "chain-numbered",
        "chain-on-record",
        "answer-linked",
        "answer-in-batch",
        "answer-written",
        "answers-published",
        "answer-off-record",
        "batch-noted",
        "repair-begun",
        "repair-done",
    ];

    pub(super) fn reach(name: &str) {
        static CHOSEN: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();
        debug_assert!(
            POINTS.contains(&name) || REQUEST_POINTS.contains(&name),
            "{name}"
        );
        let chosen = CHOSEN.get_or_init(|| {
            let value = std::env::var(VARIABLE).ok()?;
            let (point, nth) = value.split_once(':').unwrap_or((&value, "1"));
            Some((point.to_owned(), AtomicU64::new(nth.parse().ok()?)))
        });
        if let Some((point, left)) = chosen
            && point == name
            && left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            // A process may always signal itself.
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}
