//! The block door's writes, shut off while a vhost client has the disk.
//!
//! Each queue thread keeps its own [`Writes`]: nothing is shared with others and nothing is atomic
//! on the way of a request. [`WriteGate`] tells all queues through their mailboxes.

use std::fs;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::queue::Command;
use crate::door::ownership::BlockDoor;
use crate::engine::mailbox;
use crate::request::IoError;

/// Whether a queue takes writes, and how many it has under way.
#[derive(Debug)]
pub(super) struct Writes {
    refused: bool,
    running: u32,
    /// Who waits for the last of them.
    waiting: Vec<mpsc::Sender<()>>,
}

impl Writes {
    /// None is under way.
    pub(super) fn new(refused: bool) -> Self {
        Self {
            refused,
            running: 0,
            waiting: Vec::new(),
        }
    }

    /// A write is about to begin.
    pub(super) fn begin(&mut self) -> Result<(), IoError> {
        if self.refused {
            return Err(IoError::Conflict);
        }
        self.running += 1;
        Ok(())
    }

    /// A write that began has ended.
    pub(super) fn end(&mut self) {
        self.running -= 1;
        self.tell();
    }

    /// No more writes; `drained` hears of it when none is under way.
    pub(super) fn refuse(&mut self, drained: mpsc::Sender<()>) {
        self.refused = true;
        self.waiting.push(drained);
        self.tell();
    }

    /// Writes are welcome again.
    pub(super) fn accept(&mut self) {
        self.refused = false;
        self.waiting.clear();
    }

    fn tell(&mut self) {
        if self.running == 0 {
            for drained in self.waiting.drain(..) {
                // Who waits no longer needs no answer.
                let _ = drained.send(());
            }
        }
    }
}

/// All queues of a device, for switching their writes off and on.
#[derive(Debug)]
pub(super) struct WriteGate {
    id: u32,
    queues: Vec<mailbox::Sender<Command>>,
}

impl WriteGate {
    pub(super) fn new(id: u32, queues: Vec<mailbox::Sender<Command>>) -> Self {
        Self { id, queues }
    }

    fn await_drained(&self, limit: Duration) -> Result<(), String> {
        let drained: Vec<_> = self
            .queues
            .iter()
            .map(|queue| {
                let (reply, drained) = mpsc::channel();
                queue.send(Command::RefuseWrites(reply));
                drained
            })
            .collect();
        let deadline = Instant::now() + limit;
        for (queue, drained) in drained.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            drained.recv_timeout(left).map_err(|error| match error {
                RecvTimeoutError::Timeout => format!(
                    "writes of queue {queue} of /dev/ublkb{} did not end within {} s",
                    self.id,
                    limit.as_secs()
                ),
                RecvTimeoutError::Disconnected => {
                    format!("queue {queue} of /dev/ublkb{} has ended", self.id)
                }
            })?;
        }
        Ok(())
    }
}

impl BlockDoor for WriteGate {
    fn close(&self, limit: Duration) -> Result<(), String> {
        self.await_drained(limit).inspect_err(|_| self.open())
    }

    fn open(&self) {
        for queue in &self.queues {
            queue.send(Command::AcceptWrites);
        }
    }

    fn in_use(&self) -> Option<String> {
        let (major, minor) = disk_number(self.id)?;
        upgrade_proto::disk_user(major, minor)
    }
}

/// Major and minor number of `/dev/ublkbN`, from sysfs: the server never opens its own disk.
pub(super) fn disk_number(id: u32) -> Option<(u32, u32)> {
    let text = fs::read_to_string(format!("/sys/block/ublkb{id}/dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The sequence number of the disk with this id: no other disk ever has it, until the next boot.
pub(super) fn disk_sequence(id: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/sys/block/ublkb{id}/diskseq")).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_shuts_writes_off_hears_when_the_last_of_them_ended() {
        let mut writes = Writes::new(false);
        writes.begin().unwrap();
        writes.begin().unwrap();
        let (reply, drained) = mpsc::channel();
        writes.refuse(reply);
        writes.end();
        assert!(drained.try_recv().is_err(), "one is still under way");
        assert_eq!(writes.begin(), Err(IoError::Conflict));
        writes.end();
        assert_eq!(drained.try_recv(), Ok(()));
        writes.accept();
        assert_eq!(writes.begin(), Ok(()));
    }

    #[test]
    fn without_writes_the_answer_comes_at_once() {
        let mut writes = Writes::new(false);
        let (reply, drained) = mpsc::channel();
        writes.refuse(reply);
        assert_eq!(drained.try_recv(), Ok(()));
    }

    #[test]
    fn a_queue_that_is_gone_cannot_be_drained() {
        let (sender, mailbox) = mailbox::Mailbox::new().unwrap();
        let fence = WriteGate::new(0, vec![sender]);
        let queue = std::thread::spawn(move || {
            let mut mailbox = mailbox;
            // Takes the question and ends without an answer.
            while mailbox.take().is_none() {
                std::thread::yield_now();
            }
        });
        let error = fence.close(Duration::from_secs(30)).unwrap_err();
        assert!(error.contains("has ended"), "{error}");
        queue.join().unwrap();
    }

    #[test]
    fn a_queue_that_does_not_answer_is_told_to_go_on() {
        let (sender, mut mailbox) = mailbox::Mailbox::new().unwrap();
        let fence = WriteGate::new(0, vec![sender]);
        let error = fence.close(Duration::from_millis(20)).unwrap_err();
        assert!(error.contains("did not end"), "{error}");
        assert!(matches!(mailbox.take(), Some(Command::RefuseWrites(_))));
        assert!(matches!(mailbox.take(), Some(Command::AcceptWrites)));
    }
}
