//! What a process has used so far, all its threads together.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Processor time and wake-ups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Nanoseconds on a processor, in user and kernel mode.
    pub cpu_ns: u64,
    /// How often a thread gave its processor up to wait for something.
    pub waits: u64,
    /// Threads, those of the kernel that work for the process included.
    pub threads: u64,
}

impl Usage {
    /// What a process has used up to now.
    pub fn of(pid: u32) -> Result<Self> {
        let folder = format!("/proc/{pid}/task");
        let mut sum = Usage::default();
        let tasks = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
        for task in tasks.flatten() {
            // A thread that ends between two looks takes its share with it.
            if let Some(one) = of_thread(&task.path()) {
                sum.cpu_ns += one.cpu_ns;
                sum.waits += one.waits;
                sum.threads += 1;
            }
        }
        ensure!(sum.threads > 0, "process {pid} is gone");
        Ok(sum)
    }

    /// What was used since an earlier look.
    pub fn since(self, earlier: Usage) -> Usage {
        Usage {
            cpu_ns: self.cpu_ns.saturating_sub(earlier.cpu_ns),
            waits: self.waits.saturating_sub(earlier.waits),
            threads: self.threads,
        }
    }
}

fn of_thread(folder: &Path) -> Option<Usage> {
    let cpu_ns = match fs::read_to_string(folder.join("schedstat")) {
        Ok(schedstat) => schedstat.split_whitespace().next()?.parse().ok()?,
        // A kernel without that counts in ticks.
        Err(_) => ticks(&fs::read_to_string(folder.join("stat")).ok()?)?
            .checked_mul(1_000_000_000 / rustix::param::clock_ticks_per_second())?,
    };
    let status = fs::read_to_string(folder.join("status")).ok()?;
    Some(Usage {
        cpu_ns,
        waits: field(&status, "voluntary_ctxt_switches:")?,
        threads: 1,
    })
}

/// User and system time in `stat` (proc_pid_stat(5): fields 14 and 15). The name, field 2, is in
/// parentheses and may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// A number in `/proc/PID/status` by the name of its line.
pub fn field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use rustix::time::{ClockId, clock_gettime};

    use super::*;

    #[test]
    fn work_and_waiting_of_all_threads_are_counted() {
        let before = Usage::of(std::process::id()).expect("this process exists");
        let worker = std::thread::spawn(|| {
            for _ in 0..20 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            let mut sum = 0u64;
            // By its own clock: others may have the processor for as long as they like.
            let worked = || clock_gettime(ClockId::ThreadCPUTime);
            let start = worked();
            while (worked() - start).tv_nsec < 30_000_000 {
                sum = std::hint::black_box(sum + 1);
            }
            let after = Usage::of(std::process::id()).expect("this process exists");
            (after, sum)
        });
        let (after, _) = worker.join().expect("it counts");
        let used = after.since(before);
        assert!(used.cpu_ns > 20_000_000, "{used:?}");
        assert!(used.waits >= 20, "{used:?}");
    }

    #[test]
    fn ticks_are_the_fourteenth_and_fifteenth_field() {
        let stat = "12 (a) b) S 1 12 12 0 -1 4194304 100 0 0 0 30 12 0 0 20 0 1 0 5 1 2";
        assert_eq!(ticks(stat), Some(42));
        assert_eq!(ticks("12 (a) S 1"), None);
    }

    #[test]
    fn a_line_of_the_status_is_found_by_its_whole_name() {
        let status =
            "nonvoluntary_ctxt_switches:\t7\nvoluntary_ctxt_switches:\t3\nVmRSS:\t 12 kB\n";
        assert_eq!(field(status, "voluntary_ctxt_switches:"), Some(3));
        assert_eq!(field(status, "VmRSS:"), Some(12));
        assert_eq!(field(status, "Threads:"), None);
    }
}
