use std::fs;

use super::*;
use crate::export::name_lock::{DeviceNote, SERVED};

fn dir() -> (tempfile::TempDir, RuntimeDir, NameLock) {
    let temp = tempfile::tempdir().unwrap();
    let dir = RuntimeDir::find(Some(temp.path().join("run"))).unwrap();
    let server = dir.claim_server("s").unwrap();
    (temp, dir, server)
}

fn spare_names(dir: &RuntimeDir) -> Vec<String> {
    let spares = dir.servers().unwrap().dir("s").unwrap().dir(SPARE);
    spares.unwrap().names().unwrap()
}

#[test]
fn a_spare_folder_becomes_that_of_an_export_and_is_spare_again() {
    let (_temp, dir, server) = dir();
    let spares = Spares::make(&server, 2).unwrap();
    let (claim, number) = dir.claim_in_server("s", true, "a").unwrap();
    assert_eq!(number, Some(0));
    assert_eq!(claim.folder(), dir.folder("a"));
    assert_eq!(claim.home, spares.home(0));
    assert!(dir.is_alive("a").unwrap());
    assert_eq!(spare_names(&dir), ["1"]);
    claim.note_served("x").unwrap();
    let error = dir.claim_in_server("s", true, "a").unwrap_err().to_string();
    assert!(error.contains("already served"), "{error}");
    let (other, number) = dir.claim_in_server("s", true, "b").unwrap();
    assert_eq!(number, Some(1), "one that was not needed is spare again");
    let error = dir.claim_in_server("s", true, "c").unwrap_err().to_string();
    assert!(error.contains("no room for another export"), "{error}");
    let (unconfined, number) = dir.claim_in_server("s", false, "c").unwrap();
    assert_eq!(number, None);
    drop((claim, other, unconfined));
    assert_eq!(spare_names(&dir), ["0", "1"]);
    assert_eq!(dir.names().unwrap(), Vec::<String>::new());
    for spare in ["0", "1"] {
        let left = dir.path().join(format!("servers/s/spare/{spare}"));
        assert!(fs::read_dir(left).unwrap().next().is_none(), "{spare}");
    }
    drop(spares);
    drop(server);
    assert!(dir.server_names().unwrap().is_empty());
    assert!(!dir.path().join("servers/s").exists());
}

#[test]
fn the_notes_of_a_dead_server_come_along() {
    let (_temp, dir, server) = dir();
    let _spares = Spares::make(&server, 1).unwrap();
    let note = DeviceNote {
        mark: Some(7),
        ..DeviceNote::default()
    };
    let old = dir.claim("a").unwrap();
    old.note_device(&note).unwrap();
    old.note_served("text").unwrap();
    drop(old);
    let (claim, _) = dir.claim_in_server("s", true, "a").unwrap();
    assert_eq!(claim.left_device().unwrap(), Some(note));
    assert_eq!(dir.served("a").unwrap(), "text");
    assert!(spare_names(&dir).is_empty(), "the old folder is removed");
    drop(claim);
    // The device waits for a server, which finds its notes where they belong.
    assert!(dir.folder("a").join(SERVED).exists());
    assert!(spare_names(&dir).is_empty());
}

#[test]
fn only_the_holder_of_the_lock_hands_a_name_over() {
    let (temp, dir, server) = dir();
    let spares = Spares::make(&server, 1).unwrap();
    let (claim, _) = dir.claim_in_server("s", true, "a").unwrap();
    let lock = claim.lock().try_clone().unwrap();
    let adopted = dir.adopt("a", lock, spares.home(0)).unwrap();
    claim.leave();
    assert!(dir.is_alive("a").unwrap());
    drop(adopted);
    assert_eq!(spare_names(&dir), ["0"]);
    let other = File::create(temp.path().join("lock")).unwrap();
    let (_claim, _) = dir.claim_in_server("s", true, "a").unwrap();
    let error = dir.adopt("a", other, None).unwrap_err().to_string();
    assert!(error.contains("is not locked by the command"), "{error}");
}

#[test]
fn what_a_dead_server_left_is_removed_by_the_next() {
    let (_temp, dir, server) = dir();
    std::mem::forget(Spares::make(&server, 2).unwrap());
    let spare = dir.server_socket("s").with_file_name("spare/1");
    fs::write(spare.join(LOCK), "").unwrap();
    server.leave();
    drop(dir.claim_server("t").unwrap());
    assert!(!dir.path().join("servers/s").exists());
}

#[test]
fn a_failure_leaves_the_notes_of_a_dead_server_and_a_spare_folder_has_none_of_another_export() {
    let (_temp, dir, server) = dir();
    let spares = Spares::make(&server, 2).unwrap();
    let old = dir.claim("a").unwrap();
    old.note_served("text").unwrap();
    old.leave();
    // A command that was killed between its notes and the exchange.
    let spare = dir.path().join("servers/s/spare/0");
    for note in NOTES {
        fs::write(spare.join(note), "of another").unwrap();
    }
    let (claim, _) = dir.claim_in_server("s", true, "b").unwrap();
    assert!(!claim.was_served() && !claim.has_device());
    let (kept, _) = dir.claim_in_server("s", true, "a").unwrap();
    drop(kept);
    assert_eq!(dir.served("a").unwrap(), "text");
    // One that is not a file is in the way.
    drop(claim);
    fs::create_dir(spare.join("folder")).unwrap();
    let error = dir.claim_in_server("s", true, "b").unwrap_err().to_string();
    assert!(error.contains("no room"), "{error}");
    fs::remove_dir(spare.join("folder")).unwrap();
    fs::write(spare.join("file"), "").unwrap();
    drop(spares);
    assert!(!spare.exists());
}
