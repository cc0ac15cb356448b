//! The producer's side of the negotiation for a ring. It goes on beside writes to the pipe.

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::param::page_size;
use upgrade_proto::Listener;

use super::Producer;
use crate::channel::{Channel, ControlChannel, Message, Received, service};
use crate::handle::Phase;
use crate::kernel::{PendingRing, Side};
use crate::memfd;
use crate::memory::{Memory, Role, control};

/// How far the negotiation is.
#[derive(Debug, Default)]
pub(super) enum Step {
    /// No consumer has connected.
    #[default]
    Idle,
    /// The kernel has a ring; the consumer has not asked for it, or another process uses this side.
    KernelPending(PendingRing),
    /// OFFER was sent; READY has not arrived.
    Offered(ControlChannel, Memory),
    /// READY has arrived; SWITCH follows when the queue is in the pipe.
    Ready(ControlChannel, Memory),
}

impl Producer {
    /// Asks the kernel for a ring, or else listens for consumers. A pipe that can have no service, or has one of
    /// another producer already, stays a pipe, and so does one that takes messages of errors.
    pub(super) fn offer(&mut self) {
        let pipe = &self.handle.pipe;
        if pipe.is_standard_error() {
            return;
        }
        if let Some(ring) = pipe.ask_for_kernel_ring(Role::Producer) {
            self.handle.phase = Phase::Pipe(Step::KernelPending(ring));
        } else if pipe.options.shared {
            let bind = |name| Listener::bind(&pipe.fd, &name, &pipe.options.offer);
            let listener = service().and_then(bind).ok();
            self.listener = listener.filter(|listener| pipe.watch(listener).is_ok());
        }
    }

    /// Takes the next step, if the other end has taken its own. The last one waits until the queue is empty.
    pub(super) fn advance(&mut self) -> io::Result<()> {
        let is_sent = self.queue.is_empty();
        let Phase::Pipe(step) = &mut self.handle.phase else {
            return Ok(());
        };
        let next = match mem::take(step) {
            Step::Idle => self.accept(),
            Step::KernelPending(ring) => match ring.state() {
                control::LIVE if is_sent => match ring.map() {
                    Ok(memory) => {
                        return self.handle.start(memory, Channel::Kernel(Side::Write));
                    }
                    Err(Errno::BUSY) => Step::KernelPending(ring),
                    Err(_) => Step::Idle,
                },
                control::PENDING | control::LIVE => Step::KernelPending(ring),
                _ => {
                    self.handle.phase = Phase::Dead;
                    return Ok(());
                }
            },
            Step::Offered(channel, mut memory) => match self.handle.pipe.receive(&channel) {
                Received::Nothing => Step::Offered(channel, memory),
                Received::Message(Message::Ready, Some(page)) if map_page(&mut memory, &page) => {
                    self.handle.phase = Phase::Pipe(Step::Ready(channel, memory));
                    return self.advance();
                }
                Received::Gone | Received::Message(..) => self.disconnect()?,
            },
            Step::Ready(channel, memory) if is_sent => {
                self.handle.pipe.counters.system_calls += 1;
                match channel.send(Message::Switch, None) {
                    true => {
                        self.handle.start(memory, Channel::Socket(channel))?;
                        // Free space in the pipe does not matter now; its hang-up does.
                        return self.handle.pipe.watch_pipe(EventFlags::empty());
                    }
                    false => self.disconnect()?,
                }
            }
            Step::Ready(channel, memory) => match self.handle.pipe.receive(&channel) {
                Received::Nothing => Step::Ready(channel, memory),
                Received::Gone | Received::Message(..) => self.disconnect()?,
            },
        };
        self.handle.phase = Phase::Pipe(next);
        Ok(())
    }

    /// Accepts a consumer and offers it a ring. One at a time: others wait in the backlog.
    fn accept(&mut self) -> Step {
        let Some(listener) = &self.listener else {
            return Step::Idle;
        };
        let pipe = &mut self.handle.pipe;
        pipe.counters.system_calls += 1;
        let connection = match listener.accept() {
            Ok(Some(connection)) => connection,
            Ok(None) => return Step::Idle,
            Err(_) => {
                // It would be ready for ever, and no consumer could connect.
                self.listener = None;
                return Step::Idle;
            }
        };
        let channel = ControlChannel::new(connection.into_stream());
        let size = pipe.options.size_bytes;
        let Ok((file, memory)) = memfd::create_ring(size) else {
            return Step::Idle;
        };
        pipe.counters.system_calls += 1;
        let offered = channel.send(Message::Offer(size.into()), Some(file.as_fd()));
        match offered && pipe.watch(&channel).is_ok() && pipe.unwatch(listener).is_ok() {
            true => Step::Offered(channel, memory),
            false => Step::Idle,
        }
    }

    /// Back to the pipe alone, until another consumer connects.
    fn disconnect(&self) -> io::Result<Step> {
        if let Some(listener) = &self.listener {
            self.handle.pipe.watch(listener)?;
        }
        Ok(Step::Idle)
    }

    /// The consumer is gone: what it has not taken goes to the pipe, and so does everything after.
    pub(super) fn leave_ring(&mut self) -> io::Result<()> {
        let Phase::Ring(ring) = &mut self.handle.phase else {
            return Ok(());
        };
        let taken = ring.take_back(&mut self.queue);
        self.handle.check(taken)?;
        self.handle.phase = Phase::Pipe(self.disconnect()?);
        self.writes = 0;
        self.handle.pipe.watch_pipe(EventFlags::OUT)
    }
}

/// Maps the consumer's index page, if it is valid; whether it is.
fn map_page(memory: &mut Memory, page: &OwnedFd) -> bool {
    memfd::is_fit(page, page_size() as u64) && memory.map_consumer(page.as_fd()).is_ok()
}
