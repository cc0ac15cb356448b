//! Facts about a process, from `/proc`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait::{PATIENCE, until, wait_for};

/// A number in a `status` file, such as that of the line `VmRSS:`.
///
/// # Errors
/// The process is gone, or there is no such line.
pub fn status(pid: u32, name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    number(&text, name).with_context(|| format!("no {name} of process {pid}"))
}

fn number(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Whether the process has a handler for SIGHUP.
///
/// # Errors
/// The process is gone.
pub fn catches_hangups(pid: u32) -> Result<bool> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = u64::from_str_radix(caught.context("no SigCgt")?.trim(), 16)?;
    // SIGHUP is 1, the lowest bit.
    Ok(caught & 1 == 1)
}

/// Context switches of all threads so far, voluntary or not.
///
/// # Errors
/// The process is gone.
pub fn context_switches(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("status"))?;
        for name in ["voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"] {
            sum += number(&text, name).with_context(|| format!("no {name}"))?;
        }
    }
    Ok(sum)
}

/// Stops a process (SIGSTOP), and waits until it is: kill(2) returns before that, and while one thread has yet to take the
/// signal, on a busy machine for a tenth of a second, the others run.
///
/// # Errors
/// The process is gone, or does not stop.
pub fn stop(pid: u32) -> Result<()> {
    let process = Pid::from_raw(pid.cast_signed()).context("no number of a process")?;
    kill_process(process, Signal::STOP).with_context(|| format!("cannot stop process {pid}"))?;
    until("all its threads have stopped", PATIENCE, || {
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            // One that has ended meanwhile does nothing either.
            let text = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
            // The state follows the name, which is in brackets.
            let state = text
                .rsplit_once(") ")
                .and_then(|(_, rest)| rest.chars().next());
            if !matches!(state, None | Some('T' | 't' | 'X' | 'Z')) {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// Waits until all threads sleep, then checks that none is scheduled for as long as something periodic
/// would need to show itself.
///
/// # Errors
/// A thread woke up, or the threads never rest.
pub fn sleeps(pid: u32) -> Result<()> {
    let mut before = context_switches(pid)?;
    wait_for("all threads sleep", Duration::from_secs(20), || {
        std::thread::sleep(Duration::from_millis(200));
        let now = context_switches(pid)?;
        Ok((std::mem::replace(&mut before, now) == now).then_some(()))
    })?;
    std::thread::sleep(Duration::from_secs(10));
    let after = context_switches(pid)?;
    ensure!(
        after == before,
        "{} context switches while idle",
        after - before
    );
    Ok(())
}

/// What a process has.
#[derive(Debug)]
pub struct Holdings {
    /// Open ones.
    pub descriptors: usize,
    /// Running ones.
    pub threads: usize,
    /// Lines of its map.
    pub mappings: usize,
    /// Memory in use.
    pub resident_kib: u64,
}

impl Holdings {
    /// Of a process, now.
    ///
    /// # Errors
    /// The process is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let count = |name: &str| -> Result<usize> { Ok(fs::read_dir(proc.join(name))?.count()) };
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            mappings: fs::read_to_string(proc.join("maps"))?.lines().count(),
            resident_kib: status(pid, "VmRSS:")?,
        })
    }

    /// Of a server whose sessions have ended, which has no more than `threads` threads then.
    ///
    /// # Errors
    /// There are more threads for longer than `limit`.
    pub fn at_rest(pid: u32, threads: usize, limit: Duration) -> Result<Self> {
        // The kernel's workers of a ring are threads, too, and end when they are not needed.
        let what = format!("the server has no more than {threads} threads");
        wait_for(&what, limit, || {
            let holdings = Self::of(pid)?;
            Ok((holdings.threads <= threads).then_some(holdings))
        })
    }

    /// Checks that nothing has grown since `before`, but for what one client more or less explains.
    ///
    /// # Errors
    /// Something has.
    pub fn are_no_more_than(&self, before: &Holdings) -> Result<()> {
        // What grows with each client has grown by far more than this.
        let fits = self.descriptors <= before.descriptors
            && self.mappings <= before.mappings + 20
            && self.resident_kib <= before.resident_kib + 1024;
        ensure!(fits, "something is left: {before:?}, then {self:?}");
        Ok(())
    }
}
