//! One request from start to end.
//!
//! Each request has one operation on the ring at a time. Between two of them its [`Step`] says what
//! comes next, and what is left to do is what is left of the request: its position and its buffers
//! move forward as the transfer does.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::{opcode, squeue, types};

use super::bounce::{BOUNCE_BYTES, Pool, gather, scatter};
use super::shared::{Alignment, Lacks, Shared};
use crate::engine::StorageQueue;
use crate::io::{AnonymousMemory, Owner, Ring, Slot, Token};
use crate::request::{Buffer, IoError, Op, Progress, Request};

/// `RWF_DSYNC`: this write is durable when it completes.
const RWF_DSYNC: i32 = 0x2;

/// `BLOCK_URING_CMD_DISCARD`, `_IO(0x12, 0)` (`include/uapi/linux/blkdev.h`).
const DISCARD_COMMAND: u32 = 0x12 << 8;

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Zeroes written at once where the storage has no operation for it.
const ZERO_BYTES: usize = 1 << 20;

/// Buffers that one system call takes (`UIO_MAXIOV`); the rest goes as after a short transfer.
const MAX_BUFFERS: usize = 1024;

/// What a request does next, or is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Step {
    /// Nothing yet.
    #[default]
    Begin,
    /// Data between the client's buffers and the file; `forced`: with `RWF_DSYNC`.
    Transfer { forced: bool },
    /// What lies behind the end of the file, into a buffer of the ring.
    ReadZeroes,
    /// Data by way of this bounce buffer.
    Bounce { number: usize, forced: bool },
    /// `BLOCK_URING_CMD_DISCARD`.
    DiscardCommand,
    /// `FALLOC_FL_PUNCH_HOLE`; what comes if the storage cannot depends on the operation.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`.
    ZeroRange,
    /// Zeroes, written.
    WriteZeroes,
    /// `fdatasync`, the last step of whatever must be durable.
    Sync,
}

impl Step {
    /// Whether it is a write that goes out with `RWF_DSYNC`.
    fn is_forced(self) -> bool {
        matches!(
            self,
            Self::Transfer { forced: true } | Self::Bounce { forced: true, .. }
        )
    }

    /// The same without `RWF_DSYNC`.
    fn not_forced(mut self) -> Self {
        if let Self::Transfer { forced } | Self::Bounce { forced, .. } = &mut self {
            *forced = false;
        }
        self
    }
}

/// One thread's access to a disk in a file.
#[derive(Debug)]
pub struct FileQueue {
    shared: Arc<Shared>,
    /// The file in the ring's table, or the descriptor itself; the flags of an operation tell which.
    fd: types::Fd,
    fd_flags: squeue::Flags,
    steps: Box<[Step]>,
    bounce: Pool,
    /// Never written to; mapped when first needed.
    zeroes: Option<AnonymousMemory>,
    /// `/dev/zero`, opened when first needed.
    zero_device: Option<fs::File>,
}

impl FileQueue {
    pub(super) fn new(shared: Arc<Shared>, ring: &mut Ring, slots: u32) -> io::Result<Self> {
        let (fd, fd_flags) = match ring.register_file(shared.file.as_fd()) {
            Some(index) => (index, squeue::Flags::FIXED_FILE),
            None => (shared.file.as_raw_fd(), squeue::Flags::empty()),
        };
        Ok(Self {
            shared,
            fd: types::Fd(fd),
            fd_flags,
            steps: vec![Step::default(); slots as usize].into(),
            bounce: Pool::new(),
            zeroes: None,
            zero_device: None,
        })
    }

    fn lacks(&self, what: impl Fn(&Lacks) -> &AtomicBool) -> bool {
        what(&self.shared.lacks).load(Ordering::Relaxed)
    }

    /// The first step of a request.
    fn first_step(&mut self, request: &Request) -> Result<Option<Step>, IoError> {
        Ok(Some(match request.op {
            Op::Read | Op::Write { .. } => {
                // The block layer aligns what lies in the ring's table.
                let aligned = request.buffers.ring().is_some()
                    || (self.shared.alignment)
                        .is_none_or(|alignment| is_aligned(request, alignment));
                let fua = request.op == Op::Write { fua: true };
                let forced = fua && !self.lacks(|l| &l.forced_writes);
                if aligned {
                    Step::Transfer { forced }
                } else {
                    match self.bounce.take() {
                        Ok(Some(number)) => Step::Bounce { number, forced },
                        Ok(None) => return Ok(None),
                        Err(_) => return Err(IoError::Io),
                    }
                }
            }
            Op::Flush => Step::Sync,
            Op::Discard if self.shared.is_device && !self.lacks(|l| &l.discard_command) => {
                Step::DiscardCommand
            }
            Op::Discard | Op::WriteZeroes { unmap: true, .. } if !self.lacks(|l| &l.punch_hole) => {
                Step::PunchHole
            }
            // A discard is a wish that nobody has to grant.
            Op::Discard => return Err(IoError::Unsupported),
            Op::WriteZeroes { .. } if !self.lacks(|l| &l.zero_range) => Step::ZeroRange,
            Op::WriteZeroes { .. } => Step::WriteZeroes,
        }))
    }

    /// Puts the operation of the slot's step on the ring.
    fn submit(&mut self, ring: &mut Ring, slot: Slot, request: &Request) -> Progress {
        let step = self.steps[slot as usize];
        let Ok(sqe) = self.operation(ring, step, request) else {
            return self.end(slot, Err(IoError::Io));
        };
        let token = Token {
            owner: Owner::Storage,
            kind: 0,
            index: slot,
        };
        let flags = match step {
            Step::ReadZeroes => squeue::Flags::empty(),
            _ => self.fd_flags,
        };
        // SAFETY: what the operation points to is the request's buffers and their list, valid until
        // the request is finished (`Buffers::from_list`), or a bounce buffer or the zeroes, which
        // this queue keeps until the thread has drained its ring.
        match unsafe { ring.push(sqe.flags(flags), token) } {
            Ok(()) => Progress::Pending,
            Err(crate::io::Full) => Progress::Full,
        }
    }

    fn operation(
        &mut self,
        ring: &mut Ring,
        step: Step,
        request: &Request,
    ) -> io::Result<squeue::Entry> {
        let fd = self.fd;
        let (offset, len) = (request.position_bytes(), request.remaining_bytes());
        let write_flags = if step.is_forced() { RWF_DSYNC } else { 0 };
        Ok(match step {
            Step::Begin => unreachable!("a request without a step"),
            Step::Transfer { .. } if request.buffers.ring().is_some() => {
                let (at, len, index) = in_ring(request);
                if request.op == Op::Read {
                    opcode::ReadFixed::new(fd, at.cast_mut(), len, index)
                        .offset(offset)
                        .build()
                } else {
                    opcode::WriteFixed::new(fd, at, len, index)
                        .offset(offset)
                        .rw_flags(write_flags)
                        .build()
                }
            }
            Step::ReadZeroes => {
                let zeroes = match &self.zero_device {
                    Some(device) => device,
                    None => self.zero_device.insert(fs::File::open("/dev/zero")?),
                };
                let fd = types::Fd(zeroes.as_raw_fd());
                let (at, len, index) = in_ring(request);
                opcode::ReadFixed::new(fd, at.cast_mut(), len, index).build()
            }
            Step::Transfer { .. } => match (request.op, request.buffers.list()) {
                (op, [one]) => {
                    let (at, len) = (one.iov_base.cast::<u8>(), clamp(one.iov_len));
                    let pinned = ring.pinned(at.addr(), one.iov_len);
                    match (op, pinned) {
                        (Op::Read, None) => opcode::Read::new(fd, at, len).offset(offset).build(),
                        (Op::Read, Some(index)) => opcode::ReadFixed::new(fd, at, len, index)
                            .offset(offset)
                            .build(),
                        (_, None) => opcode::Write::new(fd, at, len)
                            .offset(offset)
                            .rw_flags(write_flags)
                            .build(),
                        (_, Some(index)) => opcode::WriteFixed::new(fd, at, len, index)
                            .offset(offset)
                            .rw_flags(write_flags)
                            .build(),
                    }
                }
                (Op::Read, list) => opcode::Readv::new(fd, list.as_ptr(), buffer_count(list))
                    .offset(offset)
                    .build(),
                (_, list) => opcode::Writev::new(fd, list.as_ptr(), buffer_count(list))
                    .offset(offset)
                    .rw_flags(write_flags)
                    .build(),
            },
            Step::Bounce { number, .. } => {
                let memory = self.bounce.memory(number);
                let piece = piece_bytes(len, BOUNCE_BYTES);
                if request.op == Op::Read {
                    opcode::Read::new(fd, memory, clamp(piece))
                        .offset(offset)
                        .build()
                } else {
                    // SAFETY: the request's buffers are mapped and hold `len` bytes at least; the
                    // bounce buffer has room for a piece and is lent to this request.
                    unsafe { gather(request.buffers.list(), memory, piece) };
                    opcode::Write::new(fd, memory, clamp(piece))
                        .offset(offset)
                        .rw_flags(write_flags)
                        .build()
                }
            }
            Step::DiscardCommand => {
                // The kernel takes the length from where `addr3` is, the first half of the command.
                let mut command = [0; 16];
                command[..8].copy_from_slice(&len.to_ne_bytes());
                opcode::UringCmd16::new(fd, DISCARD_COMMAND)
                    .addr(Some(offset))
                    .cmd(command)
                    .build()
            }
            Step::PunchHole => opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(PUNCH_HOLE)
                .build(),
            Step::ZeroRange => opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(ZERO_RANGE)
                .build(),
            Step::WriteZeroes => {
                let zeroes = match &self.zeroes {
                    Some(zeroes) => zeroes,
                    None => self.zeroes.insert(AnonymousMemory::new(ZERO_BYTES)?),
                };
                let piece = piece_bytes(len, ZERO_BYTES);
                opcode::Write::new(fd, zeroes.as_ptr(), clamp(piece))
                    .offset(offset)
                    .build()
            }
            Step::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        })
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
                request.advance(resumable);
                Ok(if request.remaining_bytes() > 0 {
                    Some(Step::WriteZeroes)
                } else {
                    after_zeroing(request)
                })
            }
            Step::PunchHole | Step::ZeroRange => Ok(after_zeroing(request)),
            Step::DiscardCommand | Step::Sync => Ok(None),
        }
    }

    fn after_transfer(
        &mut self,
        step: Step,
        request: &mut Request,
        moved: u64,
    ) -> Result<Option<Step>, IoError> {
        let resumable = self.resumable(moved, request);
        let reading = request.op == Op::Read;
        if let Step::Bounce { number, .. } = step
            && reading
        {
            let len = usize::try_from(moved).unwrap_or(0);
            // SAFETY: the kernel put `len` bytes into the bounce buffer, a piece at most; the
            // request's buffers are mapped and as long as what is left of it.
            unsafe { scatter(self.bounce.memory(number), request.buffers.list(), len) };
        }
        let at_end = reading && (moved == 0 || self.is_cut_by_end(request, moved));
        // A block cut in two by the end was read as far as it goes; any other is moved again whole.
        let advance = if at_end { moved } else { resumable };
        request.advance(advance);
        if request.remaining_bytes() == 0 {
            let owed = request.op == Op::Write { fua: true } && !step.is_forced();
            return Ok(owed.then_some(Step::Sync));
        }
        if at_end {
            // Somebody made the file shorter: what is not there reads as zeroes.
            if request.buffers.ring().is_some() {
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

    /// Another way to the same end, where the storage does not know the one that was tried.
    fn after_error(&self, step: Step, request: &Request, errno: i32) -> Result<Step, IoError> {
        let lacks = &self.shared.lacks;
        let unknown = matches!(
            errno,
            libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENODEV
        );
        match (step, request.op) {
            (step, _) if matches!(errno, libc::EINTR | libc::EAGAIN) => Ok(step),
            // Asked of the step: another write may have found it out while this one was under way.
            (step, _) if errno == libc::EOPNOTSUPP && step.is_forced() => {
                lacks.forced_writes.store(true, Ordering::Relaxed);
                Ok(step.not_forced())
            }
            (Step::DiscardCommand, _) if unknown => {
                lacks.discard_command.store(true, Ordering::Relaxed);
                Ok(Step::PunchHole)
            }
            (Step::PunchHole, op) if unknown => {
                lacks.punch_hole.store(true, Ordering::Relaxed);
                match op {
                    Op::Discard => Err(IoError::Unsupported),
                    _ => Ok(Step::ZeroRange),
                }
            }
            (Step::ZeroRange, _) if unknown => {
                lacks.zero_range.store(true, Ordering::Relaxed);
                Ok(Step::WriteZeroes)
            }
            _ => Err(IoError::from_errno(errno)),
        }
    }

    /// A transfer from or to memory, done at once: `io_uring` would hand each to a worker of the
    /// kernel, because such file systems cannot promise not to wait for the swap device.
    fn transfer_now(&self, request: &mut Request) -> Progress {
        let fd = self.shared.file.as_raw_fd();
        while request.remaining_bytes() > 0 {
            let list = request.buffers.list();
            let count = list.len().min(MAX_BUFFERS).cast_signed();
            // Positions were checked against the size of a file.
            let position = request.position_bytes().cast_signed();
            // One buffer is what most requests have, and the shorter way.
            let moved = match (request.op, list, i32::try_from(count).unwrap_or(1)) {
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
                Ok(0) if request.op == Op::Read => {
                    // Somebody made the file shorter: what is not there reads as zeroes.
                    request.zero_fill();
                    break;
                }
                Ok(0) => return Progress::Done(Err(IoError::Io)),
                Ok(moved) => request.advance(moved),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        let errno = error.raw_os_error().unwrap_or(libc::EIO);
                        return Progress::Done(Err(IoError::from_errno(errno)));
                    }
                }
            }
        }
        Progress::Done(Ok(()))
    }

    fn end(&mut self, slot: Slot, outcome: Result<(), IoError>) -> Progress {
        if let Step::Bounce { number, .. } = std::mem::take(&mut self.steps[slot as usize]) {
            self.bounce.give_back(number);
        }
        Progress::Done(outcome)
    }
}

impl StorageQueue for FileQueue {
    fn start(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        if request.op != Op::Flush && request.len_bytes == 0 {
            // fallocate(2) answers EINVAL to it, which must not look like "cannot punch holes".
            return Progress::Done(Ok(()));
        }
        if self.shared.is_in_memory && matches!(request.op, Op::Read | Op::Write { fua: false }) {
            return self.transfer_now(request);
        }
        if self.steps[slot as usize] == Step::Begin {
            match self.first_step(request) {
                Ok(Some(step)) => self.steps[slot as usize] = step,
                Ok(None) => return Progress::Full,
                // Nobody has to grant a discard; everything else must be told.
                Err(IoError::Unsupported) if request.op == Op::Discard => {
                    return Progress::Done(Ok(()));
                }
                Err(error) => return Progress::Done(Err(error)),
            }
        }
        self.submit(ring, slot, request)
    }

    fn advance(
        &mut self,
        ring: &mut Ring,
        slot: Slot,
        request: &mut Request,
        _kind: u16,
        result: i32,
    ) -> Progress {
        let step = self.steps[slot as usize];
        match self.next_step(step, request, result) {
            Ok(Some(next)) => {
                if let Step::Bounce { number, .. } = step
                    && !matches!(next, Step::Bounce { .. })
                {
                    self.bounce.give_back(number);
                }
                self.steps[slot as usize] = next;
                self.submit(ring, slot, request)
            }
            Ok(None) => self.end(slot, Ok(())),
            Err(IoError::Unsupported) if request.op == Op::Discard => self.end(slot, Ok(())),
            Err(error) => self.end(slot, Err(error)),
        }
    }
}

/// What is left of a request's buffer in the ring's table: where it begins, its length, its index.
/// Such a buffer begins at address 0.
fn in_ring(request: &Request) -> (*const u8, u32, u16) {
    let Some(buffer) = request.buffers.ring() else {
        unreachable!("the data of this request is in memory")
    };
    let at = std::ptr::without_provenance(buffer.offset_bytes);
    (at, clamp(buffer.len_bytes), buffer.index)
}

fn after_zeroing(request: &Request) -> Option<Step> {
    matches!(request.op, Op::WriteZeroes { fua: true, .. }).then_some(Step::Sync)
}

/// Whether the buffers lie as `O_DIRECT` wants it.
fn is_aligned(request: &Request, alignment: Alignment) -> bool {
    request.buffers.list().iter().all(|buffer| {
        (buffer.iov_base as usize).is_multiple_of(alignment.memory_bytes)
            && buffer.iov_len.is_multiple_of(alignment.block_bytes)
    })
}

fn piece_bytes(len_bytes: u64, most: usize) -> usize {
    usize::try_from(len_bytes).unwrap_or(most).min(most)
}

fn buffer_count(list: &[Buffer]) -> u32 {
    clamp(list.len().min(MAX_BUFFERS))
}

/// A length for the kernel, which moves no more than this at once: short transfers are resumed.
fn clamp(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX).min(0x7fff_f000)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
