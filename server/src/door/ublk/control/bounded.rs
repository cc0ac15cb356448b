//! One operation at a time on a ring, with a time limit.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_uring::{IoUring, squeue, types};

use crate::io::build_restricted;

/// How often the cancellation of a command is polled.
const GIVE_UP_INTERVAL: Duration = Duration::from_millis(20);

/// The ring of the last operation, when nothing is under way on it: a device can be stopped and removed when no more rings
/// can be made, for want of descriptors or by `kernel.io_uring_disabled`.
static SPARE: Mutex<Option<IoUring<squeue::Entry128>>> = Mutex::new(None);

/// When an operation was answered last that had to be [waited](QUEUED) for. The driver does one after the other, more or less: a
/// thousand devices that are removed at once take more than the limit of one.
static LAST_ANSWER: Mutex<Option<Instant>> = Mutex::new(None);

/// What is answered sooner has not waited for others: questions, which say nothing about the rest.
const QUEUED: Duration = Duration::from_millis(5);

/// How many limits an operation may take while others are answered.
const PATIENCE: u32 = 20;

/// How an operation with a time limit ended.
#[derive(Debug)]
pub(super) enum End {
    /// It completed.
    Result(i32),
    /// It was never begun.
    NoRing(io::Error),
    /// It may be under way still: the ring broke.
    Lost(io::Error),
    /// It is under way still: the caller cancelled the wait.
    Cancelled,
    /// It is under way still: the time is over.
    NoAnswer,
}

fn spare_slot() -> MutexGuard<'static, Option<IoUring<squeue::Entry128>>> {
    // A ring or none: both are whole after any panic.
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn last_answer() -> MutexGuard<'static, Option<Instant>> {
    // A time is whole after any panic.
    LAST_ANSWER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one operation until neither it nor another one was answered for `limit`, and [`PATIENCE`] times that at most, on a ring that no other operation uses meanwhile, or ever if this one does not
/// complete.
///
/// # Safety
///
/// What the operation points to must stay valid until it completed: for ever, unless this returns
/// [`End::Result`] or [`End::NoRing`].
pub(super) unsafe fn run_bounded(
    sqe: &squeue::Entry128,
    limit: Duration,
    cancel: Option<&dyn Fn() -> bool>,
) -> End {
    let spare = spare_slot().take();
    let made = spare.map_or_else(|| build_restricted(&mut IoUring::builder(), 2), Ok);
    let mut ring = match made {
        Ok(ring) => ring,
        Err(error) => return End::NoRing(error),
    };
    let begun = Instant::now();
    // SAFETY: as for this function.
    let end = unsafe { run_on(&mut ring, sqe, limit, cancel) };
    if let End::Result(_) = end {
        if begun.elapsed() >= QUEUED {
            *last_answer() = Some(Instant::now());
        }
        *spare_slot() = Some(ring);
    }
    end
}

/// [`run_bounded`] on a ring that is empty, and is again after [`End::Result`].
///
/// # Safety
///
/// As for `run_bounded`.
unsafe fn run_on(
    ring: &mut IoUring<squeue::Entry128>,
    sqe: &squeue::Entry128,
    limit: Duration,
    cancel: Option<&dyn Fn() -> bool>,
) -> End {
    // SAFETY: the caller keeps what the entry points to valid.
    if unsafe { ring.submission().push(sqe) }.is_err() {
        unreachable!("an empty ring has room for one entry");
    }
    let begun = Instant::now();
    loop {
        let last = last_answer().map_or(begun, |answered| answered.max(begun));
        let deadline = (last + limit).min(begun + PATIENCE * limit);
        let mut left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return End::NoAnswer;
        }
        if let Some(cancel) = cancel {
            if cancel() {
                return End::Cancelled;
            }
            left = left.min(GIVE_UP_INTERVAL);
        }
        let left = types::Timespec::from(left);
        let args = types::SubmitArgs::new().timespec(&left);
        let waited = ring.submitter().submit_with_args(1, &args);
        if let Some(completion) = ring.completion().next() {
            return End::Result(completion.result());
        }
        match waited.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR), _)) => {}
            Err((_, error)) => return End::Lost(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::fd::AsRawFd;

    use io_uring::opcode;

    use super::*;

    /// A read that never completes.
    fn endless_read() -> (squeue::Entry128, rustix::fd::OwnedFd) {
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        let eventfd = rustix::event::eventfd(0, flags).unwrap();
        let word = Box::leak(Box::new(0u64));
        let fd = types::Fd(eventfd.as_raw_fd());
        let sqe = opcode::Read::new(fd, std::ptr::from_mut(word).cast(), 8).build();
        (sqe.into(), eventfd)
    }

    #[test]
    fn a_command_that_never_answers_ends_at_its_time_limit() {
        let (sqe, _eventfd) = endless_read();
        let begin = Instant::now();
        // SAFETY: the read points to leaked memory.
        let end = unsafe { run_bounded(&sqe, Duration::from_millis(50), None) };
        assert!(matches!(end, End::NoAnswer), "{end:?}");
        assert!(begin.elapsed() >= Duration::from_millis(50));
        assert!(begin.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_command_is_waited_for_while_others_are_answered_but_not_for_ever() {
        const LIMIT: Duration = Duration::from_millis(50);
        let (sqe, _eventfd) = endless_read();
        let waits = std::thread::spawn(move || {
            let begin = Instant::now();
            // SAFETY: the read points to leaked memory.
            let end = unsafe { run_bounded(&sqe, LIMIT, None) };
            assert!(matches!(end, End::NoAnswer), "{end:?}");
            begin.elapsed()
        });
        let time = types::Timespec::from(2 * QUEUED);
        let slow = opcode::Timeout::new(&raw const time).build().into();
        while !waits.is_finished() {
            // SAFETY: the time lives on.
            let end = unsafe { run_bounded(&slow, Duration::from_secs(60), None) };
            assert!(matches!(end, End::Result(_)), "{end:?}");
        }
        let waited = waits.join().unwrap();
        assert!(waited >= 2 * LIMIT, "{waited:?}");
    }

    #[test]
    fn a_command_can_be_given_up_before_its_time_limit() {
        let (sqe, _eventfd) = endless_read();
        let asked = Cell::new(0);
        let cancel = || {
            asked.set(asked.get() + 1);
            asked.get() > 2
        };
        // SAFETY: the read points to leaked memory.
        let end = unsafe { run_bounded(&sqe, Duration::from_secs(60), Some(&cancel)) };
        assert!(matches!(end, End::Cancelled), "{end:?}");
    }

    #[test]
    fn the_result_of_a_command_comes_back() {
        let sqe = opcode::Fsync::new(types::Fd(-1)).build().into();
        // SAFETY: a flush of an invalid descriptor points to nothing.
        let end = unsafe { run_bounded(&sqe, Duration::from_secs(10), None) };
        let End::Result(result) = end else {
            panic!("{end:?}");
        };
        assert_eq!(result, -libc::EBADF);
    }
}
