//! Points at which a test lets a server die, so that what it leaves on disk and in the driver can be
//! looked at in every state on the way from one to the next.

/// The environment variable that names the point.
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

/// Ends the process at once, as SIGKILL does, if it was told to die here.
pub fn point(name: &str) {
    debug_assert!(POINTS.contains(&name), "{name}");
    if std::env::var_os(VARIABLE).is_some_and(|at| at == name) {
        let ourselves = rustix::process::getpid();
        // It cannot fail: every process may signal itself.
        let _ = rustix::process::kill_process(ourselves, rustix::process::Signal::KILL);
    }
}
