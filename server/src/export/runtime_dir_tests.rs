use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;
use crate::engine::durable::unfinished;
use crate::export::name_lock::{CONTROL, DeviceNote, DeviceRecord, NOTES, UBLK_ID};

fn dir() -> (tempfile::TempDir, RuntimeDir) {
    let temp = tempfile::tempdir().unwrap();
    let dir = RuntimeDir::find(Some(temp.path().join("run"))).unwrap();
    (temp, dir)
}

#[test]
fn a_name_is_held_once_and_given_back() {
    let (_temp, dir) = dir();
    let claim = dir.claim("a").unwrap();
    let error = dir.claim("a").unwrap_err().to_string();
    assert!(error.contains("already served"), "{error}");
    assert!(dir.is_alive("a").unwrap() && !dir.is_alive("b").unwrap());
    dir.claim("b").unwrap();
    drop(claim);
    assert!(!dir.is_alive("a").unwrap());
    assert!(!dir.folder("a").exists());
    dir.claim("a").unwrap();
}

#[test]
fn what_a_dead_server_left_is_cleared_but_its_device_is_remembered() {
    let (_temp, dir) = dir();
    let folder = dir.folder("a");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(LOCK), "").unwrap();
    fs::write(folder.join(CONTROL), "").unwrap();
    fs::write(folder.join(UBLK_ID), "7\n").unwrap();
    assert_eq!(dir.names().unwrap(), ["a"]);
    assert!(!dir.is_alive("a").unwrap());
    let claim = dir.claim("a").unwrap();
    assert!(!folder.join(CONTROL).exists());
    let noted = DeviceNote {
        id: Some(7),
        ..DeviceNote::default()
    };
    assert_eq!(claim.left_device().unwrap(), Some(noted));
    claim.forget_device();
    drop(claim);
    assert!(!folder.exists());
}

#[test]
fn a_note_that_cannot_be_written_does_not_keep_the_folder() {
    let (_temp, dir) = dir();
    let claim = dir.claim("a").unwrap();
    let folder = dir.folder("a");
    // No file can take its place.
    fs::create_dir(folder.join(UBLK_ID)).unwrap();
    claim.note_device(&DeviceNote::default()).unwrap_err();
    let left: Vec<_> = fs::read_dir(&folder).unwrap().collect();
    assert_eq!(left.len(), 2, "the lock and what is in the way: {left:?}");
    fs::remove_dir(folder.join(UBLK_ID)).unwrap();
    // Where even that could not be removed.
    for note in NOTES {
        fs::write(folder.join(unfinished(note)), "").unwrap();
    }
    drop(claim);
    assert!(!folder.exists());
}

#[test]
fn leaving_releases_the_name_and_keeps_the_notes() {
    let (_temp, dir) = dir();
    let claim = dir.claim("a").unwrap();
    for note in [
        DeviceNote {
            mark: Some(u64::MAX),
            ..DeviceNote::default()
        },
        DeviceNote {
            id: Some(3),
            mark: Some(5),
            storage: Some("inode:1f:2a".into()),
        },
    ] {
        claim.note_device(&note).unwrap();
        assert_eq!(claim.left_device().unwrap(), Some(note.clone()));
        assert_eq!(dir.device("a"), Some(note));
    }
    claim.note_served("this").unwrap();
    claim.leave();
    assert!(!dir.is_alive("a").unwrap());
    assert_eq!(dir.served("a").unwrap(), "this");
    let claim = dir.claim_soon("a").unwrap();
    assert_eq!(claim.left_device().unwrap().unwrap().id, Some(3));
    claim.forget_device();
    drop(claim);
    assert!(!dir.folder("a").exists());
}

#[test]
fn a_failed_start_keeps_the_notes_of_a_waiting_device() {
    let (_temp, dir) = dir();
    let waiting = DeviceNote {
        mark: Some(9),
        ..DeviceNote::default()
    };
    let first = dir.claim("a").unwrap();
    first.note_device(&waiting).unwrap();
    first.note_served("this").unwrap();
    let note = first.upgraded_note();
    note.replace("", || {}).unwrap();
    first.leave();
    // One that could not serve it, and one that did not get that far.
    drop(dir.claim("a").unwrap());
    let junk = dir.folder("a").join("junk");
    fs::create_dir(&junk).unwrap();
    drop(dir.claim("a").unwrap());
    assert!(
        junk.exists(),
        "what no server has made is not a server's to remove"
    );
    fs::remove_dir(junk).unwrap();
    assert!(!dir.is_alive("a").unwrap());
    assert_eq!(dir.served("a").unwrap(), "this");
    let next = dir.claim("a").unwrap();
    assert_eq!(next.left_device().unwrap(), Some(waiting));
    assert!(next.was_upgraded());
    // Without the device they mean nothing.
    next.forget_device();
    drop(next);
    assert!(!dir.folder("a").exists());
}

#[test]
fn a_note_is_not_written_through_a_link_that_lies_there() {
    let (temp, dir) = dir();
    let claim = dir.claim("a").unwrap();
    let precious = temp.path().join("precious");
    fs::write(&precious, "text").unwrap();
    std::os::unix::fs::symlink(&precious, claim.folder().join(".served.new")).unwrap();
    claim.note_served("this").unwrap();
    assert_eq!(dir.served("a").unwrap(), "this");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "text");
}

#[test]
fn a_note_without_a_number_and_a_mark_is_none() {
    assert_eq!(DeviceNote::parse("- - 0\n"), None);
    // The second word was a number in earlier versions.
    for text in ["3 - 0\n", "3 12 -\n", "3\n"] {
        let noted = DeviceNote {
            id: Some(3),
            ..DeviceNote::default()
        };
        assert_eq!(DeviceNote::parse(text), Some(noted), "{text}");
    }
}

#[test]
fn devices_are_recorded_until_they_are_forgotten() {
    let (_temp, dir) = dir();
    assert_eq!(dir.devices("a").unwrap(), []);
    let claim = dir.claim("a").unwrap();
    let devices = [(7, None), (u64::MAX, Some("rbd:fsid:2:1abc@a snapshot"))];
    let devices = devices.map(|(mark, storage)| DeviceRecord {
        mark,
        storage: storage.map(str::to_owned),
    });
    let record = dir.device_record("a").unwrap();
    record
        .replace(&DeviceRecord::text(&devices), || {})
        .unwrap();
    // Whether it is noted or not.
    drop(claim);
    assert_eq!(dir.devices("a").unwrap(), devices);
    // That of a server of the same name is something else.
    drop(dir.claim_server("a").unwrap());
    assert_eq!(dir.devices("a").unwrap(), devices);
    assert_eq!(dir.names_with_devices(), ["a"]);
    dir.claim("a").unwrap().forget_device();
    assert_eq!(dir.devices("a").unwrap(), []);
    assert_eq!(DeviceRecord::parse("0 x\n\nword y\n"), []);
}

#[test]
fn a_check_for_life_does_not_keep_a_server_from_the_name() {
    let (_temp, dir) = dir();
    dir.claim("a").unwrap().leave();
    // A check that is interrupted for a moment.
    let check = File::options()
        .write(true)
        .open(dir.folder("a").join(LOCK))
        .unwrap();
    flock(&check, FlockOperation::NonBlockingLockShared).unwrap();
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(check);
    });
    let claim = dir.claim("a").unwrap();
    ending.join().unwrap();
    assert!(dir.is_alive("a").unwrap());
    drop(claim);
}

#[test]
fn a_contended_name_has_one_holder_at_a_time() {
    let (_temp, dir) = dir();
    let held = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut got = 0;
                for _ in 0..2000 {
                    let Ok(claim) = dir.claim("a") else { continue };
                    assert_eq!(held.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    got += 1;
                    held.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    drop(claim);
                }
                got
            });
        }
    });
}

/// A runtime directory in which a server of the name `a` left all its notes.
fn dir_with_notes() -> (tempfile::TempDir, RuntimeDir) {
    let (temp, dir) = dir();
    let claim = dir.claim("a").unwrap();
    claim.note_served("this").unwrap();
    claim
        .note_device(&DeviceNote {
            mark: Some(9),
            ..DeviceNote::default()
        })
        .unwrap();
    claim.leave();
    (temp, dir)
}

/// No command acts on the notes of `a`, and each says why.
fn is_not_trusted(dir: &RuntimeDir, why: &str) {
    let errors = [
        dir.is_alive("a").map(drop).unwrap_err().to_string(),
        dir.served("a").map(drop).unwrap_err().to_string(),
        dir.claim("a").map(drop).unwrap_err().to_string(),
    ];
    for error in errors {
        assert!(error.contains(why), "{error}");
    }
    assert_eq!(dir.device("a"), None);
}

#[test]
fn a_link_in_place_of_a_folder_or_a_note_is_not_followed() {
    for part in ["run", "run/exports", "run/exports/a"] {
        let (temp, dir) = dir_with_notes();
        let (path, moved) = (temp.path().join(part), temp.path().join("moved"));
        fs::rename(&path, &moved).unwrap();
        symlink(&moved, &path).unwrap();
        is_not_trusted(&dir, "symbolic link");
        let kept: Vec<_> = fs::read_dir(&moved).unwrap().collect();
        assert!(!kept.is_empty(), "nothing was removed through {part}");
    }
    let (temp, dir) = dir_with_notes();
    for note in [SERVED, UBLK_ID] {
        let (path, moved) = (dir.folder("a").join(note), temp.path().join(note));
        fs::rename(&path, &moved).unwrap();
        symlink(&moved, &path).unwrap();
    }
    let error = dir.served("a").unwrap_err().to_string();
    assert!(error.contains("symbolic link"), "{error}");
    assert_eq!(dir.device("a"), None);
}

#[test]
fn what_others_may_write_to_is_not_acted_upon() {
    for part in ["run", "run/exports", "run/exports/a"] {
        let (temp, dir) = dir_with_notes();
        fs::set_permissions(temp.path().join(part), fs::Permissions::from_mode(0o777)).unwrap();
        is_not_trusted(&dir, "may write to it");
        fs::set_permissions(temp.path().join(part), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(dir.served("a").unwrap(), "this");
    }
}

#[test]
fn a_device_is_noted_with_the_identity_of_its_storage_whatever_that_is() {
    let (_temp, dir) = dir();
    for storage in ["8:1:5:7", "rbd:fsid:2:1abc@", "rbd:fsid:2:1abc@a snapshot"] {
        let claim = dir.claim("a").unwrap();
        let noted = DeviceNote {
            id: Some(3),
            mark: Some(7),
            storage: Some(storage.to_owned()),
        };
        claim.note_device(&noted).unwrap();
        assert_eq!(claim.left_device().unwrap(), Some(noted));
    }
}
