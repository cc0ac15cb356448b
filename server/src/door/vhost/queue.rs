//! The vrings that one queue thread of a session serves.
//!
//! Kicks are reads of the kick descriptor on the thread's own ring, notifications are writes of
//! the call descriptor there: a client that lets them block does not block the thread. All vrings of a thread
//! share one pool of slots and take turns.

mod command;
mod commands;

use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::config::MAX_VRINGS;
use super::config_space::mask;
use super::connection::Connection;
use super::dirty::Logging;
use super::fast_path::Transfer;
use super::memory::HeldMap;
use super::request::{self, MAX_BUFFERS, ParsedRequest, RequestContext, Segments};
use super::ring_layout::RingError;
use super::sigbus;
use super::vring::{Kind, OPERATIONS, Vring, write_one};
use crate::engine::counters::Counters;
use crate::engine::{DoorQueue, Next};
use crate::io::{Completion, FreeSlots, Full, Ring, Slot, SlotTable};
use crate::request::{BufferLists, Op, Outcome, Range, Request};
pub(super) use command::Command;

/// Requests that can be in flight on one thread.
const SLOTS: u32 = 256;

/// Requests that one vring may begin before it is the next one's turn.
const TURN: u32 = 16;

/// Chains the door may answer by itself in one round.
const ANSWERS_PER_ROUND: u32 = 256;

/// A chain in flight.
struct InFlight {
    vring: usize,
    head: u16,
    status: Option<NonNull<u8>>,
    written_bytes: u32,
    /// Keeps the memory mapped that the buffers are in.
    map: Rc<HeldMap>,
}

/// The vrings of one queue thread.
pub(super) struct VhostQueues {
    connection: Arc<Connection>,
    counters: Arc<Counters>,
    /// Vring `index` is at `index / threads`.
    threads: u16,
    vrings: Vec<Option<Box<Vring>>>,
    map: Rc<HeldMap>,
    /// Where the client wants to know what is written to its memory.
    logging: Option<Logging>,
    free: FreeSlots,
    in_flight: SlotTable<InFlight>,
    /// [`MAX_BUFFERS`] for each slot.
    lists: BufferLists,
    /// Whose turn it is, and how much of the turn is left.
    turn: usize,
    turn_left: u32,
    answers_left: u32,
    poisonings: u64,
    exiting: bool,
}

impl VhostQueues {
    pub(super) fn new(connection: Arc<Connection>, counters: Arc<Counters>, threads: u16) -> Self {
        let slots = SLOTS as usize;
        Self {
            connection,
            counters,
            threads,
            vrings: Vec::new(),
            map: Rc::default(),
            logging: None,
            free: FreeSlots::new(SLOTS),
            in_flight: SlotTable::new(slots),
            lists: BufferLists::new(slots, MAX_BUFFERS),
            turn: 0,
            turn_left: TURN,
            answers_left: ANSWERS_PER_ROUND,
            poisonings: sigbus::poisonings(),
            exiting: false,
        }
    }

    fn vring(&mut self, index: u16) -> Option<&mut Vring> {
        let local = usize::from(index / self.threads);
        self.vrings.get_mut(local)?.as_deref_mut()
    }

    /// Ends service of a vring that the driver broke; the session goes on.
    fn break_vring(&mut self, ring: &mut Ring, local: usize, error: RingError) {
        let Some(vring) = &mut self.vrings[local] else {
            return;
        };
        // Not marked any more once it is broken.
        if let Some(logging) = &self.logging {
            vring.log_used(&logging.log);
        }
        if !vring.break_ring() {
            return;
        }
        if let Some(omitted) = self.connection.due("broken vring") {
            tracing::warn!(
                export = self.connection.export(),
                session = self.connection.id(),
                vring = vring.index,
                "the driver broke a vring, it is no longer served: {error}{omitted}"
            );
        }
        if let Some(fd) = &vring.error {
            // SAFETY: `ONE` lives for ever; a vring and its descriptors are dropped only after
            // its operations completed.
            let pushed = unsafe { ring.push(write_one(fd), vring.token(Kind::Error)) };
            vring.error_armed = pushed.is_ok();
            self.expect_room(pushed);
        }
    }

    /// `ring_operations` reserves room for everything; should that be wrong, only this session
    /// pays.
    fn expect_room(&self, pushed: Result<(), Full>) {
        if pushed.is_err() {
            self.connection
                .hang_up("the ring has no room for the vrings");
        }
    }

    /// Finds the next vring with chains, whose turn it is then. Returns whether there is one.
    #[inline(never)]
    fn next_turn(&mut self) -> bool {
        let count = self.vrings.len();
        for _ in 0..count {
            self.turn = (self.turn + 1) % count;
            if (self.vrings[self.turn].as_ref()).is_some_and(|vring| vring.takes_chains()) {
                self.turn_left = TURN;
                return true;
            }
        }
        false
    }

    /// Starts the request of a chain in any layout, or answers it. Returns its operation, its range, and the number of
    /// the slot's buffers that are its data.
    fn admit(&mut self, local: usize, head: u16, slot: Slot) -> Option<(Op, Range, usize)> {
        let vring = self.vrings[local].as_deref_mut()?;
        let chain = vring.queue.chain(head, &self.map);
        // SAFETY: the slot was free, so nothing else uses its list.
        let list = unsafe { self.lists.fill(slot as usize) };
        let segments = Segments::gather(chain, &self.map, list);
        match segments.parse(context(&self.connection, vring)) {
            ParsedRequest::Start {
                op,
                range,
                buffers,
                written_bytes,
            } => {
                let chain = InFlight {
                    vring: local,
                    head,
                    status: segments.status,
                    written_bytes,
                    map: Rc::clone(&self.map),
                };
                self.in_flight.put(slot, chain);
                vring.in_flight += 1;
                Some((op, range, buffers))
            }
            ParsedRequest::Answer {
                outcome,
                written_bytes,
            } => {
                if let Err(error) = outcome {
                    self.counters.count_error(error);
                    if let Some(address) = segments.unmapped {
                        self.connection.tell_unshared(format_args!(
                            "a request was failed, because guest address {address:#x} is not in the memory that the \
                             client shared"
                        ));
                    } else {
                        (self.connection).tell_refused(vring.index, error, &segments);
                    }
                }
                put_status(segments.status, request::status(outcome));
                if let Some(logging) = &self.logging {
                    // GET_ID is a device write too: mark its buffers dirty.
                    let written = outcome.map_or(&[][..], |()| segments.received());
                    logging.mark_request(self.map.map(), written, segments.status);
                }
                vring.queue.push_used(head, written_bytes);
                self.free.give_back(slot);
                None
            }
        }
    }
}

/// What the requests of a vring are parsed against.
#[inline]
fn context<'a>(connection: &'a Connection, vring: &Vring) -> RequestContext<'a> {
    let limits = connection.limits();
    let writeback = if vring.features & mask(VIRTIO_BLK_F_CONFIG_WCE) != 0 {
        connection.writeback.load(Ordering::Acquire)
    } else {
        vring.features & mask(VIRTIO_BLK_F_FLUSH) != 0
    };
    RequestContext {
        limits,
        features: vring.features,
        write_through: limits.write_cache && !writeback,
    }
}

/// Finishes a request of a vring that is logged, broken or abandoned. Whatever became of a read, the storage may have
/// written all of its buffers. Returns whether the chain can be returned: not if it failed after the client was gone,
/// because then it may have been ended early. A client that comes back submits again what was not returned.
///
/// The request is passed by value, so that the hot path can keep it in registers.
#[cold]
fn finish_unusual(
    logging: &Option<Logging>,
    vring: &Vring,
    chain: &InFlight,
    mut request: Request,
    outcome: Outcome,
) -> bool {
    if let Some(logging) = logging {
        let written = match request.op() {
            Op::Read => request.whole_list(),
            _ => &[],
        };
        logging.mark_request(chain.map.map(), written, chain.status);
    }
    request.finish();
    let ended_early = vring.is_abandoned() && outcome.is_err();
    !vring.is_broken() && !ended_early
}

/// Writes a status byte to where the driver wants it.
fn put_status(at: Option<NonNull<u8>>, status: u8) {
    if let Some(at) = at {
        // SAFETY: the address was found in a map that the caller still holds.
        unsafe { at.write_volatile(status) };
    }
}

impl DoorQueue for VhostQueues {
    type Command = Command;

    fn slots(&self) -> u32 {
        SLOTS
    }

    fn ring_operations(&self) -> u32 {
        OPERATIONS * u32::from(MAX_VRINGS.div_ceil(self.threads))
    }

    fn start(&mut self, _ring: &mut Ring) -> Result<(), Full> {
        // Vrings arm their kicks when they start.
        Ok(())
    }

    fn command(&mut self, ring: &mut Ring, command: Command) {
        self.obey(ring, command);
    }

    fn event(&mut self, ring: &mut Ring, completion: Completion) {
        let Ok(index) = u16::try_from(completion.token.index) else {
            return;
        };
        let exiting = self.exiting;
        let Some(vring) = self.vring(index) else {
            return;
        };
        if completion.token.kind == Kind::Call as u16 {
            // The result does not matter: only a client that closed or filled its descriptor misses a
            // notification. What is due meanwhile goes out at the end of the round.
            vring.call_armed = false;
            vring.call_cancelled = false;
            vring.calling = None;
            return;
        }
        if completion.token.kind == Kind::Error as u16 {
            vring.error_armed = false;
            return;
        }
        vring.kick_armed = false;
        if vring.is_stopping() || exiting {
            return;
        }
        if completion.result <= 0 {
            self.connection
                .hang_up("the kick descriptor of a vring cannot be read");
            return;
        }
        if std::mem::take(&mut vring.listening) && !vring.is_broken() {
            vring.queue.disable_kicks();
        }
        let in_vain = vring.was_kicked_in_vain();
        let pushed = vring.arm_kick(ring);
        self.expect_room(pushed);
        if in_vain {
            self.connection.tell_unshared(format_args!(
                "vring {index} was kicked and is empty: if the guest hangs, the ring is not in shared memory"
            ));
        }
    }

    #[inline(always)]
    fn next(&mut self, ring: &mut Ring) -> Option<(Slot, Request)> {
        while !self.free.is_empty() && self.answers_left > 0 {
            let local = self.turn;
            let Some(Some(vring)) = self.vrings.get_mut(local) else {
                self.next_turn().then_some(())?;
                continue;
            };
            if self.turn_left == 0 || !vring.takes_chains() {
                self.next_turn().then_some(())?;
                continue;
            }
            let head = match vring.queue.pop() {
                Ok(Some(head)) => head,
                // `takes_chains` saw one.
                Ok(None) => return None,
                Err(error) => {
                    self.break_vring(ring, local, error);
                    continue;
                }
            };
            self.turn_left -= 1;
            vring.queue.look_ahead(&self.map);
            let slot = self.free.take()?;
            let connection = &*self.connection;
            let write_through = || context(connection, vring).write_through;
            let usual = Transfer::parse(
                &vring.queue,
                head,
                &self.map,
                connection.limits(),
                write_through,
            );
            let (op, range, buffers) = if let Some(transfer) = usual {
                vring.in_flight += 1;
                let chain = InFlight {
                    vring: local,
                    head,
                    status: Some(transfer.status),
                    written_bytes: transfer.written_bytes,
                    map: Rc::clone(&self.map),
                };
                self.in_flight.put(slot, chain);
                // SAFETY: the slot was free, so nothing else uses its list.
                let list = unsafe { self.lists.fill(slot as usize) };
                list[0].write(transfer.buffer);
                (transfer.op, transfer.range, 1)
            } else if let Some(admitted) = self.admit(local, head, slot) {
                admitted
            } else {
                self.answers_left -= 1;
                continue;
            };
            // SAFETY: that many were filled. They belong to the slot, which is given back when the request
            // is finished, and `in_flight` keeps the map.
            let buffers = unsafe { self.lists.lend(slot as usize, buffers) };
            return Some((slot, Request::new(op, range, buffers)));
        }
        None
    }

    #[inline(always)]
    fn complete(&mut self, _ring: &mut Ring, slot: Slot, request: Request, outcome: Outcome) {
        let chain = self.in_flight.take(slot);
        self.free.give_back(slot);
        put_status(chain.status, request::status(outcome));
        let Some(vring) = &mut self.vrings[chain.vring] else {
            return request.finish();
        };
        vring.in_flight -= 1;
        if vring.is_plain() {
            request.finish();
        } else if !finish_unusual(&self.logging, vring, &chain, request, outcome) {
            return;
        }
        let written_bytes = if outcome.is_ok() {
            chain.written_bytes
        } else {
            1
        };
        vring.queue.push_used(chain.head, written_bytes);
    }

    fn end_batch(&mut self, ring: &mut Ring) -> Next {
        self.answers_left = ANSWERS_PER_ROUND;
        let poisonings = sigbus::poisonings();
        if self.poisonings != poisonings {
            self.poisonings = poisonings;
            let mut vrings = self.vrings.iter().flatten();
            let mut log = self.logging.iter().map(|logging| &logging.log);
            if self.map.map().is_poisoned()
                || vrings.any(|vring| vring.queue.lost_its_record())
                || log.any(|log| log.is_poisoned())
            {
                self.connection
                    .hang_up("the client cut its memory file short");
            }
        }
        let mut waiting = false;
        let mut left = false;
        for local in 0..self.vrings.len() {
            let Some(vring) = &mut self.vrings[local] else {
                continue;
            };
            if vring.queue.is_to_publish() && !vring.is_broken() && vring.queue.publish_and_ask() {
                vring.call_due = true;
            }
            if let Some(logging) = &self.logging {
                vring.log_used(&logging.log);
            }
            let called = vring.call(ring);
            let drained = called.and_then(|()| vring.drain(ring));
            let polled = if vring.is_watched() {
                vring.queue.poll().map(|_| ())
            } else {
                Ok(())
            };
            waiting |= vring.takes_chains();
            if drained == Ok(true)
                && let Some(vring) = self.vrings[local].take()
            {
                vring.report();
            } else {
                left = true;
                self.expect_room(drained.map(|_| ()));
                if let Err(error) = polled {
                    self.break_vring(ring, local, error);
                }
            }
        }
        if self.exiting && !left {
            Next::Exit
        } else if waiting && !self.free.is_empty() {
            Next::Again
        } else {
            Next::Idle
        }
    }

    fn drains(&self) -> bool {
        self.exiting || (self.vrings.iter().flatten()).any(|vring| vring.is_stopping())
    }

    fn abandons_requests(&self) -> bool {
        self.exiting
    }

    fn has_work(&self) -> bool {
        // Without a free slot no request can start: completions come first.
        !self.free.is_empty()
            && (self.vrings.iter().flatten())
                .any(|vring| vring.is_watched() && vring.queue.has_unseen())
    }

    fn listen(&mut self, _ring: &mut Ring) -> bool {
        if self.free.is_empty() {
            return true;
        }
        let mut nothing = true;
        for vring in self.vrings.iter_mut().flatten() {
            if !vring.is_watched() {
                continue;
            }
            if vring.queue.enable_kicks() {
                vring.queue.disable_kicks();
                nothing = false;
            } else {
                vring.listening = true;
            }
            if let Some(logging) = &self.logging {
                vring.log_used(&logging.log);
            }
        }
        nothing
    }
}
