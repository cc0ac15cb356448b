//! The steps of a request, and the io_uring operation of each.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{opcode, squeue, types};

use super::bounce::{BOUNCE_BYTES, Pool, gather};
use crate::io::{AnonymousMemory, Ring};
use crate::request::{Buffer, Op, Request};

/// `RWF_DSYNC`: this write is durable when it completes.
const RWF_DSYNC: i32 = 0x2;

/// `BLOCK_URING_CMD_DISCARD`, `_IO(0x12, 0)` (`include/uapi/linux/blkdev.h`).
const DISCARD_COMMAND: u32 = 0x12 << 8;

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Released at once: file systems take some time per gigabyte, in which other requests may wait for them.
pub(super) const RELEASE_BYTES: u64 = 1 << 30;

/// Zeroed at once: devices without an operation for it have this much written by the kernel.
pub(super) const ZERO_RANGE_BYTES: u64 = 64 << 20;

/// Zeroes written at once where the storage has no operation for it.
const ZERO_BYTES: usize = 1 << 20;

/// Buffers that one system call takes (`UIO_MAXIOV`); the rest goes as after a short transfer.
pub(super) const MAX_BUFFERS: usize = 1024;

/// What a request does next, or is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Step {
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
    pub(super) fn is_forced(self) -> bool {
        matches!(
            self,
            Self::Transfer { forced: true } | Self::Bounce { forced: true, .. }
        )
    }

    /// The same without `RWF_DSYNC`.
    pub(super) fn not_forced(mut self) -> Self {
        if let Self::Transfer { forced } | Self::Bounce { forced, .. } = &mut self {
            *forced = false;
        }
        self
    }
}

/// What the operations of one queue refer to.
#[derive(Debug)]
pub(super) struct Operations {
    /// The file in the ring's table, or the descriptor itself; the flags of an operation tell which.
    fd: types::Fd,
    fd_flags: squeue::Flags,
    pub(super) bounce: Pool,
    /// Never written to; mapped when first needed.
    zeroes: Option<AnonymousMemory>,
    /// `/dev/zero`, opened when first needed.
    pub(super) zero_device: Option<fs::File>,
}

impl Operations {
    /// Operations on `file` for `ring`.
    pub(super) fn new(file: &fs::File, ring: &mut Ring) -> Self {
        let (fd, fd_flags) = match ring.register_file(file.as_fd()) {
            Some(index) => (index, squeue::Flags::FIXED_FILE),
            None => (file.as_raw_fd(), squeue::Flags::empty()),
        };
        Self {
            fd: types::Fd(fd),
            fd_flags,
            bounce: Pool::new(),
            zeroes: None,
            zero_device: None,
        }
    }

    /// The operation of a step.
    ///
    /// # Errors
    ///
    /// When there is no memory for what it needs.
    pub(super) fn entry(&mut self, step: Step, request: &Request) -> io::Result<squeue::Entry> {
        let fd = self.fd;
        let (offset, len) = (request.position_bytes(), request.remaining_bytes());
        let write_flags = if step.is_forced() { RWF_DSYNC } else { 0 };
        let entry = match step {
            Step::Begin => unreachable!("a request without a step"),
            Step::Transfer { .. } if request.buffers().ring().is_some() => {
                let (at, len, index) = in_ring(request);
                if request.op() == Op::Read {
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
            Step::Transfer { .. } => match (request.op(), request.buffers().list()) {
                (Op::Read, [one]) => opcode::Read::new(fd, one.iov_base.cast(), clamp(one.iov_len))
                    .offset(offset)
                    .build(),
                (_, [one]) => opcode::Write::new(fd, one.iov_base.cast(), clamp(one.iov_len))
                    .offset(offset)
                    .rw_flags(write_flags)
                    .build(),
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
                let at = memory.ptr_guard_mut().as_ptr();
                let piece = piece_bytes(len, BOUNCE_BYTES);
                if request.op() == Op::Read {
                    opcode::Read::new(fd, at, clamp(piece))
                        .offset(offset)
                        .build()
                } else {
                    gather(request.buffers(), memory);
                    opcode::Write::new(fd, at, clamp(piece))
                        .offset(offset)
                        .rw_flags(write_flags)
                        .build()
                }
            }
            Step::DiscardCommand => {
                let len = range_bytes(RELEASE_BYTES, request);
                // The kernel takes the length from where `addr3` is, the first half of the command.
                let mut command = [0; 16];
                command[..8].copy_from_slice(&len.to_ne_bytes());
                opcode::UringCmd16::new(fd, DISCARD_COMMAND)
                    .addr(Some(offset))
                    .cmd(command)
                    .build()
            }
            Step::PunchHole => opcode::Fallocate::new(fd, range_bytes(RELEASE_BYTES, request))
                .offset(offset)
                .mode(PUNCH_HOLE)
                .build(),
            Step::ZeroRange => opcode::Fallocate::new(fd, range_bytes(ZERO_RANGE_BYTES, request))
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
        };
        let flags = match step {
            // The zero device has no place in the ring's table.
            Step::ReadZeroes => squeue::Flags::empty(),
            _ => self.fd_flags,
        };
        Ok(entry.flags(flags))
    }
}

/// What is left of a request's buffer in the ring's table: where it begins, its length, its index.
/// Such a buffer begins at address 0.
fn in_ring(request: &Request) -> (*const u8, u32, u16) {
    let Some(buffer) = request.buffers().ring() else {
        unreachable!("the data of this request is in memory")
    };
    let at = std::ptr::without_provenance(buffer.offset_bytes);
    (at, clamp(buffer.len_bytes), buffer.index)
}

/// How much of the rest of a range one operation works on that works on `most_bytes`, a power of two: as far as a
/// multiple of it, so that no block of the storage lies in two pieces.
pub(super) fn range_bytes(most_bytes: u64, request: &Request) -> u64 {
    let to_multiple = most_bytes - request.position_bytes() % most_bytes;
    request.remaining_bytes().min(to_multiple)
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
