//! Other processes, told apart by more than their number.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process. Numbers are given out again, so its start belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Clock ticks between the start of the machine and its own.
    pub started: u64,
}

/// Flag of a process that has begun to exit (`PF_EXITING` in linux/sched.h).
const EXITING: u64 = 4;

impl Process {
    /// The process that has this number now, if this user may see it.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        match look(pid) {
            Seen::Process { started, .. } => Some(Self { pid, started }),
            Seen::Nothing | Seen::Unknown => None,
        }
    }

    /// Whether it has not begun to exit, as far as can be seen. A process closes its sockets while it exits.
    #[must_use]
    pub fn is_running(self) -> bool {
        match look(self.pid) {
            Seen::Process { started, runs } => runs && started == self.started,
            Seen::Nothing => false,
            // Its disk would be given to another one.
            Seen::Unknown => true,
        }
    }
}

/// What is seen of the process that has a number.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Process {
        started: u64,
        /// It has not begun to exit.
        runs: bool,
    },
    /// This process has no descriptor left to look with, say, or the other one is hidden from it.
    Unknown,
}

fn look(pid: i32) -> Seen {
    match seen(fs::read(format!("/proc/{pid}/stat"))) {
        Seen::Nothing if exists(pid) => Seen::Unknown,
        other => other,
    }
}

/// Whether there may be a process with this number. `/proc` denies those of other users where it is mounted with
/// `hidepid=2`.
fn exists(pid: i32) -> bool {
    let Some(pid) = Pid::from_raw(pid) else {
        return false;
    };
    !matches!(pidfd_open(pid, PidfdFlags::empty()), Err(Errno::SRCH))
}

fn seen(stat: io::Result<Vec<u8>>) -> Seen {
    match stat {
        // A name need not be UTF-8, and what comes after it is ASCII.
        Ok(stat) => parse(&String::from_utf8_lossy(&stat)).unwrap_or(Seen::Unknown),
        Err(error) => match Errno::from_io_error(&error) {
            // The second when it ends between the opening and the reading.
            Some(Errno::NOENT | Errno::SRCH) => Seen::Nothing,
            _ => Seen::Unknown,
        },
    }
}

/// Reads `/proc/PID/stat` (proc_pid_stat(5)).
fn parse(stat: &str) -> Option<Seen> {
    // The name is in parentheses and may hold any character.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // Numbered from 1 in the manual page, and the first one here is the third.
    let field = |number: usize| fields.get(number - 3).copied();
    let is_dead = matches!(field(3)?, "Z" | "X");
    let flags: u64 = field(9)?.parse().ok()?;
    Some(Seen::Process {
        started: field(22)?.parse().ok()?,
        runs: !is_dead && flags & EXITING == 0,
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_ends() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::of(pid).unwrap();
        assert!(process.is_running());
        let earlier = Process {
            started: process.started - 1,
            ..process
        };
        assert!(!earlier.is_running(), "another one had the number before");
        child.kill().unwrap();
        // A process that was not waited for is still there.
        while process.is_running() {
            std::thread::yield_now();
        }
        assert!(Process::of(pid).is_some());
        child.wait().unwrap();
        assert!(!process.is_running());
    }

    #[test]
    fn a_name_cannot_forge_a_field() {
        let stat = "7 (a) Z 1) R 1 2 3 4 5 4194304 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        let process = |runs| {
            let started = 4711;
            Some(Seen::Process { started, runs })
        };
        assert_eq!(parse(stat), process(true));
        let exiting = stat.replace(" 4194304 ", " 4194308 ");
        assert_eq!(parse(&exiting), process(false));
        let zombie = stat.replace(") R", ") Z");
        assert_eq!(parse(&zombie), process(false));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_process_is_seen_whatever_its_name() {
        // A thread can be looked at like a process.
        rustix::thread::set_name(c"\xff)\x80").unwrap();
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        assert!(Process::of(own).is_some_and(Process::is_running));
    }

    #[test]
    fn a_process_exists_although_proc_may_deny_it() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(exists(pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!exists(pid));
        assert_eq!(look(pid), Seen::Nothing);
    }

    #[test]
    fn only_a_process_that_is_not_there_has_ended() {
        let failed = |errno: Errno| seen(Err(errno.into()));
        assert_eq!(failed(Errno::NOENT), Seen::Nothing);
        assert_eq!(failed(Errno::SRCH), Seen::Nothing);
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS] {
            assert_eq!(failed(errno), Seen::Unknown, "{errno}");
        }
        assert_eq!(seen(Ok(Vec::new())), Seen::Unknown);
    }
}
