//! Notes that cannot be written, and timers that cannot be had.

use std::io;

use super::super::note::{Machine, Note};
use super::*;
use crate::engine::process::Process;

/// A machine that says of a note that was written that it was not.
#[derive(Clone, Default)]
struct Failing {
    note: Arc<Mutex<Note>>,
    fails: Arc<AtomicBool>,
}

impl Failing {
    /// The client that has the disk, as it is noted.
    fn noted(&self) -> Option<String> {
        Some(self.read_note().holder?.name)
    }
}

impl Machine for Failing {
    fn read_note(&self) -> Note {
        self.note.lock().unwrap().clone()
    }

    fn write_note(&self, note: &Note) -> io::Result<()> {
        *self.note.lock().unwrap() = note.clone();
        match self.fails.load(Ordering::Relaxed) {
            true => Err(io::Error::other("it cannot be made durable")),
            false => Ok(()),
        }
    }

    fn call_after(&self, _: Duration, _: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        Ok(())
    }

    fn is_running(&self, _: Process) -> bool {
        true
    }
}

#[test]
fn a_note_of_which_nothing_is_known_is_written_again() {
    let machine = Failing::default();
    let access = Ownership::on(Box::new(machine.clone()), "e", false, LONG);
    access.open(None);
    drop(access.take(client("a")).unwrap());
    machine.fails.store(true, Ordering::Relaxed);
    let refused = access.take(client("b")).unwrap_err();
    assert!(matches!(refused, Refused::Note(_)), "{refused}");
    assert_eq!(machine.noted().as_deref(), Some("b"));
    machine.fails.store(false, Ordering::Relaxed);
    // The note that it had before.
    let _hold = access.take(client("a")).unwrap();
    assert_eq!(machine.noted().as_deref(), Some("a"));
}

#[test]
fn a_target_that_does_not_get_the_disk_does_not_keep_it_from_other_servers() {
    let machine = Failing::default();
    let access = Ownership::on(Box::new(machine.clone()), "e", false, LONG);
    let store = Arc::new(Store::default());
    access.allow_moves(Some(Arc::<Store>::clone(&store)));
    access.open(None);
    let source = access.take(client("source")).unwrap();
    source.rest(true);
    drop(source);
    assert_eq!(access.state(), OwnershipState::Waiting);
    machine.fails.store(true, Ordering::Relaxed);
    assert!(access.take(client("target")).is_err());
    assert!(!store.claimed.load(Ordering::Relaxed));
}
