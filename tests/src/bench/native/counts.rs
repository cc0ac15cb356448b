//! What cannot be counted while time is measured. Each is counted in a short run of its own.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use testkit::process;

use super::servers::{self, Backend, Files, Who};
use super::steps::Stepper;
use super::{Load, attach};
use crate::bench::Settings;
use crate::bench::client::End;

/// What a server does for one request; `None` is "cannot be counted here".
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    /// System calls.
    pub syscalls: Option<f64>,
    /// Instructions in user mode: as perf counts them; where it cannot, ours as it is by default is counted
    /// one by one if nothing is behind the disk.
    pub instructions: Option<f64>,
}

/// Requests during which instructions are counted one by one, a thousand times slower than they are
/// without. QEMU's daemon, which makes many more for each, would take minutes; other ways of polling find
/// no more to do between two requests.
const STEPPED_REQUESTS: u64 = 1000;

/// Counts by perf, or else, system calls only, by strace.
pub fn of(settings: &Settings, files: &Files, who: &Who, load: &Load) -> Result<Counts> {
    let socket = files.scratch.join("bench.sock");
    let cpu = settings.server_cpu;
    let server = servers::start(who, load.backend, files, &socket, cpu)?;
    let output = files.scratch.join("syscalls.txt");
    let counter = Counter::start(server.pid(), &output)?;
    let answer = attach(
        settings,
        load,
        &socket,
        server.pid(),
        settings.short_window(),
    )?;
    let (syscalls, instructions) = counter.stop(&output)?;
    server.stop()?;
    let per_io = |count: u64| count as f64 / answer.all_requests as f64;
    let instructions = match instructions {
        None if load.backend == Backend::Null && load.depth > 1 && who.is_plain() => {
            Some(steps_for_one(settings, files, who, load)?)
        }
        counted => counted.map(per_io),
    };
    Ok(Counts {
        syscalls: Some(per_io(syscalls)),
        instructions,
    })
}

/// Instructions for one request, counted one by one: what so many more requests need, so that how the
/// client comes and goes is not in it.
fn steps_for_one(settings: &Settings, files: &Files, who: &Who, load: &Load) -> Result<f64> {
    let socket = files.scratch.join("bench.sock");
    let steps_for = |requests| -> Result<(u64, u64)> {
        let server = servers::start(who, load.backend, files, &socket, settings.server_cpu)?;
        let stepper = Stepper::start(server.pid())?;
        let window = End::Requests(requests);
        let answer = attach(settings, load, &socket, server.pid(), window)?;
        let steps = stepper.stop()?.instructions;
        server.stop()?;
        Ok((steps, answer.all_requests))
    };
    let (few, more) = (
        steps_for(STEPPED_REQUESTS / 4)?,
        steps_for(STEPPED_REQUESTS)?,
    );
    let requests = more.1.saturating_sub(few.1);
    ensure!(requests > 0, "the client does not do what it is told");
    Ok(more.0.saturating_sub(few.0) as f64 / requests as f64)
}

/// perf's names of what is counted.
const SYSCALLS: &str = "raw_syscalls:sys_enter";
const INSTRUCTIONS: &str = "instructions:u";

/// A program that counts the system calls of a process.
enum Counter {
    Perf(Child),
    Strace(Child),
}

impl Counter {
    /// Attaches to a process.
    fn start(pid: u32, output: &Path) -> Result<Self> {
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
            let events = format!("{SYSCALLS},{INSTRUCTIONS}");
            let args = ["stat", "-x", ",", "-e", &events, "-p", &pid, "-o", &file];
            let child = spawn("perf", &args)?;
            std::thread::sleep(Duration::from_millis(300));
            return Ok(Counter::Perf(child));
        }
        let child = spawn("strace", &["-c", "-f", "-p", &pid, "-o", &file])?;
        std::thread::sleep(Duration::from_millis(300));
        Ok(Counter::Strace(child))
    }

    /// System calls, and instructions if they could be counted.
    fn stop(self, output: &Path) -> Result<(u64, Option<u64>)> {
        let (mut child, read): (Child, fn(&str) -> Option<u64>) = match self {
            Counter::Perf(child) => (child, |text| perf_total(text, SYSCALLS)),
            Counter::Strace(child) => (child, strace_total),
        };
        process::signal(&child, Signal::INT)?;
        let ended = process::wait_limited(&mut child, Duration::from_secs(10))?;
        ensure!(ended.is_some(), "the counting program does not end");
        let text = fs::read_to_string(output).context("the system calls were not written")?;
        let syscalls =
            read(&text).with_context(|| format!("no total of system calls in:\n{text}"))?;
        Ok((syscalls, perf_total(&text, INSTRUCTIONS)))
    }
}

/// perf may be there and not allowed, or the kernel may have no such event.
fn perf_counts_syscalls() -> bool {
    let args = ["stat", "-x", ",", "-e", SYSCALLS, "true"];
    testkit::shell::Shell::new("perf")
        .args(args)
        .finish()
        .is_ok_and(|said| said.status.success() && perf_total(&said.stderr, SYSCALLS).is_some())
}

/// The count of an event in `perf stat -x,`, if perf could count it.
fn perf_total(text: &str, event: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains(event))?;
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
        let perf = "# started on Mon\n\n1234,,raw_syscalls:sys_enter,16,100.00,,\n\
                    <not supported>,,instructions:u,0,100.00,,\n";
        assert_eq!(perf_total(perf, SYSCALLS), Some(1234));
        assert_eq!(perf_total(perf, INSTRUCTIONS), None);
        let both = "12,,raw_syscalls:sys_enter,16,100.00,,\n99,,instructions:u,16,100.00,,\n";
        assert_eq!(perf_total(both, INSTRUCTIONS), Some(99));
        let strace = "% time     seconds  usecs/call     calls    errors syscall\n\
                      ------ ----------- ----------- --------- --------- ----------------\n \
                      99.00    0.000010           1        10         2 read\n\
                      100.00    0.000010           1        12         2 total\n";
        assert_eq!(strace_total(strace), Some(12));
    }
}
