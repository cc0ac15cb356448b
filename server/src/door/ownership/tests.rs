mod ended;
mod failures;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use upgrade_proto::TrustedDir;

use super::*;
use crate::engine::StorageControl;
use crate::engine::durable::NoteFile;
use crate::request::Limits;

/// A ublk door that keeps a diary, and a lock to hold up its draining.
#[derive(Default)]
struct Door {
    diary: Mutex<Vec<&'static str>>,
    mounted: AtomicBool,
    stuck: AtomicBool,
    draining: Mutex<()>,
}

impl Door {
    fn diary(&self) -> Vec<&'static str> {
        self.diary.lock().unwrap().clone()
    }
}

impl BlockDoor for Door {
    fn close(&self, _limit: Duration) -> Result<(), String> {
        self.diary.lock().unwrap().push("closing");
        if self.stuck.load(Ordering::Relaxed) {
            return Err("stuck".into());
        }
        drop(self.draining.lock().unwrap());
        self.diary.lock().unwrap().push("closed");
        Ok(())
    }

    fn open(&self) {
        self.diary.lock().unwrap().push("open");
    }

    fn in_use(&self) -> Option<String> {
        let mounted = self.mounted.load(Ordering::Relaxed);
        mounted.then(|| "mounted at /x".to_owned())
    }
}

fn client(name: &str) -> Client {
    Client {
        name: name.into(),
        gone: Arc::new(|| false),
        identity: Identity::default(),
    }
}

fn export(grace: Duration) -> (Arc<Ownership>, Arc<Door>) {
    let access = Ownership::new("e", false, grace, None);
    let door = Arc::new(Door::default());
    access.open(Some(Arc::<Door>::clone(&door)));
    (access, door)
}

fn noted_in(folder: &Path) -> ClientNote {
    let file = NoteFile::new(Arc::new(TrustedDir::open(folder).unwrap()), "note");
    ClientNote::new(file, None)
}

const LONG: Duration = Duration::from_secs(3600);

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "it did not happen that {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_disk_goes_to_a_client_and_back_when_it_leaves() {
    let (access, door) = export(LONG);
    assert_eq!(access.state(), OwnershipState::Block);
    let hold = access.take(client("a")).unwrap();
    assert_eq!(access.state(), OwnershipState::Upgraded);
    assert_eq!(door.diary(), ["closing", "closed"]);
    assert_eq!(access.holder().as_deref(), Some("a"));
    let refused = access.take(client("b")).unwrap_err();
    assert_eq!(refused, Refused::Taken("a".into()));
    hold.drain();
    assert_eq!(access.state(), OwnershipState::Draining);
    assert_eq!(door.diary(), ["closing", "closed"], "not before it left");
    hold.leave();
    assert_eq!(access.state(), OwnershipState::Block);
    assert_eq!(door.diary(), ["closing", "closed", "open"]);
}

#[test]
fn no_client_gets_the_disk_before_the_block_door_is_drained() {
    let (access, door) = export(LONG);
    let draining = door.draining.lock().unwrap();
    let (sender, got) = mpsc::channel();
    std::thread::spawn({
        let access = Arc::clone(&access);
        move || sender.send(access.take(client("a"))).unwrap()
    });
    eventually("the door is being closed", || door.diary() == ["closing"]);
    assert_eq!(access.state(), OwnershipState::Draining);
    assert!(got.try_recv().is_err());
    drop(draining);
    let hold = got.recv().unwrap().unwrap();
    assert_eq!(access.state(), OwnershipState::Upgraded);
    hold.leave();
}

#[test]
fn the_disk_is_kept_for_a_client_that_died_and_given_back_after_the_grace() {
    let (access, door) = export(LONG);
    drop(access.take(client("a")).unwrap());
    assert_eq!(access.state(), OwnershipState::Waiting);
    let again = access.take(client("a again")).unwrap();
    assert_eq!(access.state(), OwnershipState::Upgraded);
    assert_eq!(door.diary(), ["closing", "closed"], "closed all the time");
    again.leave();

    let (access, door) = export(Duration::from_millis(50));
    drop(access.take(client("a")).unwrap());
    eventually("the disk is given back", || {
        access.state() == OwnershipState::Block
    });
    assert_eq!(door.diary(), ["closing", "closed", "open"]);
}

#[test]
fn a_wait_that_ended_well_does_not_end_the_next_one() {
    let (access, door) = export(Duration::from_millis(200));
    drop(access.take(client("a")).unwrap());
    let again = access.take(client("a again")).unwrap();
    // The thread of the first wait has ended, or sees that it is not its wait any more.
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(access.state(), OwnershipState::Upgraded);
    assert_eq!(door.diary(), ["closing", "closed"]);
    again.leave();
}

#[test]
fn a_disk_in_use_stays_with_the_block_door() {
    let (access, door) = export(LONG);
    door.mounted.store(true, Ordering::Relaxed);
    let refused = access.take(client("a")).unwrap_err();
    assert_eq!(refused, Refused::InUse("mounted at /x".into()));
    assert!(!door.diary().contains(&"closing"));
    assert_eq!(access.state(), OwnershipState::Block);
    door.mounted.store(false, Ordering::Relaxed);
    assert!(access.take(client("a")).is_ok());
}

#[test]
fn a_block_door_that_cannot_be_drained_stays_open() {
    let (access, door) = export(LONG);
    door.stuck.store(true, Ordering::Relaxed);
    let refused = access.take(client("a")).unwrap_err();
    assert_eq!(refused, Refused::Drain("stuck".into()));
    assert_eq!(access.state(), OwnershipState::Block);
    assert_eq!(door.diary().last(), Some(&"open"));
}

#[test]
fn who_comes_before_its_own_past_has_ended_waits_for_it() {
    let (access, _door) = export(LONG);
    let gone = Arc::new(AtomicBool::new(false));
    let hold = access
        .take(Client {
            name: "a".into(),
            gone: Arc::new({
                let gone = Arc::clone(&gone);
                move || gone.load(Ordering::Relaxed)
            }),
            ..client("a")
        })
        .unwrap();
    gone.store(true, Ordering::Relaxed);
    assert_eq!(access.holder(), None);
    let next = std::thread::spawn({
        let access = Arc::clone(&access);
        move || access.take(client("b")).unwrap()
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!next.is_finished());
    drop(hold);
    let _next = next.join().unwrap();
    assert_eq!(access.holder().as_deref(), Some("b"));
}

#[test]
fn early_clients_wait_for_the_doors_to_open() {
    let access = Ownership::new("e", false, LONG, None);
    let early = std::thread::spawn({
        let access = Arc::clone(&access);
        move || access.take(client("a"))
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!early.is_finished());
    access.open(None);
    let _hold = early.join().unwrap().unwrap();
}

#[test]
fn a_closed_export_has_no_clients() {
    let (access, door) = export(LONG);
    let hold = access.take(client("a")).unwrap();
    access.close();
    assert_eq!(access.take(client("b")).unwrap_err(), Refused::NotOpen);
    hold.leave();
    assert!(!door.diary().contains(&"open"), "it is on its way out");
}

#[test]
fn an_export_that_is_closed_while_a_client_comes_does_not_note_that_client() {
    let folder = tempfile::tempdir().unwrap();
    let note = folder.path().join("note");
    let access = Ownership::new("e", false, LONG, Some(noted_in(folder.path())));
    let door = Arc::new(Door::default());
    access.open(Some(Arc::<Door>::clone(&door)));
    let draining = door.draining.lock().unwrap();
    let came = std::thread::spawn({
        let access = Arc::clone(&access);
        move || access.take(client("a"))
    });
    eventually("the door is being closed", || door.diary() == ["closing"]);
    access.close();
    drop(draining);
    assert_eq!(came.join().unwrap().unwrap_err(), Refused::NotOpen);
    assert!(!note.exists(), "the next server would wait for it");
    assert_eq!(door.diary(), ["closing", "closed", "open"]);
    // Who had the disk before is noted as ever.
    let access = Ownership::new("e", false, LONG, Some(noted_in(folder.path())));
    access.open(Some(door));
    let hold = access.take(client("a")).unwrap();
    access.close();
    drop(hold);
    assert!(note.exists());
}

#[test]
fn without_a_block_door_the_disk_is_kept_all_the_same() {
    let access = Ownership::new("e", false, Duration::from_millis(50), None);
    access.open(None);
    assert_eq!(access.state(), OwnershipState::Free);
    drop(access.take(client("a")).unwrap());
    assert_eq!(access.state(), OwnershipState::Waiting);
    eventually("the wait ends", || access.state() == OwnershipState::Free);
}

#[test]
fn a_read_only_disk_is_shared() {
    let access = Ownership::new("e", true, LONG, None);
    access.open(None);
    let _one = access.take(client("a")).unwrap();
    let _two = access.take(client("b")).unwrap();
    assert_eq!(access.state(), OwnershipState::Shared);
    assert_eq!(access.holder(), None);
}

#[test]
fn a_note_is_there_while_a_client_has_the_disk_or_is_waited_for() {
    let temp = tempfile::tempdir().unwrap();
    let note = temp.path().join("note");
    let access = Ownership::new("e", false, LONG, Some(noted_in(temp.path())));
    access.open(Some(Arc::new(Door::default())));
    assert!(!note.exists());
    let hold = access.take(client("a")).unwrap();
    assert!(note.exists());
    drop(hold);
    assert_eq!(access.state(), OwnershipState::Waiting);
    assert!(note.exists());
    access.take(client("a")).unwrap().leave();
    assert!(!note.exists());
}

#[test]
fn a_note_of_an_unknown_client_keeps_the_disk_for_the_first_that_comes() {
    let temp = tempfile::tempdir().unwrap();
    std::fs::write(temp.path().join("note"), "").unwrap();
    let access = Ownership::new("e", false, LONG, Some(noted_in(temp.path())));
    let door = Arc::new(Door::default());
    assert!(access.is_kept());
    access.open(Some(Arc::<Door>::clone(&door)));
    assert_eq!(access.state(), OwnershipState::Waiting);
    access.take(client("a")).unwrap().leave();
    assert_eq!(door.diary(), ["open"], "it was closed from the beginning");
    assert_eq!(access.state(), OwnershipState::Block);
}

/// Storage that keeps a diary, and that another server may have.
#[derive(Default)]
struct Store {
    diary: Mutex<Vec<&'static str>>,
    taken: AtomicBool,
    claimed: AtomicBool,
}

impl StorageControl for Store {
    fn limits(&self) -> &Limits {
        unreachable!("ownership does not ask for limits")
    }

    fn claim(&self, _limit: Duration) -> Result<bool, String> {
        if self.taken.load(Ordering::Relaxed) {
            return Err("another server has it".into());
        }
        self.diary.lock().unwrap().push("claimed");
        Ok(!self.claimed.swap(true, Ordering::Relaxed))
    }

    fn release(&self) {
        self.claimed.store(false, Ordering::Relaxed);
        self.diary.lock().unwrap().push("released");
    }
}

fn movable() -> (Arc<Ownership>, Arc<Store>) {
    let access = Ownership::new("e", false, LONG, None);
    let store = Arc::new(Store::default());
    access.allow_moves(Some(Arc::<Store>::clone(&store)));
    access.open(None);
    (access, store)
}

#[test]
fn a_client_that_stopped_for_a_migration_is_succeeded_by_another() {
    let (access, door) = export(LONG);
    access.allow_moves(None);
    let source = access.take(client("source")).unwrap();
    assert_eq!(access.obstacle(), None, "it may connect");
    let refused = access.take(client("target")).unwrap_err();
    assert_eq!(
        refused,
        Refused::Taken("source".into()),
        "not while it runs"
    );
    source.rest(true);
    assert_eq!(access.state(), OwnershipState::Moving);
    let target = access.take(client("target")).unwrap();
    assert_eq!(access.state(), OwnershipState::Upgraded);
    assert_eq!(access.holder().as_deref(), Some("target"));
    // Whatever the source does now, it does to nobody.
    assert_eq!(source.resume(Identity::default()), Ok(false));
    source.rest(true);
    source.drain();
    assert_eq!(access.state(), OwnershipState::Upgraded);
    source.leave();
    assert_eq!(access.holder().as_deref(), Some("target"));
    assert_eq!(
        door.diary(),
        ["closing", "closed"],
        "the ublk door never had it"
    );
    target.leave();
    assert_eq!(access.state(), OwnershipState::Block);
    assert_eq!(door.diary(), ["closing", "closed", "open"]);
}

#[test]
fn a_migration_that_failed_goes_on_where_it_was() {
    let (access, store) = movable();
    let source = access.take(client("source")).unwrap();
    source.rest(true);
    assert_eq!(source.resume(Identity::default()), Ok(true));
    assert_eq!(access.state(), OwnershipState::Upgraded);
    assert_eq!(source.resume(Identity::default()), Ok(true), "it has it");
    source.rest(true);
    source.leave();
    // The target may still come.
    assert_eq!(access.state(), OwnershipState::Waiting);
    let diary = store.diary.lock().unwrap().clone();
    let times = |what| diary.iter().filter(|entry| **entry == what).count();
    assert_eq!(times("claimed"), 2, "{diary:?}");
    assert_eq!(diary.last(), Some(&"released"));
}

#[test]
fn where_clients_do_not_move_nobody_takes_anything_over() {
    let (access, _door) = export(LONG);
    let source = access.take(client("source")).unwrap();
    assert_eq!(access.obstacle().as_deref(), Some("source"));
    source.rest(true);
    assert_eq!(access.state(), OwnershipState::Upgraded);
    assert!(access.take(client("target")).is_err());
    source.leave();
}

#[test]
fn storage_is_claimed_while_somebody_has_the_disk_and_by_one_server() {
    let (access, store) = movable();
    assert!(
        store.diary.lock().unwrap().is_empty(),
        "nobody wants it yet"
    );
    store.taken.store(true, Ordering::Relaxed);
    let refused = access.take(client("a")).unwrap_err();
    assert_eq!(refused, Refused::Storage("another server has it".into()));
    assert_eq!(access.state(), OwnershipState::Free);
    store.taken.store(false, Ordering::Relaxed);
    let hold = access.take(client("a")).unwrap();
    hold.rest(true);
    assert_eq!(*store.diary.lock().unwrap(), ["claimed", "released"]);
    // The guest went to another server; should it come back, that must let go first.
    store.taken.store(true, Ordering::Relaxed);
    assert!(matches!(
        hold.resume(Identity::default()),
        Err(Refused::Storage(_))
    ));
    assert!(access.take(client("b")).is_err());
    assert_eq!(access.state(), OwnershipState::Moving, "as before");
    store.taken.store(false, Ordering::Relaxed);
    assert_eq!(hold.resume(Identity::default()), Ok(true));
    hold.leave();
    assert_eq!(access.state(), OwnershipState::Free);
    assert_eq!(store.diary.lock().unwrap().last(), Some(&"released"));
}

#[test]
fn a_server_that_starts_in_the_middle_of_a_move_leaves_the_storage_to_the_targets_server() {
    let folder = tempfile::tempdir().unwrap();
    for moves in [false, true] {
        let store = Arc::new(Store::default());
        let serve = || {
            let access = Ownership::new("e", false, LONG, Some(noted_in(folder.path())));
            access.allow_moves(Some(Arc::<Store>::clone(&store)));
            access.open(None);
            access
        };
        let old = serve();
        let client = old.take(client("source")).unwrap();
        if moves {
            client.rest(true);
        }
        old.close();
        drop(client);
        store.release();
        let new = serve();
        assert_eq!(new.state(), OwnershipState::Waiting);
        assert_eq!(store.claimed.load(Ordering::Relaxed), !moves);
    }
}

#[test]
fn a_source_that_leaves_while_its_disk_is_being_taken_over_takes_nothing_along() {
    /// Takes its time.
    struct Slow(Mutex<()>, AtomicBool);
    impl StorageControl for Slow {
        fn limits(&self) -> &Limits {
            unreachable!("ownership does not ask for limits")
        }
        fn claim(&self, _limit: Duration) -> Result<bool, String> {
            drop(self.0.lock().unwrap());
            match self.1.load(Ordering::Relaxed) {
                true => Err("no".into()),
                false => Ok(true),
            }
        }
        fn release(&self) {}
    }
    for fails in [false, true] {
        let access = Ownership::new("e", false, LONG, None);
        let slow = Arc::new(Slow(Mutex::new(()), AtomicBool::new(false)));
        access.allow_moves(Some(Arc::<Slow>::clone(&slow)));
        access.open(None);
        let source = access.take(client("source")).unwrap();
        source.rest(true);
        slow.1.store(fails, Ordering::Relaxed);
        let held_up = slow.0.lock().unwrap();
        let taking = std::thread::spawn({
            let access = Arc::clone(&access);
            move || access.take(client("target"))
        });
        eventually("the target is taking", || {
            access.state() == OwnershipState::Draining
        });
        let leaving = std::thread::spawn(move || source.leave());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!leaving.is_finished());
        drop(held_up);
        let taken = taking.join().unwrap();
        leaving.join().unwrap();
        assert_eq!(taken.is_err(), fails);
        let expected = if fails {
            OwnershipState::Waiting
        } else {
            OwnershipState::Upgraded
        };
        assert_eq!(access.state(), expected);
    }
}
