//! Other processes, told apart by more than their number.

use std::fs;

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
        let (started, _) = look(pid)?;
        Some(Self { pid, started })
    }

    /// Whether it has not begun to exit. A process closes its sockets while it exits.
    #[must_use]
    pub fn is_running(self) -> bool {
        look(self.pid).is_some_and(|(started, runs)| runs && started == self.started)
    }
}

/// When a process started, and whether it has not begun to exit (proc_pid_stat(5)).
fn look(pid: i32) -> Option<(u64, bool)> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(stat: &str) -> Option<(u64, bool)> {
    // The name is in parentheses and may hold any character.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // Numbered from 1 in the manual page, and the first one here is the third.
    let field = |number: usize| fields.get(number - 3).copied();
    let is_dead = matches!(field(3)?, "Z" | "X");
    let flags: u64 = field(9)?.parse().ok()?;
    let started = field(22)?.parse().ok()?;
    Some((started, !is_dead && flags & EXITING == 0))
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
        assert_eq!(parse(stat), Some((4711, true)));
        let exiting = stat.replace(" 4194304 ", " 4194308 ");
        assert_eq!(parse(&exiting), Some((4711, false)));
        let zombie = stat.replace(") R", ") Z");
        assert_eq!(parse(&zombie), Some((4711, false)));
        assert_eq!(parse(""), None);
    }
}
