//! The vrings of a queue thread, driven step by step by a fuzz target.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use super::memory::{GuestMemory, PageLog};
use super::record::RecordQueue;
use crate::door::vhost::connection::Connection;
use crate::door::vhost::queue::{Command, VhostQueues};
use crate::door::vhost::ring_layout::RingAddresses;
use crate::door::vhost::vring::{Start, Stopped};
use crate::engine::counters::CounterSet;
use crate::engine::{DoorQueue, Next};
use crate::io::{Completion, Ring, Slot};
use crate::request::{Limits, Outcome, Request};

/// A vring as a client describes it.
#[derive(Debug)]
#[allow(missing_docs, reason = "the words of the vhost-user specification")]
pub struct Vring {
    pub index: u16,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub base: u16,
    pub features: u64,
    pub kick: OwnedFd,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
    /// Where the used ring is for the log of dirty pages.
    pub used_guest: Option<u64>,
    pub record: Option<RecordQueue>,
}

/// What a queue thread serves, without the thread.
pub struct Queues {
    door: VhostQueues,
    completions: Vec<Completion>,
    connection: Arc<Connection>,
}

/// A vring that was told to stop: its next available index comes when nothing of it is in flight.
pub struct Stopping(Receiver<Stopped>);

impl Stopping {
    /// The index, if the vring has stopped.
    #[must_use]
    pub fn base(&self) -> Option<u16> {
        self.0.try_recv().ok().map(|stopped| stopped.base)
    }
}

impl Queues {
    /// Without vrings.
    ///
    /// # Errors
    ///
    /// When there is no descriptor for it.
    pub fn new(limits: Limits) -> io::Result<Self> {
        let (stream, _client) = UnixStream::pair()?;
        let connection = Arc::new(Connection::new("fuzz", 1, None, limits, stream));
        let counters = CounterSet::default().register();
        Ok(Self {
            door: VhostQueues::new(Arc::clone(&connection), counters, 1),
            completions: Vec::with_capacity(64),
            connection,
        })
    }

    /// A ring that has room for what the vrings put on it.
    ///
    /// # Errors
    ///
    /// When the kernel has none.
    pub fn ring() -> io::Result<Ring> {
        Ring::new(2048)
    }

    fn ask<R>(&mut self, ring: &mut Ring, command: impl FnOnce(Sender<R>) -> Command) -> Option<R> {
        let (sender, answer) = mpsc::channel();
        self.door.command(ring, command(sender));
        answer.try_recv().ok()
    }

    /// Starts a vring; whether it could be.
    pub fn start(
        &mut self,
        ring: &mut Ring,
        vring: Vring,
        memory: &GuestMemory,
        log: Option<&PageLog>,
    ) -> bool {
        let start = Box::new(Start {
            index: vring.index,
            size: vring.size,
            addresses: RingAddresses {
                descriptors: vring.descriptors,
                available: vring.available,
                used: vring.used,
            },
            base: vring.base,
            features: vring.features,
            kick: vring.kick,
            call: vring.call,
            error: vring.error,
            map: Arc::clone(&memory.0),
            logging: log.map(|log| log.0.clone()),
            used_guest: vring.used_guest,
            inflight: vring.record.map(RecordQueue::into_inner),
        });
        let started = self.ask(ring, |reply| Command::Start(start, reply));
        matches!(started, Some(Ok(())))
    }

    /// Tells a vring to stop.
    pub fn stop(&mut self, ring: &mut Ring, index: u16) -> Stopping {
        let (sender, stopped) = mpsc::channel();
        self.door.command(ring, Command::Stop(index, sender));
        Stopping(stopped)
    }

    /// Takes chains from a vring, or leaves them there.
    pub fn enable(&mut self, ring: &mut Ring, index: u16, on: bool) {
        self.ask(ring, |reply| Command::Enable(index, on, reply));
    }

    /// Notifies through another descriptor.
    pub fn call(&mut self, ring: &mut Ring, index: u16, call: Option<OwnedFd>) {
        self.ask(ring, |reply| Command::Call(index, call, reply));
    }

    /// Uses other memory and another log.
    pub fn use_memory(&mut self, ring: &mut Ring, memory: &GuestMemory, log: Option<&PageLog>) {
        let (map, logging) = (Arc::clone(&memory.0), log.map(|log| log.0.clone()));
        self.ask(ring, |reply| Command::Memory(map, logging, reply));
    }

    /// Marks the used ring in the log, or does not.
    pub fn log_used(&mut self, ring: &mut Ring, index: u16, used_guest: Option<u64>) {
        self.ask(ring, |reply| Command::LogUsed(index, used_guest, reply));
    }

    /// The next request.
    pub fn next(&mut self, ring: &mut Ring) -> Option<(Slot, Request)> {
        self.door.next(ring)
    }

    /// Answers a request.
    pub fn complete(&mut self, ring: &mut Ring, slot: Slot, request: Request, outcome: Outcome) {
        self.door.complete(ring, slot, request, outcome);
    }

    /// Publishes the answers of a round.
    pub fn end_batch(&mut self, ring: &mut Ring) -> Next {
        self.door.end_batch(ring)
    }

    /// What a thread does before it sleeps.
    pub fn listen(&mut self, ring: &mut Ring) -> bool {
        !self.door.has_work() && self.door.listen(ring)
    }

    /// Lets the kernel do what is on the ring, waits for `want` completions, and hands over those that are there.
    ///
    /// # Errors
    ///
    /// When the ring is broken.
    pub fn take_completions(&mut self, ring: &mut Ring, want: usize) -> io::Result<()> {
        ring.submit_and_wait(want)?;
        self.completions.clear();
        ring.reap(&mut self.completions);
        for at in 0..self.completions.len() {
            let completion = self.completions[at];
            if completion.token.owner == crate::io::Owner::Door {
                self.door.event(ring, completion);
            }
        }
        Ok(())
    }

    /// From now on everything ends.
    pub fn exit(&mut self, ring: &mut Ring) {
        self.door.command(ring, Command::Exit);
    }

    /// Why the client was hung up on, if it was.
    #[must_use]
    pub fn hung_up(&self) -> Option<&'static str> {
        self.connection.reason()
    }
}
