//! What cannot be counted while time is measured. Each is counted in a short run of its own.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::servers::{self, Files, Who};
use super::{Load, attach};
use crate::bench::Settings;
use crate::packages::find_program;
use crate::process;

/// System calls of a server for one request, counted by perf, or else by strace; `None` if there is
/// neither.
///
/// # Errors
/// A server or a counting program failed.
pub fn syscalls(settings: &Settings, files: &Files, who: &Who, load: &Load) -> Result<Option<f64>> {
    let socket = files.scratch.join("bench.sock");
    let cpu = settings.server_cpu;
    let server = servers::start(who, load.backend, files, &socket, cpu)?;
    let output = files.scratch.join("syscalls.txt");
    let Some(counter) = Counter::start(server.pid(), &output)? else {
        server.stop()?;
        return Ok(None);
    };
    let answer = attach(
        settings,
        load,
        &socket,
        server.pid(),
        settings.short_window(),
    )?;
    let count = counter.stop(&output)?;
    server.stop()?;
    Ok(Some(count as f64 / answer.all_requests as f64))
}

/// A program that counts the system calls of a process.
enum Counter {
    Perf(Child),
    Strace(Child),
}

impl Counter {
    /// Attaches to a process; `None` if this machine has nothing to count with.
    fn start(pid: u32, output: &Path) -> Result<Option<Self>> {
        let spawn = |program: &str, args: &[&str]| {
            process::spawn_bound(
                Command::new(program)
                    .args(args)
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null()),
            )
        };
        let (pid, file) = (pid.to_string(), output.display().to_string());
        if perf_counts_syscalls() {
            let event = "raw_syscalls:sys_enter";
            let args = ["stat", "-x", ",", "-e", event, "-p", &pid, "-o", &file];
            let child = spawn("perf", &args)?;
            std::thread::sleep(Duration::from_millis(300));
            return Ok(Some(Counter::Perf(child)));
        }
        if find_program("strace").is_some() {
            let child = spawn("strace", &["-c", "-f", "-p", &pid, "-o", &file])?;
            std::thread::sleep(Duration::from_millis(300));
            return Ok(Some(Counter::Strace(child)));
        }
        Ok(None)
    }

    fn stop(self, output: &Path) -> Result<u64> {
        let (mut child, read): (Child, fn(&str) -> Option<u64>) = match self {
            Counter::Perf(child) => (child, perf_total),
            Counter::Strace(child) => (child, strace_total),
        };
        process::signal(&child, Signal::INT)?;
        let ended = process::wait_limited(&mut child, Duration::from_secs(10))?;
        ensure!(ended.is_some(), "the counting program does not end");
        let text = fs::read_to_string(output).context("the system calls were not written")?;
        read(&text).with_context(|| format!("no total of system calls in:\n{text}"))
    }
}

/// perf may be there and not allowed, or the kernel may have no such event.
fn perf_counts_syscalls() -> bool {
    let args = ["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "true"];
    crate::kit::shell::Shell::new("perf")
        .args(args)
        .finish()
        .is_ok_and(|said| said.status.success() && perf_total(&said.stderr).is_some())
}

/// The count in `perf stat -x,`.
fn perf_total(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find(|line| line.contains("raw_syscalls:sys_enter"))?;
    line.split(',').next()?.parse().ok()
}

/// The sum in `strace -c`.
fn strace_total(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.ends_with(" total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_found_in_what_the_counting_programs_write() {
        let perf = "# started on Mon\n\n1234,,raw_syscalls:sys_enter,16,100.00,,\n";
        assert_eq!(perf_total(perf), Some(1234));
        let not = "<not supported>,,raw_syscalls:sys_enter,0,100.00,,\n";
        assert_eq!(perf_total(not), None);
        let strace = "% time     seconds  usecs/call     calls    errors syscall\n\
                      ------ ----------- ----------- --------- --------- ----------------\n \
                      99.00    0.000010           1        10         2 read\n\
                      100.00    0.000010           1        12         2 total\n";
        assert_eq!(strace_total(strace), Some(12));
    }
}
