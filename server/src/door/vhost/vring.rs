//! One vring of a queue thread, and its operations on the thread's ring.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc;

use io_uring::{opcode, squeue, types};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};

use super::dirty::{DirtyLog, Logging};
use super::inflight::InflightQueue;
use super::memory::MemoryMap;
use super::ring_layout::RingAddresses;
use super::virtqueue::Virtqueue;
use crate::io::{Full, Owner, Ring, Token};

/// What is written to a call or error descriptor.
static ONE: u64 = 1;

/// A vring as the protocol thread set it up.
pub(super) struct Start {
    pub index: u16,
    pub size: u16,
    pub addresses: RingAddresses,
    pub base: u16,
    pub features: u64,
    pub kick: OwnedFd,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
    pub map: Arc<MemoryMap>,
    pub logging: Option<Logging>,
    /// Where the used ring is for the log of dirty pages, if its writes are to be marked.
    pub used_guest: Option<u64>,
    pub inflight: Option<InflightQueue>,
}

/// What is left of a vring that was stopped.
pub(super) struct Stopped {
    /// The next chain the device would have taken.
    pub base: u16,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
}

/// An operation of a vring on the thread's ring.
#[derive(Clone, Copy)]
#[repr(u16)]
pub(super) enum Kind {
    Kick,
    Call,
    Error,
}

/// Operations of one vring on the ring at once: a read of the kick, a write of the call, and one
/// of the error descriptor.
pub(super) const OPERATIONS: u32 = 3;

/// A vring that is being served.
pub(super) struct Vring {
    pub(super) index: u16,
    pub(super) queue: Virtqueue,
    pub(super) features: u64,
    pub(super) kick: OwnedFd,
    /// Where the kernel puts the kick's counter. On the heap: its address must not change.
    pub(super) count: Box<u64>,
    pub(super) kick_armed: bool,
    /// Until something is in it.
    untouched: Option<Untouched>,
    pub(super) call: Option<OwnedFd>,
    /// The flags of its writes, once they were determined.
    call_flags: Option<squeue::Flags>,
    /// The descriptor of the write in flight.
    pub(super) calling: Option<OwnedFd>,
    pub(super) call_armed: bool,
    pub(super) call_cancelled: bool,
    /// The driver wants a notification that was not written yet.
    pub(super) call_due: bool,
    pub(super) error: Option<OwnedFd>,
    pub(super) error_armed: bool,
    enabled: bool,
    /// The driver kicks at the next chain; until then the ring is not polled.
    pub(super) listening: bool,
    broken: bool,
    /// Whether requests are to be marked in the log of dirty pages.
    logged: bool,
    /// Neither broken nor logged nor abandoned: a request that has ended is returned and that is all.
    plain: bool,
    used_guest: Option<u64>,
    stopping: Option<Stopping>,
    /// Whether the driver's chains are of interest: it is enabled, not broken, and not to stop.
    served: bool,
    pub(super) in_flight: u32,
}

/// A ring in which nothing was seen yet.
struct Untouched {
    /// Where it began.
    base: u16,
    kicks: u64,
}

struct Stopping {
    reply: Option<mpsc::Sender<Stopped>>,
    cancelled: bool,
}

impl Vring {
    pub(super) fn new(start: Start, queue: Virtqueue) -> Self {
        Self {
            // A driver that waits for what was returned already must not wait for ever.
            call_due: queue.may_owe_notification(),
            index: start.index,
            queue,
            features: start.features,
            kick: start.kick,
            count: Box::new(0),
            kick_armed: false,
            untouched: Some(Untouched {
                base: start.base,
                kicks: 0,
            }),
            call: start.call,
            call_flags: None,
            calling: None,
            call_armed: false,
            call_cancelled: false,
            error: start.error,
            error_armed: false,
            enabled: true,
            // A kick may have come and gone before.
            listening: false,
            broken: false,
            logged: false,
            plain: true,
            used_guest: start.used_guest,
            stopping: None,
            served: true,
            in_flight: 0,
        }
    }

    /// Takes no more chains. The vring is to go when its last operation completed; `reply` gets
    /// what is left of it.
    pub(super) fn stop(&mut self, reply: Option<mpsc::Sender<Stopped>>) {
        self.plain &= reply.is_some();
        self.stopping = Some(Stopping {
            reply,
            cancelled: false,
        });
        self.served = false;
    }

    /// Takes chains, or leaves them where they are.
    pub(super) fn enable(&mut self, on: bool) {
        self.enabled = on;
        self.served = on && !self.broken && self.stopping.is_none();
    }

    /// Takes note of the kicks that were read. True once, when there were several and nothing was ever in the ring.
    /// QEMU kicks each ring by itself when it starts it.
    #[inline]
    pub(super) fn was_kicked_in_vain(&mut self) -> bool {
        self.untouched.is_some() && self.count_kicks_in_vain()
    }

    #[cold]
    fn count_kicks_in_vain(&mut self) -> bool {
        let Some(untouched) = &mut self.untouched else {
            return false;
        };
        let is_taken = self.queue.next_available() != untouched.base || self.queue.has_chains();
        if self.broken || is_taken || self.queue.has_unseen() {
            self.untouched = None;
            return false;
        }
        untouched.kicks = untouched.kicks.saturating_add(*self.count);
        untouched.kicks > 1 && self.untouched.take().is_some()
    }

    /// Never touches the ring again. Returns whether it was usable until now.
    pub(super) fn break_ring(&mut self) -> bool {
        self.served = false;
        self.plain = false;
        !std::mem::replace(&mut self.broken, true)
    }

    /// Whether what its requests write is to be marked in the log of dirty pages.
    pub(super) fn set_logged(&mut self, logged: bool) {
        if logged && !self.logged {
            self.queue.start_logging();
        }
        self.logged = logged;
        self.plain = !logged && !self.broken && !self.is_abandoned();
    }

    /// Where its used ring is for the log of dirty pages; `None`: not to be marked.
    pub(super) fn set_used_guest(&mut self, used_guest: Option<u64>) {
        if self.used_guest.is_none() {
            self.queue.start_logging();
        }
        self.used_guest = used_guest;
    }

    /// Marks what was written to the used ring.
    #[cold]
    pub(super) fn log_used(&mut self, log: &DirtyLog) {
        if let Some(base) = self.used_guest
            && !self.broken
        {
            self.queue.written(|offset, len_bytes| {
                log.mark(base.wrapping_add(offset), len_bytes);
            });
        }
    }

    /// Whether a request that has ended needs no more than to be returned.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.plain
    }

    /// Whether the driver broke the ring.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether its client is gone.
    pub(super) fn is_abandoned(&self) -> bool {
        (self.stopping.as_ref()).is_some_and(|stopping| stopping.reply.is_none())
    }

    /// Requests that the driver has no answer to.
    pub(super) fn unanswered(&mut self) -> usize {
        // A ring that the driver broke has none.
        let polled = !self.broken && self.queue.poll().is_ok();
        let waiting = if polled { self.queue.waiting() } else { 0 };
        self.in_flight as usize + waiting
    }

    /// Whether it is to go.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    /// Replies with what is left of it, if a reply is wanted.
    pub(super) fn report(self) {
        if let Some(reply) = self.stopping.and_then(|stopping| stopping.reply) {
            // A reply that is no longer waited for may be lost.
            let _ = reply.send(Stopped {
                base: self.queue.next_available(),
                call: self.call,
                error: self.error,
            });
        }
    }

    /// Whether the ring has to be polled: no kick comes.
    pub(super) fn is_watched(&self) -> bool {
        self.served && !self.listening
    }

    /// Whether there is a chain that may be taken.
    #[inline]
    pub(super) fn takes_chains(&self) -> bool {
        if self.served {
            return self.queue.has_chains();
        }
        self.resubmits_chains()
    }

    #[cold]
    fn resubmits_chains(&self) -> bool {
        if self.broken {
            return false;
        }
        match &self.stopping {
            None => self.queue.has_chains_to_resubmit(),
            // A client that stopped it expects them done; one that died has them on record.
            Some(stopping) => stopping.reply.is_some() && self.queue.has_chains_to_resubmit(),
        }
    }

    pub(super) fn token(&self, kind: Kind) -> Token {
        token(self.index, kind)
    }

    pub(super) fn arm_kick(&mut self, ring: &mut Ring) -> Result<(), Full> {
        let fd = types::Fd(self.kick.as_raw_fd());
        let sqe = opcode::Read::new(fd, std::ptr::from_mut(&mut *self.count).cast(), 8).build();
        // SAFETY: a vring is dropped only after its operations completed, or with the thread,
        // which drains its ring first. Until then `count` and the descriptor stay.
        unsafe { ring.push(sqe, self.token(Kind::Kick))? };
        self.kick_armed = true;
        Ok(())
    }

    /// Notifies the driver if it is due and no notification is in flight.
    pub(super) fn call(&mut self, ring: &mut Ring) -> Result<(), Full> {
        // One that was cancelled, because the client does not take it and the vring is to go, is not begun again.
        let cancelled = (self.stopping.as_ref()).is_some_and(|stopping| stopping.cancelled);
        if !self.call_due || self.call_armed || cancelled {
            return Ok(());
        }
        let Some(call) = self.call.as_ref() else {
            // Kept for the descriptor that may come.
            return Ok(());
        };
        let flags = *self.call_flags.get_or_insert_with(|| write_flags(call));
        let sqe = write_one(call).flags(flags);
        // SAFETY: `ONE` lives for ever. The descriptor stays open until the operation completed:
        // `replace_call` keeps it in `calling`.
        unsafe { ring.push(sqe, self.token(Kind::Call))? };
        self.call_armed = true;
        self.call_due = false;
        Ok(())
    }

    pub(super) fn replace_call(
        &mut self,
        ring: &mut Ring,
        call: Option<OwnedFd>,
    ) -> Result<(), Full> {
        let old = std::mem::replace(&mut self.call, call);
        self.call_flags = None;
        if self.call_armed && self.calling.is_none() {
            self.calling = old;
            // It may have gone to the old descriptor, which the client no longer reads.
            self.call_due = true;
            self.cancel_call(ring)?;
        }
        self.call(ring)
    }

    pub(super) fn cancel_call(&mut self, ring: &mut Ring) -> Result<(), Full> {
        if self.call_armed && !self.call_cancelled {
            self.call_cancelled = true;
            ring.cancel(self.token(Kind::Call))?;
        }
        Ok(())
    }

    /// Lets go of the ring's operations. True when none is left.
    pub(super) fn drain(&mut self, ring: &mut Ring) -> Result<bool, Full> {
        let Some(stopping) = &mut self.stopping else {
            return Ok(false);
        };
        // A driver that is only paused must not miss its last notification.
        let paused = stopping.reply.is_some();
        let to_resubmit = paused && !self.broken && self.queue.has_chains_to_resubmit();
        if self.in_flight > 0 || to_resubmit || (paused && self.call_armed && self.call_due) {
            return Ok(false);
        }
        if !stopping.cancelled {
            stopping.cancelled = true;
            if self.kick_armed {
                ring.cancel(token(self.index, Kind::Kick))?;
            }
            if self.error_armed {
                ring.cancel(token(self.index, Kind::Error))?;
            }
            // A write that does not block is done before the kernel comes to this.
            self.cancel_call(ring)?;
        }
        Ok(!self.kick_armed && !self.call_armed && !self.error_armed)
    }
}

pub(super) fn token(index: u16, kind: Kind) -> Token {
    Token {
        owner: Owner::Door,
        kind: kind as u16,
        index: u32::from(index),
    }
}

/// How a call descriptor is written. `io_uring` tries a descriptor that blocks again and again (128
/// times in Linux 6.18) before it hands it to a worker, where it belongs.
///
/// To be asked at the first notification: clients are known to change the mode of a descriptor after
/// they sent it. Pipes and sockets say at once when they would block.
fn write_flags(call: &OwnedFd) -> squeue::Flags {
    let blocks = fcntl_getfl(call).is_ok_and(|flags| !flags.contains(OFlags::NONBLOCK));
    let is_stream = fstat(call).is_ok_and(|stat| {
        let kind = FileType::from_raw_mode(stat.st_mode);
        matches!(kind, FileType::Fifo | FileType::Socket)
    });
    if blocks && !is_stream {
        squeue::Flags::ASYNC
    } else {
        squeue::Flags::empty()
    }
}

pub(super) fn write_one(fd: &OwnedFd) -> squeue::Entry {
    opcode::Write::new(types::Fd(fd.as_raw_fd()), (&raw const ONE).cast(), 8).build()
}
