//! Points at which a test lets a server die, so that what it leaves on disk and in the driver can be
//! looked at in every state on the way from one to the next.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable that names the point: one of [`POINTS`], or one of [`REQUEST_POINTS`] with a
/// colon and how many times a server passes it before it dies there, the last one included.
pub const VARIABLE: &str = "UBLKUP_TEST_CRASH";

/// The points, in the order in which a server that takes over from another passes them; the first
/// ones are passed by the other.
pub const POINTS: [&str; 13] = [
    "asked-to-leave",
    "quiesced",
    "block-door-left",
    "doors-left",
    "claimed",
    "mark-noted",
    "device-added",
    "before-start",
    "disk-started",
    "id-written",
    "id-noted",
    "export-written",
    "export-noted",
];

/// The points on the way of a request of a vhost client whose requests are on record (`inflight.rs`), in
/// the order in which it passes them; the last two are passed by a server that finds a record.
pub const REQUEST_POINTS: [&str; 10] = [
    "chain-numbered",
    "chain-on-record",
    "answer-linked",
    "answer-in-batch",
    "answer-written",
    "answers-shown",
    "answer-off-record",
    "batch-noted",
    "repair-begun",
    "repair-done",
];

/// Ends the process at once, as SIGKILL does, if it was told to die here.
pub fn point(name: &str) {
    debug_assert!(POINTS.contains(&name), "{name}");
    if std::env::var_os(VARIABLE).is_some_and(|at| at == name) {
        die();
    }
}

/// As [`point`], on the way of a request. Only in builds with debug assertions: it would cost others
/// time.
#[inline(always)]
pub fn request_point(name: &str) {
    if cfg!(debug_assertions) {
        count_down(name);
    }
}

fn count_down(name: &str) {
    static WHERE: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();
    debug_assert!(REQUEST_POINTS.contains(&name), "{name}");
    let chosen = WHERE.get_or_init(|| {
        let value = std::env::var(VARIABLE).ok()?;
        let (point, times) = value.split_once(':')?;
        Some((point.to_owned(), AtomicU64::new(times.parse().ok()?)))
    });
    if let Some((point, times)) = chosen
        && point == name
        && times.fetch_sub(1, Ordering::Relaxed) == 1
    {
        die();
    }
}

fn die() {
    let ourselves = rustix::process::getpid();
    // It cannot fail: every process may signal itself.
    let _ = rustix::process::kill_process(ourselves, rustix::process::Signal::KILL);
}
