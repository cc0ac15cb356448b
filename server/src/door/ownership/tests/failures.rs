//! Notes that cannot be written, and timers: those that cannot be had, and those that are over.

use std::io;

use super::super::note::{Machine, Note};
use super::*;
use crate::engine::process::Process;

/// A machine that says of a note that was written that it was not, and has no timers then.
#[derive(Clone, Default)]
struct Failing {
    note: Arc<Mutex<Note>>,
    fails: Arc<AtomicBool>,
    /// Each timer has it.
    timers: Arc<()>,
}

impl Failing {
    /// The client that has the disk, as it is noted.
    fn noted(&self) -> Option<String> {
        Some(self.read_note().holder?.name)
    }

    fn timers(&self) -> usize {
        Arc::strong_count(&self.timers)
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

    fn call_after(&self, _: Duration, _: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Send>> {
        match self.fails.load(Ordering::Relaxed) {
            true => Err(io::Error::other("no thread")),
            false => Ok(Box::new(Arc::clone(&self.timers))),
        }
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

#[test]
fn a_wait_that_has_ended_leaves_no_timer() {
    let machine = Failing::default();
    let access = Ownership::on(Box::new(machine.clone()), "e", false, LONG);
    access.open(None);
    let idle = machine.timers();
    for _ in 0..3 {
        drop(access.take(client("a")).unwrap());
        assert_eq!(machine.timers(), idle + 1);
        drop(access.take(client("a")).unwrap());
    }
    access.take(client("a")).unwrap().leave();
    assert_eq!(machine.timers(), idle);
}

#[test]
fn the_disk_is_not_kept_where_no_timer_can_be_had() {
    let machine = Failing::default();
    let access = Ownership::on(Box::new(machine.clone()), "e", false, LONG);
    let door = Arc::new(Door::default());
    access.open(Some(Arc::<Door>::clone(&door)));
    let hold = access.take(client("a")).unwrap();
    machine.fails.store(true, Ordering::Relaxed);
    drop(hold);
    assert_eq!(access.state(), OwnershipState::Block);
    assert_eq!(door.diary().last(), Some(&"open"));
}
