//! One queue of a ublk device: fetched commands become requests, outcomes become commits.
//!
//! Each tag has one command at the driver. It completes when the block layer has a request for the
//! tag; the answer goes back with the command that fetches the next request of that tag. When the
//! device stops, every command completes with `UBLK_IO_RES_ABORT`, and the queue is at its end when
//! all have.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use io_uring::{opcode, squeue, types};
use libublk::sys;

use super::config::DataPath;
use super::memory::{Descriptors, Direction, IoBuffers};
use super::refusals::Refusals;
use super::writes::Writes;
use crate::engine::counters::Counters;
use crate::engine::cpus::{Cpus, is_bound_to_one};
use crate::engine::threads::ThreadOptions;
use crate::engine::throttle::Throttle;
use crate::engine::{DoorQueue, Next, Sharing};
use crate::io::{Completion, Full, Owner, Ring, Slot, Token};
use crate::request::{Buffers, IoError, Limits, Op, Outcome, Range, Request, SECTOR_SHIFT};

/// What other threads may ask of a queue.
pub(super) enum Command {
    /// End without waiting for the device to be stopped; requests not yet begun stay unanswered
    /// and are failed by the driver.
    Quit,
    /// End after the requests that the driver has handed out, of which there are no new ones: it was
    /// told to hold them back.
    Leave,
    /// Take no more writes, and say when those under way have ended.
    RefuseWrites(mpsc::Sender<()>),
    /// Take writes again.
    AcceptWrites,
    /// Say when the requests that are under way now have ended; later ones may be.
    AwaitAnswers(mpsc::Sender<()>),
}

/// What a queue is made of.
pub(super) struct QueueConfig {
    pub(super) char_device: Arc<File>,
    pub(super) queue: u16,
    pub(super) depth: u16,
    pub(super) buffer_bytes: u32,
    pub(super) limits: Limits,
    pub(super) counters: Arc<Counters>,
    /// Where the queue leaves the errno of a command that the driver refused.
    pub(super) fault: Arc<AtomicI32>,
    /// What the log says of requests that the storage does not get.
    pub(super) refusals: Arc<Refusals>,
    /// Begins without writes, until they are accepted.
    pub(super) refuse_writes: bool,
    /// How data gets to the storage and back. With [`DataPath::ZeroCopy`] the driver registers it
    /// with the ring, at the index of the tag.
    pub(super) data: DataPath,
    /// Whether the driver lets us copy, also with [`DataPath::ZeroCopy`].
    pub(super) may_copy: bool,
    /// How the queue's thread runs.
    pub(super) threads: ThreadOptions,
    /// What clients may do.
    pub(super) throttle: Arc<Throttle>,
    /// For how long at the longest limits may hold a request back.
    pub(super) longest_hold: Duration,
    /// Where it runs, if that is where the queue's requests come from.
    pub(super) cpus: Option<Cpus>,
    /// Whether it must run there.
    pub(super) insists: bool,
    /// Takes the buffers for data, where the storage hands them on.
    pub(super) sharing: Option<Arc<dyn Sharing>>,
}

/// One queue of a ublk device. The slot of a request is its tag.
pub(super) struct UblkQueue {
    config: QueueConfig,
    descriptors: Descriptors,
    /// The character device in the ring's table, or the descriptor itself; the flags tell which.
    fd: types::Fd,
    fd_flags: squeue::Flags,
    /// Not there when the driver registers the data of requests and does not let us copy.
    buffers: Option<IoBuffers>,
    /// Tags whose data the driver should have registered and could not: it is copied.
    unregistered: Box<[bool]>,
    /// Tags with a request that was not begun.
    fetched: VecDeque<u16>,
    /// Tags with an answer for the driver, and the answers by tag: [`UNANSWERED`] from when the driver hands out a
    /// request.
    answered: Vec<u16>,
    answers: Box<[i32]>,
    awaited: Vec<Awaited>,
    writes: Writes,
    /// Tags whose command came back for good.
    ended: u16,
    quit: bool,
    leaving: Option<Leaving>,
}

/// What is no answer.
const UNANSWERED: i32 = i32::MIN;

/// Requests whose ends another thread waits for, by tag.
struct Awaited {
    tags: Vec<u16>,
    ended: mpsc::Sender<()>,
}

/// A queue that ends with the device alive.
#[derive(Clone, Copy, Default)]
struct Leaving {
    /// Rounds in which nothing came from the driver.
    quiet: u32,
    /// Whether something came in this round.
    heard: bool,
}

/// Rounds after which a queue that leaves has heard of everything the driver had handed out: what the
/// kernel had for us when we were told, it delivers at the next look.
const QUIET_ROUNDS: u32 = 2;

impl UblkQueue {
    /// Maps the memory of a queue; nothing is at the driver yet.
    pub(super) fn new(config: QueueConfig) -> io::Result<Self> {
        let depth = config.depth;
        Ok(Self {
            descriptors: Descriptors::map(&config.char_device, config.queue, depth)?,
            fd: types::Fd(config.char_device.as_raw_fd()),
            fd_flags: squeue::Flags::empty(),
            buffers: match config.data {
                DataPath::ZeroCopy if !config.may_copy => None,
                // What is not used is no memory yet.
                _ => Some(IoBuffers::new(
                    depth,
                    config.buffer_bytes,
                    config.sharing.as_deref(),
                )?),
            },
            unregistered: vec![false; depth.into()].into_boxed_slice(),
            fetched: VecDeque::with_capacity(depth.into()),
            answered: Vec::with_capacity(depth.into()),
            answers: vec![0; depth.into()].into_boxed_slice(),
            awaited: Vec::new(),
            writes: Writes::new(config.refuse_writes),
            ended: 0,
            quit: false,
            leaving: None,
            config,
        })
    }

    fn push(&mut self, ring: &mut Ring, number: u32, tag: u16, result: i32) -> Result<(), Full> {
        let words = sys::ublksrv_io_cmd {
            q_id: self.config.queue,
            tag,
            result,
            // Where the driver shall copy to and from, if it does.
            addr: match (&self.buffers, self.config.data) {
                (Some(buffers), DataPath::Copy) => buffers.address(tag),
                _ => 0,
            },
        };
        // Where the buffer goes in the ring's table: `struct ublk_auto_buf_reg`, all in one word.
        let fallback = match self.config.may_copy {
            true => u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK) << 16,
            false => 0,
        };
        let index = (self.config.data == DataPath::ZeroCopy).then_some(u64::from(tag) | fallback);
        let sqe = opcode::UringCmd16::new(self.fd, number)
            .addr(index)
            .cmd(command_bytes(words))
            .build()
            .flags(self.fd_flags);
        let token = Token {
            owner: Owner::Door,
            kind: 0,
            index: tag.into(),
        };
        // SAFETY: the command points to the buffer of the tag, which the queue keeps until the
        // thread has drained its ring (`IoBuffers::drop`).
        unsafe { ring.push(sqe, token) }
    }

    /// Leaves an answer for the end of the round.
    fn answer(&mut self, tag: u16, result: i32) {
        self.answers[usize::from(tag)] = result;
        self.answered.push(tag);
    }

    /// Tells the threads that wait for requests when the last of them has an answer; before the answers are given to the
    /// driver, which may then hand out the tags again.
    fn tell_answered(&mut self) {
        let answers = &self.answers;
        self.awaited.retain_mut(|awaited| {
            (awaited.tags).retain(|&tag| answers[usize::from(tag)] == UNANSWERED);
            if awaited.tags.is_empty() {
                // A receiver that no longer waits needs no answer.
                let _ = awaited.ended.send(());
            }
            !awaited.tags.is_empty()
        });
    }

    /// Whether a queue that leaves has begun all that it was handed; at the end of a round.
    fn has_left(&mut self) -> bool {
        let Some(leaving) = &mut self.leaving else {
            return false;
        };
        let busy = std::mem::take(&mut leaving.heard) || !self.fetched.is_empty();
        leaving.quiet = if busy { 0 } else { leaving.quiet + 1 };
        leaving.quiet >= QUIET_ROUNDS
    }

    /// What the request of a tag asks for, if it may be done.
    fn admit(&mut self, tag: u16) -> Result<(Op, Range), IoError> {
        let descriptor = self.descriptors.get(tag);
        let (op, range) = parse(&descriptor, &self.config.limits, self.config.buffer_bytes)?;
        if op.is_write() {
            self.writes.begin()?;
        }
        if self.config.data == DataPath::ZeroCopy {
            // Without leave to copy the driver fails such a request by itself.
            self.unregistered[usize::from(tag)] =
                descriptor.op_flags & sys::UBLK_IO_F_NEED_REG_BUF != 0;
        }
        if op.has_data() && op.is_write() {
            let fetched = self.copy(tag, range.len_bytes(), Direction::FromRequest);
            fetched.inspect_err(|_| self.writes.end())?;
        }
        Ok((op, range))
    }

    /// Copies between the pages of a tag's request and its buffer, if that is for us to do.
    fn copy(&self, tag: u16, len_bytes: u64, direction: Direction) -> Result<(), IoError> {
        match &self.buffers {
            Some(buffers) if self.copies(tag) => {
                let (device, queue) = (&self.config.char_device, self.config.queue);
                // No truncation: `parse` compared it to the size of a buffer.
                let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
                buffers.copy(device, queue, tag, len, direction)
            }
            _ => Ok(()),
        }
    }

    /// Whether it is for us to copy the data of a tag's request.
    fn copies(&self, tag: u16) -> bool {
        self.config.data == DataPath::UserCopy || self.unregistered[usize::from(tag)]
    }

    /// A tag from a token or a slot that was made from a tag.
    fn tag(&self, index: u32) -> u16 {
        match u16::try_from(index) {
            Ok(tag) if tag < self.config.depth => tag,
            _ => unreachable!("{index} was never a tag of this queue"),
        }
    }
}

impl DoorQueue for UblkQueue {
    type Command = Command;

    fn slots(&self) -> u32 {
        self.config.depth.into()
    }

    fn ring_operations(&self) -> u32 {
        self.config.depth.into()
    }

    fn start(&mut self, ring: &mut Ring) -> Result<(), Full> {
        if let Some(index) = ring.register_file(self.config.char_device.as_fd()) {
            self.fd = types::Fd(index);
            self.fd_flags = squeue::Flags::FIXED_FILE;
        }
        (0..self.config.depth).try_for_each(|tag| self.push(ring, sys::UBLK_U_IO_FETCH_REQ, tag, 0))
    }

    fn command(&mut self, _ring: &mut Ring, command: Command) {
        match command {
            Command::Quit => self.on_failure(),
            Command::Leave => {
                self.leaving = Some(Leaving::default());
                if let Some(buffers) = &mut self.buffers {
                    buffers.leak();
                }
            }
            Command::RefuseWrites(drained) => self.writes.refuse(drained),
            Command::AcceptWrites => self.writes.accept(),
            Command::AwaitAnswers(ended) => {
                let tags = 0..self.config.depth;
                let tags = tags.filter(|&tag| self.answers[usize::from(tag)] == UNANSWERED);
                let tags = tags.collect();
                self.awaited.push(Awaited { tags, ended });
            }
        }
    }

    fn event(&mut self, _ring: &mut Ring, completion: Completion) {
        let tag = self.tag(completion.token.index);
        if let Some(leaving) = &mut self.leaving {
            leaving.heard = true;
        }
        match completion.result {
            0 => {
                self.answers[usize::from(tag)] = UNANSWERED;
                self.fetched.push_back(tag);
            }
            sys::UBLK_IO_RES_ABORT => self.ended += 1,
            refused => {
                self.config.fault.store(-refused, Ordering::Relaxed);
                self.ended += 1;
                self.on_failure();
            }
        }
    }

    fn next(&mut self, _ring: &mut Ring) -> Option<(Slot, Request)> {
        while !self.quit {
            let tag = self.fetched.pop_front()?;
            match self.admit(tag) {
                Ok((op, range)) => {
                    let buffers = if op.has_data() {
                        // No truncation: `parse` compared it to the size of a buffer.
                        let len = usize::try_from(range.len_bytes()).unwrap_or(usize::MAX);
                        let registered = self.config.data == DataPath::ZeroCopy
                            && !self.unregistered[usize::from(tag)];
                        match &self.buffers {
                            // SAFETY: list and memory belong to this request until `complete`: the
                            // driver hands out a tag again only after its commit.
                            Some(buffers) if !registered => unsafe { buffers.lend(tag, len) },
                            _ => Buffers::in_ring(tag, len),
                        }
                    } else {
                        Buffers::NONE
                    };
                    return Some((tag.into(), Request::new(op, range, buffers)));
                }
                Err(error) => {
                    self.config.counters.count_error(error);
                    self.config.refusals.tell(&self.descriptors.get(tag), error);
                    self.answer(tag, -error.errno());
                }
            }
        }
        None
    }

    fn complete(&mut self, _ring: &mut Ring, slot: Slot, request: Request, outcome: Outcome) {
        let tag = self.tag(slot);
        let outcome = match request.op() {
            Op::Read => {
                outcome.and_then(|()| self.copy(tag, request.len_bytes(), Direction::ToRequest))
            }
            _ => outcome,
        };
        let result = answer_to(request.op(), request.len_bytes(), outcome);
        if request.op().is_write() {
            self.writes.end();
        }
        request.finish();
        self.answer(tag, result);
    }

    fn end_batch(&mut self, ring: &mut Ring) -> Next {
        if !self.awaited.is_empty() {
            self.tell_answered();
        }
        while let Some(&tag) = self.answered.last() {
            let result = self.answers[usize::from(tag)];
            let commit = sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ;
            if self.push(ring, commit, tag, result).is_err() {
                // The kernel is short of memory for now: the next round tries again.
                return Next::Again;
            }
            self.answered.pop();
        }
        if self.leaving.is_some() {
            // A quiet round is one in which the kernel had nothing; its flag may lag behind that.
            ring.make_completions();
        }
        if self.quit || self.ended == self.config.depth || self.has_left() {
            Next::Exit
        } else if self.leaving.is_some() {
            Next::Again
        } else if self.fetched.is_empty() {
            Next::Idle
        } else {
            Next::Again
        }
    }

    fn drains(&self) -> bool {
        self.quit || self.leaving.is_some() || self.writes.drain() || !self.awaited.is_empty()
    }

    fn longest_hold(&self) -> Duration {
        self.config.longest_hold
    }

    fn is_beside_clients(&self) -> bool {
        // What it may use are processors that are there.
        self.config.cpus.is_some() && is_bound_to_one()
    }

    /// Also the way to end with commands at the driver. `io_uring` has no cancellation for them; they end when the
    /// ring closes, and a request may arrive until then.
    fn on_failure(&mut self) {
        self.quit = true;
        if let Some(buffers) = &mut self.buffers {
            buffers.leak();
        }
    }

    fn abandons_operations(&self) -> bool {
        self.quit || self.leaving.is_some()
    }
}

/// The command as it travels in a submission entry.
fn command_bytes(words: sys::ublksrv_io_cmd) -> [u8; 16] {
    // SAFETY: 16 bytes of integers without padding, any of which is a valid byte.
    unsafe { std::mem::transmute::<sys::ublksrv_io_cmd, [u8; 16]>(words) }
}

/// What a descriptor asks for, checked against the disk and the buffer that it comes with.
fn parse(
    descriptor: &sys::ublksrv_io_desc,
    limits: &Limits,
    buffer_bytes: u32,
) -> Result<(Op, Range), IoError> {
    let flag = |bit| descriptor.op_flags & bit != 0;
    let fua = flag(sys::UBLK_IO_F_FUA);
    let op = match descriptor.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => Op::Read,
        sys::UBLK_IO_OP_WRITE => Op::Write { fua },
        sys::UBLK_IO_OP_FLUSH => Op::Flush,
        sys::UBLK_IO_OP_DISCARD => Op::Discard,
        sys::UBLK_IO_OP_WRITE_ZEROES => limits.write_zeroes(!flag(sys::UBLK_IO_F_NOUNMAP), fua),
        _ => return Err(IoError::Unsupported),
    };
    let sectors = u64::from(descriptor.nr_sectors);
    if op.has_data() && sectors > u64::from(buffer_bytes >> SECTOR_SHIFT) {
        return Err(IoError::Io);
    }
    let range = limits.check(op, descriptor.start_sector, sectors)?;
    Ok((op, range))
}

/// The answer to a request: all of it or a negative errno. The driver takes a short answer to a
/// write for a complete one, so there are none.
fn answer_to(op: Op, len_bytes: u64, outcome: Outcome) -> i32 {
    match outcome {
        // A buffer has 32 MiB at most (`params::buffer_bytes`), so its length fits.
        Ok(()) if op.has_data() => i32::try_from(len_bytes).unwrap_or(-libc::EIO),
        Ok(()) => 0,
        Err(error) => -error.errno(),
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
