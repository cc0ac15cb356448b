//! One request from start to end.
//!
//! A request has one operation on the ring at a time. Between two of them its [`Step`] says which is
//! next. The position and the buffers of the request advance with the transfer, so that what is left
//! of the request is what is left to do.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use io_uring::{opcode, types};

use super::bounce::scatter;
use super::operations::{
    MAX_BUFFERS, Operations, RELEASE_BYTES, Step, ZERO_RANGE_BYTES, range_bytes,
};
use super::shared::{Alignment, Lacks, Shared};
use crate::engine::StorageQueue;
use crate::io::{Full, Owner, Ring, Slot, Token};
use crate::request::{IoError, Op, Progress, Request};

/// Kind of the tokens of operations of a step, and of the pause before a step is tried again.
const STEP: u16 = 0;
const PAUSE: u16 = 1;

/// How often a step is tried again after `EAGAIN` or `EINTR`, each time after twice as long: about a
/// second in all.
const MAX_RETRIES: u8 = 9;
const FIRST_PAUSE: Duration = Duration::from_millis(2);

/// Where the request in a slot stands.
#[derive(Clone, Copy, Debug, Default)]
struct SlotState {
    step: Step,
    /// How often the step was tried again.
    retries: u8,
    /// The length of the pause, where the kernel reads it.
    pause: types::Timespec,
}

/// One thread's access to a disk in a file.
#[derive(Debug)]
pub struct FileQueue {
    shared: Arc<Shared>,
    operations: Operations,
    slots: Box<[SlotState]>,
    /// Ranges that are zeroed or released in pieces end with the piece under way.
    abandoned: bool,
}

impl FileQueue {
    pub(super) fn new(shared: Arc<Shared>, ring: &mut Ring, slots: u32) -> io::Result<Self> {
        Ok(Self {
            operations: Operations::new(&shared.file, ring),
            shared,
            slots: vec![SlotState::default(); slots as usize].into(),
            abandoned: false,
        })
    }

    fn lacks(&self, what: impl Fn(&Lacks) -> &AtomicBool) -> bool {
        what(&self.shared.lacks).load(Ordering::Relaxed)
    }

    /// The first step of a request.
    fn first_step(&mut self, request: &Request) -> Result<Option<Step>, IoError> {
        Ok(Some(match request.op() {
            Op::Read | Op::Write { .. } => {
                // The block layer aligns what lies in the ring's table.
                let aligned = request.buffers().ring().is_some()
                    || (self.shared.alignment)
                        .is_none_or(|alignment| is_aligned(request, alignment));
                let fua = request.op() == Op::Write { fua: true };
                let forced = fua && !self.lacks(|l| &l.forced_writes);
                if aligned {
                    Step::Transfer { forced }
                } else {
                    match self.operations.bounce.take() {
                        Ok(Some(number)) => Step::Bounce { number, forced },
                        Ok(None) => return Ok(None),
                        Err(_) => return Err(IoError::Io),
                    }
                }
            }
            Op::Flush if self.shared.has_lost_writes.load(Ordering::Relaxed) => {
                return Err(IoError::Io);
            }
            Op::Flush => Step::Sync,
            Op::Discard if self.shared.is_device && !self.lacks(|l| &l.discard_command) => {
                Step::DiscardCommand
            }
            Op::Discard | Op::WriteZeroes { unmap: true, .. } if !self.lacks(|l| &l.punch_hole) => {
                Step::PunchHole
            }
            // A discard is advisory.
            Op::Discard => return Err(IoError::Unsupported),
            Op::WriteZeroes { .. } if !self.lacks(|l| &l.zero_range) => Step::ZeroRange,
            Op::WriteZeroes { .. } => Step::WriteZeroes,
        }))
    }

    /// Puts the operation of the slot's step on the ring, or the pause before it.
    fn submit(&mut self, ring: &mut Ring, slot: Slot, request: &Request, kind: u16) -> Progress {
        let state = &self.slots[slot as usize];
        let sqe = if kind == PAUSE {
            opcode::Timeout::new(&raw const state.pause).build()
        } else if let Ok(sqe) = self.operations.entry(state.step, request) {
            sqe
        } else {
            return self.end(slot, Err(IoError::Io));
        };
        let token = Token {
            owner: Owner::Storage,
            kind,
            index: slot,
        };
        // SAFETY: what the operation points to is the request's buffers and their list, valid until
        // the request is finished (`Buffers::from_list`), or a bounce buffer, the zeroes or the slot's pause,
        // which this queue keeps until the thread has drained its ring. The pause is not changed before its
        // completion.
        match unsafe { ring.push(sqe, token) } {
            Ok(()) => Progress::Pending,
            Err(Full) => Progress::Full,
        }
    }

    /// Tries the slot's step again after a pause, a limited number of times.
    fn retry(&mut self, ring: &mut Ring, slot: Slot, request: &Request) -> Progress {
        let state = &mut self.slots[slot as usize];
        if state.retries == MAX_RETRIES {
            let error = self.failed(request, libc::EAGAIN);
            return self.end(slot, Err(error));
        }
        state.pause = (FIRST_PAUSE * (1 << state.retries)).into();
        state.retries += 1;
        self.submit(ring, slot, request, PAUSE)
    }

    /// The step after `step` was done with `result`. `Ok(None)`: the request is done.
    fn next_step(
        &mut self,
        step: Step,
        request: &mut Request,
        result: i32,
    ) -> Result<Option<Step>, IoError> {
        if let Some(errno) = result.checked_neg().filter(|errno| *errno > 0) {
            return self.after_error(step, request, errno).map(Some);
        }
        let moved = u64::try_from(result).unwrap_or(0);
        match step {
            Step::Begin => unreachable!("a completion for a request that was not begun"),
            Step::Transfer { .. } | Step::Bounce { .. } => {
                self.after_transfer(step, request, moved)
            }
            Step::ReadZeroes if moved == 0 => Err(IoError::Io),
            Step::ReadZeroes => {
                request.advance(moved);
                Ok((request.remaining_bytes() > 0).then_some(step))
            }
            Step::WriteZeroes => {
                let resumable = self.resumable(moved, request);
                if resumable == 0 {
                    return Err(IoError::Io);
                }
                self.after_piece(step, request, resumable)
            }
            Step::PunchHole | Step::DiscardCommand => {
                let piece_bytes = range_bytes(RELEASE_BYTES, request);
                self.after_piece(step, request, piece_bytes)
            }
            Step::ZeroRange => {
                let piece_bytes = range_bytes(ZERO_RANGE_BYTES, request);
                self.after_piece(step, request, piece_bytes)
            }
            // The kernel reports a failed write-back to one of the flushes in flight only.
            Step::Sync if self.shared.has_lost_writes.load(Ordering::Relaxed) => Err(IoError::Io),
            Step::Sync => Ok(None),
        }
    }

    /// The step after `step` has zeroed or released `piece_bytes` of a range.
    fn after_piece(
        &self,
        step: Step,
        request: &mut Request,
        piece_bytes: u64,
    ) -> Result<Option<Step>, IoError> {
        request.advance(piece_bytes);
        match (request.remaining_bytes(), request.op()) {
            (0, Op::WriteZeroes { fua: true, .. }) => Ok(Some(Step::Sync)),
            (0, _) => Ok(None),
            _ if self.abandoned => Err(IoError::Io),
            _ => Ok(Some(step)),
        }
    }

    fn after_transfer(
        &mut self,
        step: Step,
        request: &mut Request,
        moved: u64,
    ) -> Result<Option<Step>, IoError> {
        let resumable = self.resumable(moved, request);
        let reading = request.op() == Op::Read;
        if let Step::Bounce { number, .. } = step
            && reading
        {
            let memory = self.operations.bounce.memory(number);
            let read = memory.subslice(0, usize::try_from(moved).unwrap_or(0));
            // A read of a piece is no longer than the bounce buffer.
            scatter(read.map_err(|_| IoError::Io)?, request.buffers());
        }
        let at_end = reading && (moved == 0 || self.is_cut_by_end(request, moved));
        // A block cut in two by the end was read as far as it goes; any other is moved again whole.
        let advance = if at_end { moved } else { resumable };
        request.advance(advance);
        if request.remaining_bytes() == 0 {
            let owed = request.op() == Op::Write { fua: true } && !step.is_forced();
            return Ok(owed.then_some(Step::Sync));
        }
        if at_end {
            // The file was truncated meanwhile: the rest reads as zeroes.
            if request.buffers().ring().is_some() {
                return Ok(Some(Step::ReadZeroes));
            }
            request.zero_fill();
            return Ok(None);
        }
        if advance == 0 {
            return Err(IoError::Io);
        }
        Ok(Some(step))
    }

    /// The part of a transfer of `moved` bytes after which the next one may begin: around the page
    /// cache, where position and memory lie as `O_DIRECT` wants them.
    fn resumable(&self, moved: u64, request: &Request) -> u64 {
        match self.shared.alignment {
            Some(alignment) if moved != request.remaining_bytes() => {
                moved - moved % alignment.block_bytes.max(alignment.memory_bytes) as u64
            }
            _ => moved,
        }
    }

    /// Whether the end of the file cut a block in two, and the `moved` bytes that were just read
    /// are all there is. Around the page cache nothing else should cut a block. The metadata of a
    /// device have no length; it ends at a whole block.
    fn is_cut_by_end(&self, request: &Request, moved: u64) -> bool {
        let end = request.position_bytes() + moved;
        let cuts = |alignment: Alignment| !moved.is_multiple_of(alignment.block_bytes as u64);
        self.shared.alignment.is_some_and(cuts)
            && !self.shared.is_device
            && (self.shared.file.metadata()).is_ok_and(|file| file.len() <= end)
    }

    /// The step that replaces one which the storage does not support.
    fn after_error(&self, step: Step, request: &Request, errno: i32) -> Result<Step, IoError> {
        let lacks = &self.shared.lacks;
        // The storage never supports it, or (EINVAL) not for this range.
        let never = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV);
        let unsupported = never || errno == libc::EINVAL;
        match (step, request.op()) {
            // The step decides: another write may have found it out while this one was in flight.
            (step, _) if errno == libc::EOPNOTSUPP && step.is_forced() => {
                lacks.forced_writes.store(true, Ordering::Relaxed);
                Ok(step.not_forced())
            }
            (Step::DiscardCommand, _) if unsupported => {
                lacks.discard_command.fetch_or(never, Ordering::Relaxed);
                Ok(Step::PunchHole)
            }
            (Step::PunchHole, op) if unsupported => {
                lacks.punch_hole.fetch_or(never, Ordering::Relaxed);
                match op {
                    Op::Discard => Err(IoError::Unsupported),
                    _ => Ok(Step::ZeroRange),
                }
            }
            (Step::ZeroRange, _) if unsupported => {
                lacks.zero_range.fetch_or(never, Ordering::Relaxed);
                Ok(Step::WriteZeroes)
            }
            _ => {
                // A forced write that finds no room has not been cached, so nothing of it is lost.
                let no_room = matches!(errno, libc::ENOSPC | libc::EDQUOT);
                if step == Step::Sync || step.is_forced() && !no_room {
                    self.shared.flush_failed(errno);
                }
                Err(self.failed(request, errno))
            }
        }
    }

    /// The answer to a request that the storage failed.
    #[cold]
    fn failed(&self, request: &Request, errno: i32) -> IoError {
        let shared = &self.shared;
        let failures = &shared.failures;
        failures.note(&shared.export, shared.path.display(), request, errno);
        IoError::from_errno(errno)
    }

    /// A transfer from or to memory, done at once: `io_uring` would hand each to a worker of the
    /// kernel, because such file systems cannot promise not to wait for the swap device.
    fn transfer_now(&self, request: &mut Request) -> Progress {
        let fd = self.shared.file.as_raw_fd();
        while request.remaining_bytes() > 0 {
            let list = request.buffers().list();
            let count = list.len().min(MAX_BUFFERS).cast_signed();
            // Positions were checked against the size of a file.
            let position = request.position_bytes().cast_signed();
            // One buffer is what most requests have, and the shorter way.
            let moved = match (request.op(), list, i32::try_from(count).unwrap_or(1)) {
                // SAFETY: the buffers and their list are valid until the request is finished
                // (`Buffers::from_list`).
                (Op::Read, [one], _) => unsafe {
                    libc::pread(fd, one.iov_base, one.iov_len, position)
                },
                // SAFETY: as above.
                (Op::Read, list, count) => unsafe {
                    libc::preadv(fd, list.as_ptr(), count, position)
                },
                // SAFETY: as above.
                (_, [one], _) => unsafe { libc::pwrite(fd, one.iov_base, one.iov_len, position) },
                // SAFETY: as above.
                (_, list, count) => unsafe { libc::pwritev(fd, list.as_ptr(), count, position) },
            };
            match u64::try_from(moved) {
                Ok(0) if request.op() == Op::Read => {
                    // The file was truncated meanwhile: the rest reads as zeroes.
                    request.zero_fill();
                    break;
                }
                Ok(0) => return Progress::Done(Err(IoError::Io)),
                Ok(moved) => request.advance(moved),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        let errno = error.raw_os_error().unwrap_or(libc::EIO);
                        return Progress::Done(Err(self.failed(request, errno)));
                    }
                }
            }
        }
        Progress::Done(Ok(()))
    }

    fn end(&mut self, slot: Slot, outcome: Result<(), IoError>) -> Progress {
        if let Step::Bounce { number, .. } = std::mem::take(&mut self.slots[slot as usize]).step {
            self.operations.bounce.give_back(number);
        }
        Progress::Done(outcome)
    }
}

impl StorageQueue for FileQueue {
    fn start(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        if request.op() != Op::Flush && request.len_bytes() == 0 {
            // fallocate(2) answers EINVAL to it, which must not look like "cannot punch holes".
            return Progress::Done(Ok(()));
        }
        if self.shared.is_in_memory && matches!(request.op(), Op::Read | Op::Write { fua: false }) {
            return self.transfer_now(request);
        }
        if self.slots[slot as usize].step == Step::Begin {
            match self.first_step(request) {
                Ok(Some(step)) => self.slots[slot as usize].step = step,
                Ok(None) => return Progress::Full,
                // A discard is advisory; any other operation that is not supported is an error.
                Err(IoError::Unsupported) if request.op() == Op::Discard => {
                    return Progress::Done(Ok(()));
                }
                Err(error) => return Progress::Done(Err(error)),
            }
        }
        self.submit(ring, slot, request, STEP)
    }

    fn advance(
        &mut self,
        ring: &mut Ring,
        slot: Slot,
        request: &mut Request,
        kind: u16,
        result: i32,
    ) -> Progress {
        if kind == PAUSE {
            return self.submit(ring, slot, request, STEP);
        }
        if [-libc::EAGAIN, -libc::EINTR].contains(&result) {
            return self.retry(ring, slot, request);
        }
        let step = self.slots[slot as usize].step;
        match self.next_step(step, request, result) {
            Ok(Some(next)) => {
                if let Step::Bounce { number, .. } = step
                    && !matches!(next, Step::Bounce { .. })
                {
                    self.operations.bounce.give_back(number);
                }
                let state = &mut self.slots[slot as usize];
                (state.step, state.retries) = (next, 0);
                self.submit(ring, slot, request, STEP)
            }
            Ok(None) => self.end(slot, Ok(())),
            Err(IoError::Unsupported) if request.op() == Op::Discard => self.end(slot, Ok(())),
            Err(error) => self.end(slot, Err(error)),
        }
    }

    fn abandon(&mut self) {
        self.abandoned = true;
    }
}

/// Whether the buffers lie as `O_DIRECT` wants it.
fn is_aligned(request: &Request, alignment: Alignment) -> bool {
    request.buffers().list().iter().all(|buffer| {
        (buffer.iov_base as usize).is_multiple_of(alignment.memory_bytes)
            && buffer.iov_len.is_multiple_of(alignment.block_bytes)
    })
}

#[cfg(test)]
#[path = "queue_bench.rs"]
mod bench;

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "in_memory_tests.rs"]
mod in_memory_tests;
