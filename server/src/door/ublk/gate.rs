//! The gate for the ublk door's writes, closed while a vhost client has the disk.
//!
//! All queues are told through their mailboxes; each keeps count of its own writes
//! ([`Writes`](super::writes::Writes)).

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::paths::disk_number;
use super::queue::Command;
use crate::door::ownership::BlockDoor;
use crate::engine::mailbox;

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
        let drained = await_all(&self.queues, limit, Command::RefuseWrites);
        drained.map_err(|(queue, error)| match error {
            RecvTimeoutError::Timeout => format!(
                "writes of queue {queue} of /dev/ublkb{} did not end within {} s",
                self.id,
                limit.as_secs()
            ),
            RecvTimeoutError::Disconnected => {
                format!("queue {queue} of /dev/ublkb{} has ended", self.id)
            }
        })
    }
}

/// Gives all queues a command with a sender for the answer, and waits until all have answered. The error names the
/// first queue that did not.
pub(super) fn await_all(
    queues: &[mailbox::Sender<Command>],
    limit: Duration,
    command: impl Fn(mpsc::Sender<()>) -> Command,
) -> Result<(), (u16, RecvTimeoutError)> {
    let ask = |queue: &mailbox::Sender<Command>| {
        let (reply, answer) = mpsc::channel();
        // One that has ended drops the reply channel, which hangs up.
        let _ = queue.send(command(reply));
        answer
    };
    let answers: Vec<_> = queues.iter().map(ask).collect();
    let deadline = Instant::now() + limit;
    for (queue, answer) in (0..).zip(&answers) {
        let left = deadline.saturating_duration_since(Instant::now());
        answer.recv_timeout(left).map_err(|error| (queue, error))?;
    }
    Ok(())
}

impl BlockDoor for WriteGate {
    fn close(&self, limit: Duration) -> Result<(), String> {
        self.await_drained(limit).inspect_err(|_| self.open())
    }

    fn open(&self) {
        for queue in &self.queues {
            // One that has ended accepts nothing any more; its device is being removed.
            let _ = queue.send(Command::AcceptWrites);
        }
    }

    fn in_use(&self) -> Option<String> {
        let (major, minor) = disk_number(self.id)?;
        upgrade_proto::disk_user(major, minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_has_ended_or_ends_fails_the_drain_at_once() {
        let begun = Instant::now();
        let (sender, mailbox) = mailbox::Mailbox::new().unwrap();
        let gate = WriteGate::new(0, vec![sender]);
        let queue = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(mailbox);
        });
        for _ in 0..2 {
            let error = gate.close(Duration::from_secs(30)).unwrap_err();
            assert!(error.contains("has ended"), "{error}");
        }
        assert!(begun.elapsed() < Duration::from_secs(10));
        queue.join().unwrap();
    }

    #[test]
    fn a_queue_that_does_not_answer_is_told_to_go_on() {
        let (sender, mut mailbox) = mailbox::Mailbox::new().unwrap();
        let gate = WriteGate::new(0, vec![sender]);
        let error = gate.close(Duration::from_millis(20)).unwrap_err();
        assert!(error.contains("did not end"), "{error}");
        assert!(matches!(mailbox.take(), Some(Command::RefuseWrites(_))));
        assert!(matches!(mailbox.take(), Some(Command::AcceptWrites)));
    }
}
