//! Messages from other threads to a queue thread, and the eventfd that wakes its ring.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::{opcode, types};
use rustix::event::{EventfdFlags, eventfd};

use crate::io::{Full, Owner, Ring, Token};

struct Shared<M> {
    messages: Mutex<VecDeque<M>>,
    bell: OwnedFd,
}

impl<M> Shared<M> {
    fn messages(&self) -> MutexGuard<'_, VecDeque<M>> {
        // A sender that panicked has pushed its message or has not: the queue is whole either way.
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending side; clone it freely.
pub struct Sender<M>(Arc<Shared<M>>);

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M> fmt::Debug for Sender<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

impl<M> Sender<M> {
    /// Leaves a message and wakes the thread.
    pub fn send(&self, message: M) {
        self.0.messages().push_back(message);
        // The write fails only if the counter is at its end, and then the bell is ringing anyway.
        let _ = rustix::io::write(&self.0.bell, &1u64.to_ne_bytes());
    }
}

/// The receiving side; belongs to one ring.
pub struct Mailbox<M> {
    shared: Arc<Shared<M>>,
    /// Where the kernel puts the bell's counter. On the heap: its address must not change.
    count: Box<u64>,
}

impl<M> Mailbox<M> {
    /// An empty mailbox and its sending side.
    ///
    /// # Errors
    ///
    /// When no eventfd can be had.
    pub fn new() -> io::Result<(Sender<M>, Self)> {
        let shared = Arc::new(Shared {
            messages: Mutex::new(VecDeque::new()),
            bell: eventfd(0, EventfdFlags::CLOEXEC)?,
        });
        let mailbox = Self {
            shared: Arc::clone(&shared),
            count: Box::new(0),
        };
        Ok((Sender(shared), mailbox))
    }

    /// Listens for the bell. To be called once at first and again after each bell.
    ///
    /// # Errors
    ///
    /// [`Full`] when the ring takes nothing more.
    pub fn arm(&mut self, ring: &mut Ring) -> Result<(), Full> {
        let bell = types::Fd(self.shared.bell.as_raw_fd());
        let sqe = opcode::Read::new(bell, std::ptr::from_mut(&mut *self.count).cast(), 8);
        // SAFETY: `count` is on the heap and the thread drains its ring before it drops the
        // mailbox.
        unsafe { ring.push(sqe.build(), Self::TOKEN) }
    }

    /// The next message.
    #[must_use]
    pub fn take(&mut self) -> Option<M> {
        self.shared.messages().pop_front()
    }

    const TOKEN: Token = Token {
        owner: Owner::Mailbox,
        kind: 0,
        index: 0,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_wakes_a_sleeping_ring() {
        let mut ring = Ring::new(8).unwrap();
        let (sender, mut mailbox) = Mailbox::new().unwrap();
        mailbox.arm(&mut ring).unwrap();
        let other = std::thread::spawn(move || sender.send(7));
        ring.submit_and_wait(1).unwrap();
        let mut out = Vec::with_capacity(8);
        ring.reap(&mut out);
        assert_eq!(out[0].token.owner, Owner::Mailbox);
        assert_eq!(mailbox.take(), Some(7));
        assert_eq!(mailbox.take(), None);
        other.join().unwrap();
    }
}
