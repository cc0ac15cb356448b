//! The signals that end the program in order, and the one that may not.

use std::fs;
use std::ptr;

pub use signal_hook::consts::SIGHUP;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR2};

/// The one that leaves block devices and clients to the next server.
pub const LEAVE: i32 = SIGUSR2;

/// Those to listen for. SIGHUP is not among them if the program was started with it ignored, as
/// nohup(1) does: then it is to outlive its terminal.
#[must_use]
pub fn that_end() -> Vec<i32> {
    let mut signals = vec![SIGTERM, SIGINT, LEAVE];
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    signals
}

/// Whether SIGHUP ends the program: it tells that its terminal has gone. A service without a terminal gets it from people
/// who mean that it should read its configuration.
#[must_use]
pub fn hangup_ends() -> bool {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The seventh field is the terminal's device number (proc_pid_stat(5)); the name, in parentheses, may hold anything.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    let terminal = fields.and_then(|fields| fields.split_whitespace().nth(4));
    terminal != Some("0")
}

/// Whether the signal, after another one, asks for an end that waits for nothing. SIGHUP may come with the first one:
/// from a terminal, or from a service manager (`SendSIGHUP=`).
#[must_use]
pub fn insists(signal: i32) -> bool {
    matches!(signal, SIGTERM | SIGINT)
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeroes is a `sigaction` (plain numbers and a null handler).
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asks only; `now` is ours and outlives the call.
    let result = unsafe { libc::sigaction(signal, ptr::null(), &raw mut now) };
    result == 0 && now.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::consts::SIGPIPE;

    #[test]
    fn what_was_ignored_from_the_start_is_left_alone() {
        // The runtime of every Rust program ignores SIGPIPE, and none ignores SIGTERM.
        assert!(is_ignored(SIGPIPE));
        assert!(!is_ignored(SIGTERM));
        assert_eq!(that_end().contains(&SIGHUP), !is_ignored(SIGHUP));
    }
}
