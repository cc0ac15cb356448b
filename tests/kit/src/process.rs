//! Child processes that never outlive us and waits that always end.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

/// Starts a command that dies with the thread that started it.
///
/// Call this from a thread that lives as long as the child is needed (the main
/// thread of a test is one): the kernel ties the child to that thread.
///
/// # Errors
/// The program cannot be started.
pub fn spawn_bound(command: &mut Command) -> Result<Child> {
    bind(command);
    spawn(command)
}

/// Lets the kernel kill what this command starts when the thread that starts it ends.
pub fn bind(command: &mut Command) {
    // SAFETY: the closure runs in the forked child and makes one system call;
    // it allocates nothing and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
}

/// Lets what this command starts inherit the standard descriptors alone. Some of a test are not closed on exec (the
/// crate vhost receives them without `MSG_CMSG_CLOEXEC`), and other tests run beside it.
pub fn inherit_nothing(command: &mut Command) {
    // SAFETY: as in `bind`. Only flags of the child's own table of descriptors are set.
    unsafe {
        command.pre_exec(|| {
            let (first, last): (libc::c_uint, _) = (3, libc::c_uint::MAX);
            match libc::syscall(
                libc::SYS_close_range,
                first,
                last,
                libc::CLOSE_RANGE_CLOEXEC,
            ) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
}

/// Starts a command.
///
/// # Errors
/// The program cannot be started.
pub fn spawn(command: &mut Command) -> Result<Child> {
    command.spawn().with_context(|| {
        format!(
            "cannot start {}; is it installed?",
            command.get_program().to_string_lossy()
        )
    })
}

/// Like [`spawn_bound`], in a process group of its own, which
/// [`kill_group`] can end as a whole.
///
/// # Errors
/// The program cannot be started.
pub fn spawn_group(command: &mut Command) -> Result<Child> {
    command.process_group(0);
    spawn_bound(command)
}

/// Waits until the child ends or the limit passes; `None` says that it still runs.
///
/// # Errors
/// The child cannot be waited for.
pub fn wait_limited(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())
        .context("cannot watch a child process")?;
    loop {
        if let Some(status) = child
            .try_wait()
            .context("cannot wait for a child process")?
        {
            return Ok(Some(status));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        // The result is not needed: the next round looks at the child itself.
        let _interrupted = poll(
            &mut [PollFd::new(&pidfd.as_fd(), PollFlags::IN)],
            Some(&timespec(left.min(Duration::from_secs(1)))),
        );
    }
}

/// Kills the child's whole process group (see [`spawn_group`]) and collects the child.
pub fn kill_group(child: &mut Child) {
    // An error means that the group is gone already, which is what we want.
    let _gone = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _gone = child.kill();
    // A killed child normally ends at once; one stuck in the kernel is left to
    // the end of its machine rather than waited for.
    let _stuck = wait_limited(child, Duration::from_secs(5));
}

/// Sends one signal to the child.
///
/// # Errors
/// The child is gone.
pub fn signal(child: &Child, signal: Signal) -> Result<()> {
    kill_process(Pid::from_child(child), signal)
        .with_context(|| format!("cannot signal process {}", child.id()))
}

/// A duration as the kernel writes it.
#[must_use]
pub fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_does_not_end_is_reported_and_its_group_killed() {
        let mut child = spawn_group(Command::new("sh").args(["-c", "sleep 100 & wait"]))
            .expect("sh exists everywhere");
        let waited = wait_limited(&mut child, Duration::from_millis(50)).expect("waiting works");
        assert!(waited.is_none());
        let group = Pid::from_child(&child);
        kill_group(&mut child);
        // Nobody is left in the group once init has collected the sleeper.
        let gone = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            rustix::process::test_kill_process_group(group).is_err()
        });
        assert!(gone);
    }

    #[test]
    fn an_exit_status_is_seen_within_the_limit() {
        let mut child =
            spawn_bound(Command::new("sh").args(["-c", "exit 7"])).expect("sh exists everywhere");
        let status = wait_limited(&mut child, Duration::from_secs(20)).expect("waiting works");
        assert_eq!(status.and_then(|s| s.code()), Some(7));
    }
}
