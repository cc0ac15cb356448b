//! One io_uring, used by one thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::enter::Entrance;
use super::restrictions::build_restricted;
use super::{Owner, Token};

/// The ring has as much under way as it can take completions for; try again after the next reap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// One completion.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Who gets it.
    pub token: Token,
    /// The result: what the system call would have returned, errors as negative errno.
    pub result: i32,
    /// `IORING_CQE_F_*`.
    pub flags: u32,
}

/// An io_uring that never loses a completion: it refuses work beyond what its completion queue
/// can hold.
pub struct Ring {
    /// Goes first: it names the ring.
    entrance: Entrance,
    uring: IoUring,
    flavour: &'static str,
    in_flight: usize,
    /// Of these, the ones that each owner has; indexed by [`Owner`].
    in_flight_by_owner: [usize; Owner::COUNT],
    /// Counted for `stat`: `io_uring_enter` calls.
    enters: u64,
    /// Files in the ring's table.
    files: u32,
    /// How many more times the kernel's flag is not believed.
    ignored_flags: u32,
}

/// Files that a ring's table has room for.
const FILES: u32 = 8;

/// For how many looks the kernel's flag is not believed after it stood for nothing.
const IGNORED_FLAGS: u32 = 16;

impl Ring {
    /// A ring for at most `in_flight` operations at once.
    ///
    /// Asks for `SINGLE_ISSUER` and `DEFER_TASKRUN` (Linux 6.1), then `COOP_TASKRUN` (5.19), then
    /// for nothing special, and [restricts](build_restricted) it. Must be called by the thread that will use the ring.
    ///
    /// # Errors
    ///
    /// What `io_uring_setup` answers when even the plain ring cannot be had.
    pub fn new(in_flight: u32) -> io::Result<Self> {
        let submissions = in_flight.min(256);
        let base = || {
            let mut builder = IoUring::builder();
            builder.setup_clamp().setup_cqsize(in_flight.max(2));
            builder
        };
        let deferred = build_restricted(
            base()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag(),
            submissions,
        )
        .map(|uring| (uring, "single-issuer, deferred-taskrun"));
        let (uring, flavour) = deferred
            .or_else(|_| {
                let mut builder = base();
                builder.setup_coop_taskrun().setup_taskrun_flag();
                build_restricted(&mut builder, submissions)
                    .map(|uring| (uring, "cooperative-taskrun"))
            })
            .or_else(|_| {
                build_restricted(&mut base(), submissions).map(|uring| (uring, "plain"))
            })?;
        Ok(Self {
            entrance: Entrance::new(uring.as_raw_fd()),
            uring,
            flavour,
            in_flight: 0,
            in_flight_by_owner: [0; Owner::COUNT],
            enters: 0,
            files: 0,
            ignored_flags: 0,
        })
    }

    /// Queues one operation. Nothing happens before [`Ring::submit_and_wait`], unless the
    /// submission queue is full, in which case what it holds is submitted first.
    ///
    /// # Errors
    ///
    /// [`Full`] when the completion queue could not take the completion.
    ///
    /// # Safety
    ///
    /// What the operation points to must stay valid until its completion was reaped.
    pub unsafe fn push(&mut self, sqe: squeue::Entry, token: Token) -> Result<(), Full> {
        if self.in_flight >= self.uring.params().cq_entries() as usize {
            return Err(Full);
        }
        let sqe = sqe.user_data(token.encode());
        // SAFETY: the caller keeps what the entry points to valid.
        if unsafe { self.uring.submission().push(&sqe) }.is_err() {
            self.enters += 1;
            self.uring.submit().map_err(|_| Full)?;
            // SAFETY: as above.
            unsafe { self.uring.submission().push(&sqe) }.map_err(|_| Full)?;
        }
        self.in_flight += 1;
        self.in_flight_by_owner[token.owner as usize] += 1;
        Ok(())
    }

    /// Asks the kernel to cancel the operation with this token. Both then complete.
    ///
    /// # Errors
    ///
    /// [`Full`] as for [`Ring::push`].
    pub fn cancel(&mut self, token: Token) -> Result<(), Full> {
        let sqe = opcode::AsyncCancel::new(token.encode()).build();
        let nobody = Token {
            owner: Owner::None,
            kind: 0,
            index: 0,
        };
        // SAFETY: a cancellation points to nothing.
        unsafe { self.push(sqe, nobody) }
    }

    /// Submits what was queued and waits until at least `want` completions are there.
    ///
    /// With nothing to submit, nothing to wait for and no completion held back by the kernel this
    /// makes no system call.
    ///
    /// Returns early, without an error, on a signal and when the kernel is short of memory for
    /// now; the caller reaps and calls again.
    ///
    /// # Errors
    ///
    /// What `io_uring_enter` answers beyond that: the ring is broken.
    pub fn submit_and_wait(&mut self, want: usize) -> io::Result<()> {
        let queued = self.uring.submission().len();
        let for_the_flag = queued == 0 && want == 0;
        if for_the_flag && !self.holds_back() {
            return Ok(());
        }
        self.enters += 1;
        // Also when there is nothing to wait for: with DEFER_TASKRUN completions are made only here,
        // and a busy thread must still hear of kicks and mail.
        let result = self.entrance.enter(as_u32(queued), as_u32(want));
        if for_the_flag && self.uring.completion().is_empty() {
            self.ignored_flags = IGNORED_FLAGS;
        }
        ignore_passing(result)
    }

    /// Submits what was queued and makes the kernel make all completions that it holds back, whether it says so
    /// or not. What goes wrong goes wrong again in [`Ring::submit_and_wait`], which tells.
    pub fn make_completions(&mut self) {
        self.enters += 1;
        let queued = self.uring.submission().len();
        let _told_later = self.entrance.enter(as_u32(queued), 0);
    }

    /// Whether the kernel says that it has completions which it makes only when it is entered.
    ///
    /// It sets the flag a moment after it notes what there is to do, and clears it when it does
    /// that. Where the thread comes in between, the flag stays without a reason until there is one
    /// again; whoever believes it every time enters the kernel all the time.
    fn holds_back(&mut self) -> bool {
        let submissions = self.uring.submission();
        if !submissions.taskrun() && !submissions.cq_overflow() {
            self.ignored_flags = 0;
            return false;
        }
        let believed = self.ignored_flags == 0;
        self.ignored_flags = self.ignored_flags.saturating_sub(1);
        believed
    }

    /// As [`Ring::submit_and_wait`], but waits for one completion until `limit` at the longest.
    ///
    /// # Errors
    ///
    /// As for [`Ring::submit_and_wait`].
    pub fn submit_and_wait_for(&mut self, limit: Duration) -> io::Result<()> {
        self.enters += 1;
        let limit = types::Timespec::from(limit);
        let args = types::SubmitArgs::new().timespec(&limit);
        match self.uring.submitter().submit_with_args(1, &args) {
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            other => ignore_passing(other),
        }
    }

    /// Moves completions to `out` until either is exhausted; never grows `out` beyond its capacity.
    pub fn reap(&mut self, out: &mut Vec<Completion>) {
        let room = out.capacity() - out.len();
        for cqe in self.uring.completion().take(room) {
            let token = Token::decode(cqe.user_data());
            if !cqueue::more(cqe.flags()) {
                self.in_flight -= 1;
                self.in_flight_by_owner[token.owner as usize] -= 1;
            }
            out.push(Completion {
                token,
                result: cqe.result(),
                flags: cqe.flags(),
            });
        }
    }

    /// Puts a file into the ring's table, so that no operation has to look it up. Returns its index,
    /// to be used in place of a descriptor with the flag `FIXED_FILE`; none when the kernel refuses,
    /// and the descriptor itself does as well.
    ///
    /// The ring keeps the file open until it ends.
    pub fn register_file(&mut self, file: BorrowedFd<'_>) -> Option<i32> {
        if self.files == 0 {
            self.uring.submitter().register_files_sparse(FILES).ok()?;
        }
        let index = self.files;
        let fds = [file.as_raw_fd()];
        let updated = self.uring.submitter().register_files_update(index, &fds);
        (updated.ok()? == 1).then(|| {
            self.files += 1;
            index.cast_signed()
        })
    }

    /// Whether completions are there, or would be after a call of [`Ring::submit_and_wait`]. Makes no
    /// system call.
    pub fn has_completions(&mut self) -> bool {
        !self.uring.completion().is_empty() || self.holds_back()
    }

    /// Operations queued or under way.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Which kind of ring the kernel gave, for people.
    #[must_use]
    pub fn flavour(&self) -> &'static str {
        self.flavour
    }

    /// `io_uring_enter` calls so far.
    #[must_use]
    pub fn enters(&self) -> u64 {
        self.enters
    }

    /// Cancels everything and reaps until nothing is under way, or until `limit`. Operations of
    /// `abandoned` are submitted but not waited for: the kernel ends them when the ring closes.
    ///
    /// Returns whether that was reached. If not, memory that operations point to must not be freed.
    pub fn drain(&mut self, limit: Duration, abandoned: Option<Owner>) -> bool {
        let deadline = Instant::now() + limit;
        let mut reaped = Vec::with_capacity(64);
        // What was pushed last may be an answer that a client waits for.
        let _ = self.uring.submit();
        while self.awaited(abandoned) > 0 {
            let _ = self.uring.submit();
            // Nothing to cancel is no error here: the loop asks the count, not this call.
            let _ = self
                .uring
                .submitter()
                .register_sync_cancel(Some(types::Timespec::new()), types::CancelBuilder::any());
            if self.submit_and_wait_for(Duration::from_millis(20)).is_err()
                || Instant::now() > deadline
            {
                break;
            }
            reaped.clear();
            self.reap(&mut reaped);
        }
        self.awaited(abandoned) == 0
    }

    fn awaited(&self, abandoned: Option<Owner>) -> usize {
        self.in_flight - abandoned.map_or(0, |owner| self.in_flight_by_owner[owner as usize])
    }

    /// Makes a table of `count` buffers, empty at first.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn register_buffer_table(&self, count: u32) -> io::Result<()> {
        self.uring.submitter().register_buffers_sparse(count)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.files > 0 {
            // The kernel takes a closed ring apart at its leisure; locks on the files shall go now.
            // It fails only if there is nothing to let go of.
            let _ = self.uring.submitter().unregister_files();
        }
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

fn as_u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn ignore_passing(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(index: u32) -> Token {
        Token {
            owner: Owner::Door,
            kind: 0,
            index,
        }
    }

    #[test]
    fn more_than_the_submission_queue_holds_goes_through() {
        let mut ring = Ring::new(1024).unwrap();
        for index in 0..1000 {
            // SAFETY: a NOP points to nothing.
            unsafe { ring.push(opcode::Nop::new().build(), token(index)) }.unwrap();
        }
        let mut out = Vec::with_capacity(64);
        let mut seen = 0;
        while ring.in_flight() > 0 {
            ring.submit_and_wait(1).unwrap();
            out.clear();
            ring.reap(&mut out);
            seen += out.len();
        }
        assert_eq!(seen, 1000);
    }

    #[test]
    fn a_full_ring_says_so_and_takes_more_after_a_reap() {
        let mut ring = Ring::new(4).unwrap();
        let nop = || opcode::Nop::new().build();
        let mut pushed = 0;
        // SAFETY: a NOP points to nothing.
        while unsafe { ring.push(nop(), token(0)) }.is_ok() {
            pushed += 1;
            assert!(pushed < 100, "the ring has no bound");
        }
        ring.submit_and_wait(1).unwrap();
        let mut out = Vec::with_capacity(1);
        ring.reap(&mut out);
        assert_eq!(out.len(), 1);
        // SAFETY: as above.
        assert_eq!(unsafe { ring.push(nop(), token(0)) }, Ok(()));
        assert!(ring.drain(Duration::from_secs(10), None));
    }

    #[test]
    fn draining_ends_operations_that_would_wait_for_ever() {
        let mut ring = Ring::new(8).unwrap();
        let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let mut word = Box::new(0u64);
        let sqe = opcode::Read::new(
            types::Fd(eventfd.as_raw_fd()),
            std::ptr::from_mut(&mut *word).cast(),
            8,
        );
        // SAFETY: `word` lives until the ring is drained.
        unsafe { ring.push(sqe.build(), token(1)) }.unwrap();
        assert!(ring.drain(Duration::from_secs(10), None));
    }

    #[test]
    fn draining_does_not_wait_for_an_owner_that_abandoned_its_operations() {
        let mut ring = Ring::new(8).unwrap();
        // A timeout that ends when the ring does; a cancellation would end it, so nobody asks.
        let long = Box::new(types::Timespec::from(Duration::from_secs(3600)));
        let sqe = opcode::Timeout::new(std::ptr::from_ref(&*long)).build();
        // SAFETY: the kernel copies the time when it takes the entry, before `long` is dropped.
        unsafe { ring.push(sqe, token(1)) }.unwrap();
        assert!(ring.drain(Duration::ZERO, Some(Owner::Door)));
        assert_eq!(ring.in_flight(), 1);
        assert!(!ring.drain(Duration::ZERO, Some(Owner::Storage)));
    }
}
