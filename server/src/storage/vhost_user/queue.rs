//! One request from start to end, on its way to the server.
//!
//! A request that is longer than the server takes, or has more segments, is done in pieces, one after the other. Data that
//! lies in memory which the server has not mapped is copied.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use rustix::io::ReadWriteFlags;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vmm_sys_util::eventfd::EventFd;

use super::memory::{BUFFER_BYTES, Bounce, View};
use super::shared::Shared;
use super::virtqueue::{Listening, Virtqueue, notify};
use super::vring::{Command, MAX_SEGMENTS, Segment};
use crate::engine::StorageQueue;
use crate::engine::inbox::Inbox;
use crate::io::{Owner, Ring, Slot, Token};
use crate::request::{Buffer, IoError, Op, Progress, Request, SECTOR_SHIFT};

/// Kinds of the operations on the ring, beside that of the inbox: a poll of the call eventfd, a write of the kick eventfd.
const CALL: u16 = Inbox::KIND + 1;
const KICK: u16 = Inbox::KIND + 2;

/// How often a thread that ends looks whether the server has used its requests.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// `POLLIN`, as the ring takes it.
const POLL_READABLE: u32 = libc::POLLIN as u32;

/// What is written to an eventfd.
static ONE: u64 = 1;

/// Where the request in a slot stands.
#[derive(Clone, Copy, Debug, Default)]
struct SlotState {
    /// How much of it the server has.
    piece_bytes: u64,
    /// The buffer that the piece is copied through.
    bounce: Option<usize>,
    /// All is written, and is being made durable.
    is_flush: bool,
}

/// One thread's access to the disk of a server.
pub struct VhostUserQueue {
    shared: Arc<Shared>,
    virtqueue: Arc<Virtqueue>,
    /// The thread's number there.
    owner: usize,
    inbox: Inbox,
    view: View,
    bounce: Bounce,
    slots: Box<[SlotState]>,
    /// The segments of the piece that is being made.
    segments: Vec<Segment>,
    /// The eventfd that the ring has a poll of, and whether that is being cancelled.
    armed: Option<(Arc<EventFd>, bool)>,
    /// Whether the server was asked for notifications.
    is_listening: bool,
    /// The kick on the ring, and how often the kernel had been entered when it was put there.
    kicking: Option<(Arc<EventFd>, u64)>,
    /// What was submitted after the kick on the ring, and may have been missed by it.
    kick_again: Option<Arc<EventFd>>,
    /// Requests end with the piece that is being done.
    abandoned: bool,
}

impl VhostUserQueue {
    /// Operations that it may have on the ring at once.
    pub(super) const RING_OPERATIONS: u32 = Inbox::RING_OPERATIONS + 2;

    pub(super) fn new(shared: Arc<Shared>, slots: u32) -> io::Result<Self> {
        let inbox = Inbox::new(slots)?;
        let bounce = Bounce::new(&shared.bounce)?;
        // Threads have numbers from 0 on: none shares a virtqueue while another one is free.
        let virtqueue = Arc::clone(&shared.queues[bounce.number() % shared.queues.len()]);
        Ok(Self {
            owner: virtqueue.join(inbox.post()),
            virtqueue,
            inbox,
            view: View::new(Arc::clone(&shared.regions)),
            bounce,
            slots: vec![SlotState::default(); slots as usize].into(),
            segments: Vec::with_capacity(MAX_SEGMENTS),
            armed: None,
            is_listening: true,
            kicking: None,
            kick_again: None,
            abandoned: false,
            shared,
        })
    }

    /// Gives the server the next piece of a request.
    fn next_piece(&mut self, ring: &mut Ring, slot: Slot, request: &Request) -> Progress {
        self.segments.clear();
        let sector = request.position_bytes() >> SECTOR_SHIFT;
        let plain = |kind| Command {
            kind,
            sector,
            range: None,
            is_read: false,
        };
        let disk = &self.shared.disk;
        let (command, piece_bytes) = match request.op() {
            Op::Read | Op::Write { .. } => {
                let Some(piece_bytes) = self.find_or_copy(slot, request) else {
                    return Progress::Full;
                };
                let is_read = request.op() == Op::Read;
                let kind = if is_read {
                    VIRTIO_BLK_T_IN
                } else {
                    VIRTIO_BLK_T_OUT
                };
                (
                    Command {
                        is_read,
                        ..plain(kind)
                    },
                    piece_bytes,
                )
            }
            Op::Flush => (plain(VIRTIO_BLK_T_FLUSH), 0),
            Op::Discard => {
                let range = ranged(request, disk.max_discard_bytes, 0);
                let kind = VIRTIO_BLK_T_DISCARD;
                (with_range(plain(kind), range), range.2)
            }
            Op::WriteZeroes { unmap, .. } => {
                let flags = if unmap {
                    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
                } else {
                    0
                };
                let range = ranged(request, disk.max_write_zeroes_bytes, flags);
                (with_range(plain(VIRTIO_BLK_T_WRITE_ZEROES), range), range.2)
            }
        };
        self.slots[slot as usize].piece_bytes = piece_bytes;
        self.submit(ring, slot, command);
        Progress::Pending
    }

    fn submit(&mut self, ring: &mut Ring, slot: Slot, command: Command) {
        let ticket = self.inbox.expect(slot);
        let kick = (self.virtqueue).submit((self.owner, ticket), command, &self.segments);
        if let Some(kick) = kick {
            self.kick(ring, kick);
        }
    }

    /// Makes the list of segments for what is left of a read or write, or for as much as the server takes at once. Returns
    /// how much that is; nothing if it has to be copied and there is no buffer for it.
    fn find_or_copy(&mut self, slot: Slot, request: &Request) -> Option<u64> {
        self.view.refresh();
        let disk = &self.shared.disk;
        let found = find(
            &mut self.view,
            request.buffers().list(),
            &mut self.segments,
            (disk.max_segments, disk.max_segment_bytes),
        );
        if found == request.remaining_bytes() {
            return Some(found);
        }
        // The next piece begins at a block.
        let whole = found - found % u64::from(disk.block_bytes);
        cut(&mut self.segments, whole);
        if whole > 0 {
            return Some(whole);
        }
        self.copy(slot, request)
    }

    /// The same for data that is copied.
    #[cold]
    fn copy(&mut self, slot: Slot, request: &Request) -> Option<u64> {
        let disk = &self.shared.disk;
        let number = self.bounce.take()?;
        self.shared.count_copy();
        let most = (disk
            .max_segment_bytes
            .saturating_mul(disk.max_segments as u64))
        .min(BUFFER_BYTES as u64)
        .min(request.remaining_bytes());
        let piece_bytes = most - most % u64::from(disk.block_bytes);
        if request.op() != Op::Read {
            let mut to = self.bounce.memory(number);
            for part in request.buffers().memory() {
                part.copy_to_volatile_slice(to);
                let copied = part.len().min(to.len());
                to = to.offset(copied).expect("it is no longer than the rest");
            }
        }
        let mut guest = self.bounce.guest(number);
        let mut left = piece_bytes;
        self.segments.clear();
        while left > 0 {
            let here = left.min(disk.max_segment_bytes);
            self.segments.push(Segment {
                guest,
                // A buffer is not as long as that.
                len_bytes: u32::try_from(here).unwrap_or(u32::MAX),
            });
            (guest, left) = (guest + here, left - here);
        }
        self.slots[slot as usize].bounce = Some(number);
        Some(piece_bytes)
    }

    /// Copies what was read, if it was copied, and gives the buffer back.
    fn after_copy(&mut self, slot: Slot, request: &Request, is_read: bool) {
        let state = &mut self.slots[slot as usize];
        let Some(number) = state.bounce.take() else {
            return;
        };
        if is_read {
            // It is no longer than the buffer.
            let len = usize::try_from(state.piece_bytes).unwrap_or(0);
            let read = self.bounce.memory(number).subslice(0, len);
            let mut from = read.expect("a piece is no longer than its buffer");
            for part in request.buffers().memory() {
                from.copy_to_volatile_slice(part);
                let copied = part.len().min(from.len());
                from = from.offset(copied).expect("it is no longer than the rest");
            }
        }
        self.bounce.give_back(number);
    }

    /// Tells the server of requests, with the next system call of the thread: once for all that are submitted until then.
    fn kick(&mut self, ring: &mut Ring, kick: Arc<EventFd>) {
        if let Some((kicking, entered)) = &self.kicking {
            if !Arc::ptr_eq(kicking, &kick) {
                // That of another connection must not be waited for.
                self.kick_again = None;
                notify(&kick);
            } else if *entered != ring.enters() {
                self.kick_again = Some(kick);
            }
            return;
        }
        let fd = types::Fd(kick.as_raw_fd());
        let write = opcode::Write::new(fd, (&raw const ONE).cast(), 8).build();
        // SAFETY: `ONE` lives for ever, and the descriptor stays open in `kicking` until the completion.
        match unsafe { ring.push(write, token(KICK)) } {
            Ok(()) => self.kicking = Some((kick, ring.enters())),
            Err(_) => notify(&kick),
        }
    }

    fn reap(&self) {
        if let Err(violation) = self.virtqueue.reap() {
            self.shared.violated(violation);
        }
    }

    /// Puts a poll of the call eventfd on the ring. Returns whether there is one, perhaps of a server that has gone.
    fn arm_call(&mut self, ring: &mut Ring) -> bool {
        if self.armed.is_none() {
            let call = self.virtqueue.call();
            clear(&call);
            let poll = opcode::PollAdd::new(types::Fd(call.as_raw_fd()), POLL_READABLE);
            // SAFETY: `armed` keeps the descriptor open until the poll has ended, and the thread drains its ring before it
            // drops the queue.
            let is_armed = unsafe { ring.push(poll.build(), token(CALL)) }.is_ok();
            self.armed = is_armed.then_some((call, false));
        }
        self.armed.is_some()
    }
}

/// Sets the counter of an eventfd to zero. Without a wait even if the server has switched EFD_NONBLOCK off.
fn clear(eventfd: &EventFd) {
    // SAFETY: `eventfd` keeps it open.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let mut counter = [0; 8];
    let mut buffers = [io::IoSliceMut::new(&mut counter)];
    // Nothing was written to it: the poll waits.
    let _ = rustix::io::preadv2(fd, &mut buffers, u64::MAX, ReadWriteFlags::NOWAIT);
}

fn token(kind: u16) -> Token {
    Token {
        owner: Owner::Bell,
        kind,
        index: 0,
    }
}

/// The range of a request's next piece: sectors, flags and bytes.
fn ranged(request: &Request, most_bytes: u64, flags: u32) -> (u32, u32, u64) {
    let piece_bytes = request.remaining_bytes().min(most_bytes);
    // The limit came as a number of sectors.
    let sectors = u32::try_from(piece_bytes >> SECTOR_SHIFT).unwrap_or(u32::MAX);
    (sectors, flags, piece_bytes)
}

fn with_range(command: Command, (sectors, flags, _): (u32, u32, u64)) -> Command {
    Command {
        range: Some((sectors, flags)),
        ..command
    }
}

/// Puts buffers on the list of segments, up to the first that the server does not see or until there are too many. Returns
/// how long they are.
fn find(
    view: &mut View,
    buffers: &[Buffer],
    segments: &mut Vec<Segment>,
    (max_segments, max_bytes): (usize, u64),
) -> u64 {
    let mut found = 0;
    for buffer in buffers {
        let Some(mut guest) = view.guest(buffer.iov_base.addr(), buffer.iov_len) else {
            return found;
        };
        let mut left = buffer.iov_len as u64;
        while left > 0 {
            if segments.len() == max_segments {
                return found;
            }
            let here = left.min(max_bytes);
            let len_bytes = u32::try_from(here).unwrap_or(u32::MAX);
            segments.push(Segment { guest, len_bytes });
            let here = u64::from(len_bytes);
            (guest, left, found) = (guest + here, left - here, found + here);
        }
    }
    found
}

/// Cuts the list off after `len_bytes`.
fn cut(segments: &mut Vec<Segment>, len_bytes: u64) {
    let mut left = len_bytes;
    for segment in segments.iter_mut() {
        let here = left.min(segment.len_bytes.into());
        // It is no more than before.
        segment.len_bytes = u32::try_from(here).unwrap_or(segment.len_bytes);
        left -= here;
    }
    segments.retain(|segment| segment.len_bytes > 0);
}

impl StorageQueue for VhostUserQueue {
    fn start(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        let disk = &self.shared.disk;
        let nothing = match request.op() {
            Op::Flush => !disk.has_cache(),
            _ => request.len_bytes() == 0,
        };
        if nothing {
            return Progress::Done(Ok(()));
        }
        let is_lacking = match request.op() {
            Op::Discard => disk.max_discard_bytes == 0,
            Op::WriteZeroes { .. } => disk.max_write_zeroes_bytes == 0,
            _ => false,
        };
        if is_lacking {
            return Progress::Done(Err(IoError::Unsupported));
        }
        self.next_piece(ring, slot, request)
    }

    fn advance(
        &mut self,
        ring: &mut Ring,
        slot: Slot,
        request: &mut Request,
        _kind: u16,
        result: i32,
    ) -> Progress {
        let is_read = request.op() == Op::Read && result == 0;
        self.after_copy(slot, request, is_read);
        let state = &mut self.slots[slot as usize];
        let was_flush = std::mem::take(&mut state.is_flush);
        if result < 0 {
            let shared = &self.shared;
            (shared.failures).note(&shared.export, shared.name(), request, -result);
            return Progress::Done(Err(IoError::from_errno(-result)));
        }
        if was_flush || request.op() == Op::Flush {
            return Progress::Done(Ok(()));
        }
        request.advance(state.piece_bytes);
        if request.remaining_bytes() > 0 {
            return match self.abandoned {
                true => Progress::Done(Err(IoError::Io)),
                false => self.next_piece(ring, slot, request),
            };
        }
        let is_forced = matches!(
            request.op(),
            Op::Write { fua: true } | Op::WriteZeroes { fua: true, .. }
        );
        if is_forced && self.shared.disk.has_cache() {
            state.is_flush = true;
            self.segments.clear();
            let flush = Command {
                kind: VIRTIO_BLK_T_FLUSH,
                sector: 0,
                range: None,
                is_read: false,
            };
            self.submit(ring, slot, flush);
            return Progress::Pending;
        }
        Progress::Done(Ok(()))
    }

    fn abandon(&mut self) {
        self.abandoned = true;
        // Without a server nothing outside works on them.
        self.virtqueue.abandon(self.owner);
    }

    fn next_result(&mut self) -> Option<(Slot, i32)> {
        if self.is_listening {
            // The thread is awake.
            self.is_listening = false;
            self.virtqueue.notify(false);
        }
        if let Some(result) = self.inbox.next_result() {
            return Some(result);
        }
        self.reap();
        self.inbox.next_result()
    }

    fn has_results(&self) -> bool {
        self.inbox.has_results() || self.virtqueue.has_used()
    }

    fn listen(&mut self, ring: &mut Ring) -> bool {
        if !self.arm_call(ring) || !self.inbox.listen(ring) {
            return false;
        }
        self.is_listening = true;
        let Some((call, is_cancelled)) = &mut self.armed else {
            return false;
        };
        // After the thread has said that it sleeps: who changes the eventfd wakes it.
        match self.virtqueue.listen(call) {
            Listening::Sleep => true,
            Listening::Used => false,
            Listening::OtherCall => {
                // The server that has gone may keep the old one silent.
                *is_cancelled = *is_cancelled || ring.cancel(token(CALL)).is_ok();
                false
            }
        }
    }

    fn rang(&mut self, ring: &mut Ring, kind: u16) {
        match kind {
            CALL => self.armed = None,
            KICK => {
                self.kicking = None;
                if let Some(kick) = self.kick_again.take() {
                    self.kick(ring, kick);
                }
            }
            _ => self.inbox.rang(),
        }
    }

    fn quiesce(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.virtqueue.notify(true);
        loop {
            self.reap();
            // Without a server nothing outside works on them.
            self.virtqueue.abandon(self.owner);
            if self.inbox.quiesce(LOOK_INTERVAL) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }
}

impl Drop for VhostUserQueue {
    fn drop(&mut self) {
        self.virtqueue.leave(self.owner);
    }
}
