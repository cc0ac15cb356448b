//! What a job costs the processes that serve it: processor time and system calls.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use testkit::process;
use testkit::wait::until;

use crate::test::Context;

/// User and system time of a process so far.
pub(super) fn cpu_us(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // proc_pid_stat(5): the name, field 2, is in parentheses and may hold anything.
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .context("no name in it")?
        .1
        .split_whitespace()
        .collect();
    let ticks = |field: usize| -> Result<f64> {
        let text = fields.get(field - 3).context("too few fields")?;
        Ok(text.parse::<f64>()?)
    };
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    Ok((ticks(14)? + ticks(15)?) / per_second * 1e6)
}

/// Counts the system calls of processes until its end.
pub(super) struct SystemCalls {
    strace: std::process::Child,
    output: PathBuf,
    patience: Duration,
}

impl SystemCalls {
    pub(super) fn of(cx: &Context, pids: [Option<u32>; 2]) -> Result<Self> {
        let output = cx.scratch().join("strace");
        let said = cx.scratch().join("strace.err");
        let mut command = Command::new("strace");
        command.args(["-f", "-c", "-qq", "-o"]).arg(&output);
        for pid in pids.into_iter().flatten() {
            command.arg("-p").arg(pid.to_string());
        }
        let stderr = File::create(&said).context("cannot create a file")?;
        let strace = process::spawn_bound(command.stderr(stderr))?;
        let counting = Self {
            strace,
            output,
            patience: cx.patience(20),
        };
        // It is attached when the kernel says so of every thread.
        until("strace is attached", counting.patience, || {
            Ok(pids.into_iter().flatten().all(is_traced))
        })
        .with_context(|| std::fs::read_to_string(&said).unwrap_or_default())?;
        Ok(counting)
    }

    /// How many there were of each.
    pub(super) fn end(mut self) -> Result<Vec<(String, u64)>> {
        process::signal(&self.strace, rustix::process::Signal::INT)?;
        process::wait_limited(&mut self.strace, self.patience)?.context("strace does not end")?;
        let text = std::fs::read_to_string(&self.output).context("strace wrote nothing")?;
        calls(&text).with_context(|| format!("strace's table cannot be read:\n{text}"))
    }
}

/// Whether every thread of a process is being traced.
fn is_traced(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter();
    tasks
        .flatten()
        .flatten()
        // A thread that ends meanwhile does not count.
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
        .all(|status| {
            status
                .lines()
                .any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        })
}

/// The columns `calls` and `syscall` of the table of `strace -c`, which ends with a line of sums.
fn calls(table: &str) -> Option<Vec<(String, u64)>> {
    let rows = table.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let count = words.nth(3)?.parse().ok()?;
        Some((words.last()?.to_owned(), count))
    });
    let mut rows: Vec<_> = rows.collect();
    let (total, sum) = rows.pop()?;
    let is_whole = total == "total" && rows.iter().map(|row| row.1).sum::<u64>() == sum;
    is_whole.then_some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_a_table_add_up() {
        let table = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 74.31    0.004233           4      1041           io_uring_enter
 25.69    0.001463           1       959        12 futex
------ ----------- ----------- --------- --------- ----------------
100.00    0.005696           2      2000        12 total
";
        let rows = calls(table).expect("a table");
        let names: Vec<_> = rows
            .iter()
            .map(|(name, count)| (&name[..], *count))
            .collect();
        assert_eq!(names, [("io_uring_enter", 1041), ("futex", 959)]);
        assert_eq!(calls(""), None);
        assert_eq!(calls(&table.replace("959", "958")), None);
        let unfinished: String = table.split_inclusive('\n').take(4).collect();
        assert_eq!(calls(&unfinished), None);
    }

    #[test]
    fn the_processor_time_of_this_process_grows() {
        let before = cpu_us(std::process::id()).expect("readable");
        testkit::wait::eventually("time passes", || {
            cpu_us(std::process::id()).expect("readable") > before
        });
    }
}
