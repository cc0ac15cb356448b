//! Each state of a dead server's block device, notes and image, and each command that meets it.

use std::fmt::Write as _;
use std::fs;

use super::*;
use crate::export::name_lock::DeviceNote;
use crate::storage::OpenError;
use world::*;

#[path = "recovery_world.rs"]
mod world;

/// What is right, said another way than in the code.
fn expected(case: Case, command: Command) -> Outcome {
    let is_there = !matches!(case.device, Device::Gone | Device::Foreign);
    let is_known = matches!(case.notes, Notes::There | Notes::Lost) && is_there;
    let is_forged = case.notes == Notes::Unrecorded && case.device == Device::Waiting;
    let opens = !matches!(case.image, Image::Gone | Image::Claimed);
    match command {
        Command::Clean if is_forged => Outcome::Refuses,
        Command::Clean if !is_known => Outcome::Nothing,
        Command::Clean if case.device == Device::Served => Outcome::Refuses,
        Command::Clean => Outcome::Removes,
        Command::Serve | Command::Replace if !opens => Outcome::Refuses,
        Command::Serve if is_forged => Outcome::Refuses,
        _ if !is_known => Outcome::New,
        _ if case.device == Device::Served => Outcome::Refuses,
        _ if case.device == Device::Dead => Outcome::Removes,
        Command::Replace => Outcome::Removes,
        Command::Serve if case.options != Options::Same => Outcome::Refuses,
        Command::Serve => match case.image {
            Image::Same | Image::Larger => Outcome::Recovers,
            _ => Outcome::Refuses,
        },
    }
}

#[test]
fn a_waiting_device_is_gone_on_with_or_left_unless_a_person_says_remove() {
    let mut cases = 0;
    for device in DEVICES {
        for notes in [Notes::There, Notes::Unrecorded, Notes::Lost, Notes::AllLost] {
            for image in IMAGES {
                for options in OPTIONS {
                    let case = Case {
                        device,
                        notes,
                        image,
                        options,
                    };
                    if image == Image::Claimed && (device, notes, options) != USUAL_LEFT {
                        // Opening it takes two seconds, in which its owner might have ended.
                        continue;
                    }
                    for command in COMMANDS {
                        let world = World::new(case);
                        let (outcome, why) = world.run(command);
                        assert_eq!(
                            outcome,
                            expected(case, command),
                            "{case:?} {command:?}: {why}"
                        );
                        if outcome != Outcome::Refuses {
                            continue;
                        }
                        // Nothing is lost by the attempt: put right what differs, and it goes on.
                        let device = world.driver.device.borrow().is_some();
                        assert_eq!(device, case.device != Device::Gone, "{case:?} {command:?}");
                        let noted = world.dir.device(NAME).is_some();
                        let recorded = world.dir.devices(NAME).unwrap().len() == 1;
                        let before = match notes {
                            Notes::There => (true, true),
                            Notes::Unrecorded => (true, false),
                            Notes::Lost => (false, true),
                            Notes::AllLost => (false, false),
                        };
                        assert_eq!((noted, recorded), before, "{case:?} {command:?}");
                        cases += 1;
                    }
                }
            }
        }
    }
    assert!(cases > 100, "only {cases} refusals were seen");
}

#[test]
fn a_refusal_names_what_differs_and_both_ways_on() {
    for (case, words) in [
        (Case::of_image(Image::Shorter), ["has 512K", "device 1M"]),
        (
            Case::of_image(Image::Replaced),
            ["not the one that was served", "put"],
        ),
        (
            Case::of_options(Options::ReadOnly),
            ["read-only", "writable"],
        ),
        (Case::of_options(Options::BlockSize), ["4096", "block-size"]),
        (Case::of_options(Options::NoUblk), ["option ublk", "closed"]),
        (Case::of_options(Options::OtherId), ["ublk-id", "9"]),
        (UNRECORDED, ["no record", "doctor --remove"]),
    ] {
        let (outcome, why) = World::new(case).run(Command::Serve);
        assert_eq!(outcome, Outcome::Refuses, "{case:?}");
        for word in words
            .iter()
            .chain(&["/dev/ublkb3", "left as it is", "--replace"])
        {
            assert!(why.contains(word), "{case:?}: no '{word}' in: {why}");
        }
    }
}

#[test]
fn a_device_keeps_its_limits_where_the_storage_can_have_them() {
    let mut device = crate::request::small_disk(1 << 20);
    device.block_bytes = 4096;
    device.max_discard_bytes = 1 << 16;
    device.optimal_io_bytes = 1 << 14;
    let storage = crate::request::small_disk((1 << 20) + 512);
    let kept = fit(&storage, &device).unwrap();
    // The capacity is the storage's own, in whole blocks of the device.
    assert_eq!(storage.capacity.bytes(), 1 << 20);
    let serial = storage.serial;
    assert_eq!(
        kept,
        Limits {
            serial,
            ..device.clone()
        }
    );

    type Change = fn(&mut Limits);
    let refused: [(&str, Change); 4] = [
        ("blocks of 8192", |storage| storage.block_bytes = 8192),
        ("would be read-only", |storage| storage.read_only = true),
        ("takes 65536", |storage| storage.max_io_bytes = 65536),
        ("the storage has", |storage| storage.capacity = 4096.into()),
    ];
    for (word, change) in refused {
        let mut storage = storage.clone();
        change(&mut storage);
        let why = fit(&storage, &device).unwrap_err().to_string();
        assert!(why.contains(word), "{word}: {why}");
    }
    device.write_cache = false;
    assert!(
        fit(&storage, &device).is_err(),
        "writes would be durable later than promised"
    );
    device.write_cache = true;
    let mut plain = storage.clone();
    plain.write_cache = false;
    plain.max_discard_bytes = 0;
    let kept = fit(&plain, &device).unwrap();
    assert!(kept.write_cache, "flushes are taken as before");
    assert_eq!(
        kept.max_discard_bytes, 0,
        "discards are refused as unsupported"
    );
}

/// The rows of `docs/recovery.md`: one thing at a time is not as usual.
fn rows() -> Vec<(&'static str, Case)> {
    vec![
        ("waits; all is as it was", USUAL),
        ("waits; the file has grown", Case::of_image(Image::Larger)),
        ("waits; the file is shorter", Case::of_image(Image::Shorter)),
        (
            "waits; another file is at the path",
            Case::of_image(Image::Replaced),
        ),
        ("waits; the file is gone", Case::of_image(Image::Gone)),
        (
            "waits; another program has the file",
            Case::of_image(Image::Claimed),
        ),
        (
            "waits; `read-only` was changed",
            Case::of_options(Options::ReadOnly),
        ),
        (
            "waits; `block-size` was changed",
            Case::of_options(Options::BlockSize),
        ),
        (
            "waits; `ublk=no` now, or no usable driver",
            Case::of_options(Options::NoUblk),
        ),
        (
            "waits; another `ublk-id`",
            Case::of_options(Options::OtherId),
        ),
        (
            "waits; its note is lost",
            Case {
                notes: Notes::Lost,
                ..USUAL
            },
        ),
        ("waits; its record is lost", UNRECORDED),
        (
            "waits; note and record are lost",
            Case {
                notes: Notes::AllLost,
                ..USUAL
            },
        ),
        ("dead", Case::of_device(Device::Dead)),
        (
            "dead; the file is gone",
            Case {
                device: Device::Dead,
                image: Image::Gone,
                ..USUAL
            },
        ),
        ("has a server that lives", Case::of_device(Device::Served)),
        (
            "another program's has the number",
            Case::of_device(Device::Foreign),
        ),
        ("none", Case::of_device(Device::Gone)),
    ]
}

#[test]
fn the_table_in_the_docs_is_what_happens() {
    let mut table = String::from(
        "| block device of the name | `serve`, `recover` | with `--replace` | `stop --force`, `doctor --clean` |\n\
         |---|---|---|---|\n",
    );
    for (what, case) in rows() {
        let _ = write!(table, "| {what} |");
        for command in COMMANDS {
            let is_dead = case.device == Device::Dead;
            let words = match (World::new(case).run(command).0, command) {
                (Outcome::Recovers, _) => "recovers it",
                (Outcome::New, _) => "makes a new one",
                (Outcome::Removes, Command::Clean) => "removes it",
                (Outcome::Removes, _) if is_dead => "removes it, makes a new one",
                (Outcome::Removes, _) => "**removes it**, makes a new one",
                (Outcome::Refuses, _) => "refuses, leaves it",
                (Outcome::Nothing, _) => "leaves it",
            };
            let _ = write!(table, " {words} |");
        }
        table.push('\n');
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/recovery.md");
    let text = fs::read_to_string(path).unwrap();
    let (begin, end) = ("<!-- table -->\n", "<!-- end of table -->");
    let from = text.find(begin).expect("a mark before the table") + begin.len();
    let to = text.find(end).expect("a mark behind the table");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(path, format!("{}{table}{}", &text[..from], &text[to..])).unwrap();
    } else {
        assert_eq!(&text[from..to], table, "run this test with UPDATE_DOCS=1");
    }
}

#[test]
fn an_image_that_cannot_be_opened_is_refused_before_anything_is_looked_at() {
    let world = World::new(Case::of_image(Image::Gone));
    let error = world.serve(true).unwrap_err();
    assert!(error.downcast_ref::<OpenError>().is_some(), "{error:#}");
    assert!(world.driver.device.borrow().is_some());
}

/// A server whose export is added has two devices recorded while it opens it: one that was left, and the new one.
#[test]
fn of_several_recorded_devices_the_noted_one_is_recovered() {
    struct Two;
    impl Driver for Two {
        fn marked(&self, mark: u64) -> Result<Option<u32>, UblkError> {
            Ok(u32::try_from(mark).ok().filter(|id| *id < 2))
        }

        fn state(&self, _: u32) -> Result<DeviceState, UblkError> {
            Ok(DeviceState::Waiting(crate::request::small_disk(SIZE)))
        }

        fn remove(&self, _: u32) -> Result<(), UblkError> {
            panic!("nothing is to be removed")
        }
    }
    let world = World::new(USUAL);
    let record = |mark| DeviceRecord {
        mark,
        storage: None,
    };
    let limits = crate::request::small_disk(SIZE);
    let wanted = Wanted {
        limits: &limits,
        storage: None,
        opens_ublk: true,
        ublk_id: None,
        block_bytes: None,
        replace: false,
    };
    let name = world.dir.claim(NAME).unwrap();
    let begin = |recorded: &[u64]| {
        let recorded: Vec<_> = recorded.iter().copied().map(record).collect();
        begin(&Two, &name, &recorded, &wanted)
    };
    let recovered = |begun: Result<Beginning>| match begun.unwrap() {
        Beginning::Recover { id, mark, .. } => (id, mark),
        Beginning::New => panic!("it makes a new one"),
    };
    let note = DeviceNote {
        mark: Some(1),
        ..DeviceNote::default()
    };
    name.note_device(&note).unwrap();
    assert_eq!(recovered(begin(&[0, 1])), (1, 1));
    assert_eq!(recovered(begin(&[1, 0])), (1, 1));
    // The new one was not made.
    assert_eq!(recovered(begin(&[0, 7])), (0, 0));
    name.note_device(&DeviceNote::default()).unwrap();
    let why = format!("{:#}", begin(&[0, 1]).unwrap_err());
    assert!(
        why.contains("/dev/ublkb0 and /dev/ublkb1") && why.contains("--remove"),
        "{why}"
    );
}

#[test]
fn a_note_that_cannot_be_read_is_not_taken_for_none() {
    let world = World::new(USUAL);
    let note = world.dir.folder(NAME).join("ublk-id");
    fs::remove_file(&note).unwrap();
    fs::create_dir(&note).unwrap();
    for command in COMMANDS {
        assert_eq!(world.run(command).0, Outcome::Refuses, "{command:?}");
        assert!(note.exists() && world.dir.devices(NAME).unwrap().len() == 1);
    }
}

#[test]
fn what_was_recorded_of_a_device_that_is_gone_is_swept() {
    for (device, left) in [(Device::Gone, 0), (Device::Waiting, 1)] {
        let world = World::new(Case {
            notes: Notes::Lost,
            ..Case::of_device(device)
        });
        fs::remove_dir_all(world.dir.folder(NAME)).unwrap();
        sweep(&world.driver, &world.dir);
        assert_eq!(world.dir.devices(NAME).unwrap().len(), left, "{device:?}");
        assert!(!world.dir.folder(NAME).exists());
    }
    // Not while the export is there: it may be about to make it.
    let world = World::new(Case::of_device(Device::Gone));
    sweep(&world.driver, &world.dir);
    assert_eq!(world.dir.devices(NAME).unwrap().len(), 1);
}
