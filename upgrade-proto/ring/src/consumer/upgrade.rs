//! The consumer's side of the negotiation for a ring. It goes on beside reads from the pipe.

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, ioctl_fionread};
use rustix::param::page_size;
use upgrade_proto::{Answer, connect};

use super::Consumer;
use crate::channel::{Channel, ControlChannel, Message, Received, service};
use crate::handle::Phase;
use crate::kernel::{PendingRing, Side};
use crate::memfd;
use crate::memory::{Memory, Pieces, Role, control};

/// A consumer connects again after so many bytes from the pipe, then after twice as many, and so on.
const BYTES_PER_TRY: u64 = 64 << 10;

/// How far the negotiation is.
#[derive(Debug, Default)]
pub(super) enum Step {
    /// No producer offers a ring.
    #[default]
    Idle,
    /// The kernel has a ring; the producer has not asked for it, or another process uses this side.
    KernelPending(PendingRing),
    /// Connected; OFFER has not arrived.
    Connected(ControlChannel),
    /// READY was sent; SWITCH has not arrived.
    Mapped(ControlChannel, Memory),
    /// SWITCH has arrived; so many bytes are left in the pipe.
    Draining(ControlChannel, Memory, u64),
}

impl Consumer {
    /// Takes the next step, if the other end has taken its own.
    pub(super) fn advance(&mut self) -> io::Result<()> {
        let Phase::Pipe(step) = &mut self.handle.phase else {
            return Ok(());
        };
        let next = match mem::take(step) {
            Step::Idle => self.try_connect(),
            Step::KernelPending(ring) => match ring.state() {
                control::PENDING => Step::KernelPending(ring),
                control::LIVE => match ring.map() {
                    Ok(memory) => return self.handle.start(memory, Channel::Kernel(Side::Read)),
                    Err(Errno::BUSY) => Step::KernelPending(ring),
                    Err(_) => Step::Idle,
                },
                _ => {
                    self.handle.phase = Phase::Dead;
                    return Ok(());
                }
            },
            Step::Connected(channel) => match self.handle.pipe.receive(&channel) {
                Received::Nothing => Step::Connected(channel),
                Received::Message(Message::Offer(size), Some(file)) => {
                    match self.accept(size, &channel, &file) {
                        Some(memory) => Step::Mapped(channel, memory),
                        None => self.disconnect()?,
                    }
                }
                Received::Gone | Received::Message(..) => self.disconnect()?,
            },
            Step::Mapped(channel, memory) => match self.handle.pipe.receive(&channel) {
                Received::Nothing => Step::Mapped(channel, memory),
                Received::Message(Message::Switch, _) => {
                    // All that the producer wrote to the pipe is among these bytes.
                    self.handle.pipe.counters.system_calls += 1;
                    let left = ioctl_fionread(&self.handle.pipe.fd)?;
                    self.handle.phase = Phase::Pipe(Step::Draining(channel, memory, left));
                    return self.advance();
                }
                Received::Gone | Received::Message(..) => self.disconnect()?,
            },
            Step::Draining(channel, memory, 0) => {
                return self.handle.start(memory, Channel::Socket(channel));
            }
            draining => draining,
        };
        self.handle.phase = Phase::Pipe(next);
        Ok(())
    }

    /// Connects if the producer offers a ring. Tried at the beginning, when the first bytes were read (a
    /// producer offers before it writes), and then ever more rarely.
    fn try_connect(&mut self) -> Step {
        let pipe = &mut self.handle.pipe;
        if !self.may_have_ring || !pipe.options.shared || self.pipe_bytes < self.next_try {
            return Step::Idle;
        }
        self.next_try = match self.pipe_bytes {
            0 => 1,
            bytes => bytes + bytes.max(BYTES_PER_TRY),
        };
        pipe.counters.system_calls += 1;
        let lookup = &pipe.options.lookup;
        let connected = service().and_then(|name| connect(&pipe.fd, &name, lookup));
        if let Ok(Answer::Found(connection)) = connected {
            let channel = ControlChannel::new(connection.into_stream());
            if pipe.watch(&channel).is_ok() {
                return Step::Connected(channel);
            }
        }
        Step::Idle
    }

    /// Maps the memory that was offered, if it is valid, and sends READY.
    fn accept(&mut self, size: u64, channel: &ControlChannel, file: &OwnedFd) -> Option<Memory> {
        let pipe = &mut self.handle.pipe;
        pipe.counters.system_calls += 1;
        if !Memory::is_size(size) || size > pipe.options.size_bytes.into() {
            return None;
        }
        let size = u32::try_from(size).ok()?;
        if !memfd::is_fit(file, Memory::file_bytes(size)) {
            return None;
        }
        let page = memfd::create(page_size() as u64).ok()?;
        let pieces = Pieces {
            main: file.as_fd(),
            consumer: Some((page.as_fd(), 0)),
            own: false,
        };
        let memory = Memory::map(Role::Consumer, size, &pieces).ok()?;
        memfd::seal(&page).ok()?;
        let sent = channel.send(Message::Ready, Some(page.as_fd()));
        sent.then_some(memory)
    }

    /// Back to the pipe alone, which is polled again if it was not.
    fn disconnect(&self) -> io::Result<Step> {
        self.handle.pipe.watch_pipe(EventFlags::IN)?;
        Ok(Step::Idle)
    }

    /// The producer is gone and its ring is empty: the pipe goes on, perhaps with another producer.
    pub(super) fn leave_ring(&mut self) -> io::Result<()> {
        self.next_try = self.pipe_bytes + 1;
        self.handle.phase = Phase::Pipe(Step::Idle);
        self.handle.pipe.watch_pipe(EventFlags::IN)
    }
}
