//! Messages from other threads to a queue thread, and the eventfd that wakes its ring.
//!
//! A mailbox closes when its receiver is dropped. Messages that were not taken are dropped then, so that
//! reply channels inside them hang up, and later ones are handed back to their senders.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::{opcode, types};
use rustix::event::{EventfdFlags, eventfd};

use crate::io::{Full, Owner, Ring, Token};

struct Shared<M> {
    /// `None` once the receiver is gone.
    messages: Mutex<Option<VecDeque<M>>>,
    bell: OwnedFd,
}

impl<M> Shared<M> {
    fn messages(&self) -> MutexGuard<'_, Option<VecDeque<M>>> {
        // A sender that panicked has pushed its message or has not: the queue is whole either way.
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message that was not delivered, because its receiver has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undelivered<M>(pub M);

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
    /// Leaves a message and wakes the thread. The thread may still end without taking it: the
    /// message is dropped then.
    ///
    /// # Errors
    ///
    /// [`Undelivered`] with the message when the receiver is gone.
    pub fn send(&self, message: M) -> Result<(), Undelivered<M>> {
        match self.0.messages().as_mut() {
            Some(messages) => messages.push_back(message),
            None => return Err(Undelivered(message)),
        }
        // The write fails only if the counter is at its end, and then the eventfd is readable already.
        let _ = rustix::io::write(&self.0.bell, &1u64.to_ne_bytes());
        Ok(())
    }
}

/// The receiving side; belongs to one ring. Dropping it closes the mailbox.
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
            messages: Mutex::new(Some(VecDeque::new())),
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
        self.shared.messages().as_mut()?.pop_front()
    }

    /// Takes no more messages and drops those that wait.
    pub fn close(&mut self) {
        let waiting = self.shared.messages().take();
        // Outside of the lock: dropping a message may run anything.
        drop(waiting);
    }

    const TOKEN: Token = Token {
        owner: Owner::Mailbox,
        kind: 0,
        index: 0,
    };
}

impl<M> Drop for Mailbox<M> {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, RecvTimeoutError};
    use std::time::Duration;

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
        other.join().unwrap().unwrap();
        assert!(ring.drain(Duration::from_secs(10), None));
    }

    #[test]
    fn a_message_to_a_receiver_that_is_gone_comes_back() {
        let (sender, mailbox) = Mailbox::new().unwrap();
        drop(mailbox);
        assert_eq!(sender.send("late"), Err(Undelivered("late")));
    }

    #[test]
    fn a_reply_channel_hangs_up_when_the_receiver_goes_without_taking_the_message() {
        let (sender, mailbox) = Mailbox::<mpsc::Sender<()>>::new().unwrap();
        let (reply, answer) = mpsc::channel();
        sender.send(reply).unwrap();
        drop(mailbox);
        let heard = answer.recv_timeout(Duration::from_secs(10));
        assert_eq!(heard, Err(RecvTimeoutError::Disconnected));
    }
}
