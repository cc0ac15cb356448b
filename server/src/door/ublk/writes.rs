//! The writes of one queue: how many are under way, and whether it takes more.
//!
//! Each queue thread keeps its own: nothing is shared with others and nothing is atomic on the way of
//! a request.

use std::sync::mpsc;

use crate::request::IoError;

/// Whether a queue takes writes, and how many it has under way.
#[derive(Debug)]
pub(super) struct Writes {
    refused: bool,
    running: u32,
    /// The senders for the threads that wait for the last of them.
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

    /// Whether another thread waits for those under way to end.
    pub(super) fn drain(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn tell(&mut self) {
        if self.running == 0 {
            for drained in self.waiting.drain(..) {
                // A receiver that no longer waits needs no answer.
                let _ = drained.send(());
            }
        }
    }
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
        assert!(!writes.drain());
        writes.refuse(reply);
        writes.end();
        assert!(drained.try_recv().is_err(), "one is still under way");
        assert!(writes.drain());
        assert_eq!(writes.begin(), Err(IoError::Conflict));
        writes.end();
        assert_eq!(drained.try_recv(), Ok(()));
        assert!(!writes.drain());
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
}
