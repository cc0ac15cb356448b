//! Whether servers may open as many files as their exports take.

use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use super::{Finding, Verdict};
use crate::command::add::server_socket;
use crate::command::output::count;
use crate::export::admin;
use crate::export::runtime_dir::RuntimeDir;

/// What an export with both doors takes, and a client with a handful of queues.
const FILES_PER_EXPORT: u64 = 32;

/// What a server takes whatever it serves.
const FILES: u64 = 32;

/// A server that does not answer within this time is left out: another command says so.
const LIMIT: Duration = Duration::from_secs(1);

/// A finding for each server that runs, and one for the next one that is started from here, which is to serve all exports.
pub(super) fn findings(dir: &RuntimeDir) -> Vec<Finding> {
    let running = dir.server_names().unwrap_or_default();
    let mut findings: Vec<_> = (running.iter())
        .filter_map(|name| admin::server(&server_socket(dir, name).ok()?, LIMIT).ok())
        .filter_map(|server| {
            let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid)).ok()?;
            let whose = format!("server '{}'", server.server);
            Some(judge(&whose, soft_limit(&limits)?, server.exports.len()))
        })
        .collect();
    // A server raises its soft limit.
    let limit = getrlimit(Resource::Nofile).maximum;
    let exports = dir.names().unwrap_or_default().len();
    let whose = "a server that is started from here";
    findings.push(judge(whose, limit.unwrap_or(u64::MAX), exports.max(1)));
    findings
}

/// The soft limit on open files in the text of `/proc/PID/limits`.
fn soft_limit(limits: &str) -> Option<u64> {
    let mut lines = limits.lines();
    let values = lines.find_map(|line| line.strip_prefix("Max open files"))?;
    match values.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

fn judge(whose: &str, limit: u64, exports: usize) -> Finding {
    let wanted = FILES + FILES_PER_EXPORT * exports as u64;
    let limit = match limit {
        u64::MAX => return (Verdict::Ok, format!("{whose}: without a limit")),
        limit => limit,
    };
    let served = count(exports, "export");
    match limit >= wanted {
        true => (
            Verdict::Ok,
            format!("{whose}: at most {limit}, enough for {served}"),
        ),
        false => (
            Verdict::Warning,
            format!(
                "{whose}: at most {limit}, and {served} with a client each may take {wanted}: clients that come later \
                 will not be served; raise the hard limit (LimitNOFILE= in a unit, ulimit -Hn in a shell) and start the \
                 server again"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_low_for_what_is_served_is_told_with_numbers() {
        assert_eq!(judge("s", 64, 1).0, Verdict::Ok);
        assert_eq!(judge("s", u64::MAX, usize::MAX >> 8).0, Verdict::Ok);
        let (verdict, finding) = judge("s", 1024, 64);
        assert_eq!(verdict, Verdict::Warning);
        for part in [
            "at most 1024",
            "64 exports",
            "2080",
            "LimitNOFILE=",
            "ulimit -Hn",
        ] {
            assert!(finding.contains(part), "{part}: {finding}");
        }
    }

    #[test]
    fn the_limit_of_a_process_is_read() {
        let own = std::fs::read_to_string("/proc/self/limits").unwrap();
        let soft = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert_eq!(soft_limit(&own), Some(soft));
        let line = "Max open files            unlimited            unlimited            files\n";
        assert_eq!(soft_limit(line), Some(u64::MAX));
        assert_eq!(soft_limit(""), None);
    }
}
