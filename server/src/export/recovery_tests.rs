use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use super::*;
use crate::engine::StorageControl as _;
use crate::export::runtime_dir::RuntimeDir;
use crate::request::Serial;
use crate::storage::{CacheMode, File, FileOptions, OpenError};

const NAME: &str = "disk";
const MARK: u64 = 77;
const SIZE: u64 = 1 << 20;

/// What is there of a block device with the number that was noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Gone,
    Waiting,
    Dead,
    Served,
    /// Another program's, which waits.
    Foreign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notes {
    There,
    /// By a version that noted neither a mark nor the file.
    Old,
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Image {
    Same,
    Larger,
    Gone,
    Shorter,
    Replaced,
    Claimed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Options {
    Same,
    ReadOnly,
    BlockSize,
    NoUblk,
    OtherId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    /// `serve`, `serve --take-over`, `recover`, with or without `--take-over`, when no server lives.
    Serve,
    /// `serve --replace`, `recover --replace`.
    Replace,
    /// `stop --force`, `doctor --clean`.
    Clean,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Recovers,
    New,
    Removes,
    Refuses,
    Nothing,
}

const DEVICES: [Device; 5] = [
    Device::Waiting,
    Device::Dead,
    Device::Gone,
    Device::Served,
    Device::Foreign,
];
const IMAGES: [Image; 6] = [
    Image::Same,
    Image::Larger,
    Image::Gone,
    Image::Shorter,
    Image::Replaced,
    Image::Claimed,
];
const OPTIONS: [Options; 5] = [
    Options::Same,
    Options::ReadOnly,
    Options::BlockSize,
    Options::NoUblk,
    Options::OtherId,
];
const COMMANDS: [Command; 3] = [Command::Serve, Command::Replace, Command::Clean];

#[derive(Clone, Copy, Debug)]
struct Case {
    device: Device,
    notes: Notes,
    image: Image,
    options: Options,
}

const USUAL: Case = Case {
    device: Device::Waiting,
    notes: Notes::There,
    image: Image::Same,
    options: Options::Same,
};

const USUAL_LEFT: (Device, Notes, Options) = (USUAL.device, USUAL.notes, USUAL.options);

/// A driver with one device, number 3.
struct Fake {
    device: RefCell<Option<(u64, Device)>>,
    limits: Limits,
}

impl Driver for Fake {
    fn marked(&self, mark: u64) -> Result<Option<u32>, UblkError> {
        let device = *self.device.borrow();
        Ok(device.filter(|(its, _)| *its == mark).map(|_| 3))
    }

    fn disk_sequence(&self, id: u32) -> Option<u64> {
        let (mark, _) = (*self.device.borrow()).filter(|_| id == 3)?;
        Some(mark + 1)
    }

    fn state(&self, id: u32) -> Result<DeviceState, UblkError> {
        Ok(match *self.device.borrow() {
            None => DeviceState::Gone,
            Some((_, Device::Dead)) => DeviceState::Dead,
            Some((_, Device::Served)) => {
                return Err(UblkError::Alive {
                    id,
                    why: "process 1 still serves it".into(),
                });
            }
            Some(_) => DeviceState::Waiting(self.limits.clone()),
        })
    }

    fn remove(&self, id: u32) -> Result<(), UblkError> {
        self.state(id)?;
        *self.device.borrow_mut() = None;
        Ok(())
    }
}

struct World {
    temp: tempfile::TempDir,
    dir: RuntimeDir,
    driver: Fake,
    case: Case,
    /// Keeps the image claimed.
    _other: Option<File>,
}

impl World {
    fn new(case: Case) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::find(Some(temp.path().join("run"))).unwrap();
        let image = temp.path().join("image");
        let make = |path: &PathBuf, size| fs::File::create(path).unwrap().set_len(size).unwrap();
        make(&image, SIZE);
        let mut world = Self {
            temp,
            dir,
            driver: Fake {
                device: RefCell::default(),
                limits: File::open(options(image.clone(), Options::Same))
                    .unwrap()
                    .limits()
                    .clone(),
            },
            case,
            _other: None,
        };
        // The capacity is shared by all copies of the limits.
        world.driver.limits.capacity = SIZE.into();
        world.before();
        match case.image {
            Image::Same => {}
            Image::Larger => make(&image, 2 * SIZE),
            Image::Shorter => make(&image, SIZE / 2),
            Image::Gone => fs::remove_file(&image).unwrap(),
            Image::Replaced => {
                let new = image.with_extension("new");
                make(&new, SIZE);
                fs::rename(new, &image).unwrap();
            }
            Image::Claimed => {
                world._other = Some(File::open(options(image, Options::Same)).unwrap());
            }
        }
        world
    }

    fn image(&self) -> PathBuf {
        self.temp.path().join("image")
    }

    /// What the dead server did.
    fn before(&self) {
        let name = self.dir.claim(NAME).unwrap();
        let storage = File::open(options(self.image(), Options::Same)).unwrap();
        let note = DeviceNote {
            id: Some(3),
            disk_sequence: Some(MARK + 1),
            mark: (self.case.notes == Notes::There).then_some(MARK),
            storage: (self.case.notes == Notes::There)
                .then(|| storage.identity())
                .flatten(),
        };
        if self.case.notes != Notes::Lost {
            name.note_device(&note).unwrap();
        }
        name.leave();
        *self.driver.device.borrow_mut() = match self.case.device {
            Device::Gone => None,
            Device::Foreign => Some((MARK + 5, Device::Foreign)),
            other => Some((MARK, other)),
        };
    }

    fn run(&self, command: Command) -> (Outcome, String) {
        let before = *self.driver.device.borrow();
        let refused = |error: anyhow::Error| (Outcome::Refuses, format!("{error:#}"));
        let (outcome, why) = match command {
            Command::Clean => match self
                .dir
                .claim(NAME)
                .and_then(|name| clean(&self.driver, &name))
            {
                Ok(Some(_)) => (Outcome::Removes, String::new()),
                Ok(None) => (Outcome::Nothing, String::new()),
                Err(error) => refused(error),
            },
            Command::Serve => self.serve(false).map_or_else(refused, |begun| match begun {
                Beginning::New => (Outcome::New, String::new()),
                Beginning::Recover { id, limits } => {
                    assert_eq!((id, limits.block_bytes), (3, 512), "{:?}", self.case);
                    (Outcome::Recovers, String::new())
                }
            }),
            Command::Replace => self
                .serve(true)
                .map_or_else(refused, |_| (Outcome::New, String::new())),
        };
        let is_gone = before.is_some() && self.driver.device.borrow().is_none();
        match outcome {
            Outcome::New if is_gone => (Outcome::Removes, why),
            _ => {
                let removed = is_gone && outcome != Outcome::Removes;
                assert!(
                    !removed,
                    "{:?} {command:?}: {outcome:?} and removed",
                    self.case
                );
                (outcome, why)
            }
        }
    }

    fn serve(&self, replace: bool) -> Result<Beginning> {
        let name = self.dir.claim(NAME)?;
        let disk = File::open(options(self.image(), self.case.options))?;
        let identity = disk.identity();
        let wanted = Wanted {
            limits: disk.limits(),
            storage: identity.as_deref(),
            opens_ublk: self.case.options != Options::NoUblk,
            ublk_id: (self.case.options == Options::OtherId).then_some(9),
            block_bytes: (self.case.options == Options::BlockSize).then_some(4096),
            replace,
        };
        begin(&self.driver, &name, &wanted)
    }
}

fn options(path: PathBuf, options: Options) -> FileOptions {
    FileOptions {
        path,
        cache: CacheMode::Buffered,
        read_only: options == Options::ReadOnly,
        block_bytes: (options == Options::BlockSize).then_some(4096),
        serial: Serial::default(),
        claim_later: false,
    }
}

/// What is right, said another way than in the code.
fn expected(case: Case, command: Command) -> Outcome {
    let is_known =
        case.notes != Notes::Lost && !matches!(case.device, Device::Gone | Device::Foreign);
    let opens = !matches!(case.image, Image::Gone | Image::Claimed);
    match command {
        Command::Clean if !is_known => Outcome::Nothing,
        Command::Clean if case.device == Device::Served => Outcome::Refuses,
        Command::Clean => Outcome::Removes,
        Command::Serve | Command::Replace if !opens => Outcome::Refuses,
        _ if !is_known => Outcome::New,
        _ if case.device == Device::Served => Outcome::Refuses,
        _ if case.device == Device::Dead => Outcome::Removes,
        Command::Replace => Outcome::Removes,
        Command::Serve if case.options != Options::Same => Outcome::Refuses,
        Command::Serve => match (case.image, case.notes) {
            (Image::Same | Image::Larger, _) | (Image::Replaced, Notes::Old) => Outcome::Recovers,
            _ => Outcome::Refuses,
        },
    }
}

#[test]
fn a_waiting_device_is_gone_on_with_or_left_unless_a_person_says_remove() {
    let mut cases = 0;
    for device in DEVICES {
        for notes in [Notes::There, Notes::Old, Notes::Lost] {
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
                        if notes != Notes::Lost {
                            let noted = world.dir.device(NAME);
                            assert!(noted.is_some(), "{case:?} {command:?}: the note is lost");
                        }
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
        (
            Case {
                image: Image::Shorter,
                ..USUAL
            },
            ["has 512K", "device 1M"],
        ),
        (
            Case {
                image: Image::Replaced,
                ..USUAL
            },
            ["not the one that was served", "put"],
        ),
        (
            Case {
                options: Options::ReadOnly,
                ..USUAL
            },
            ["read-only", "writable"],
        ),
        (
            Case {
                options: Options::BlockSize,
                ..USUAL
            },
            ["4096", "block-size"],
        ),
        (
            Case {
                options: Options::NoUblk,
                ..USUAL
            },
            ["option ublk", "closed"],
        ),
        (
            Case {
                options: Options::OtherId,
                ..USUAL
            },
            ["ublk-id", "9"],
        ),
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
        (
            "waits; the file has grown",
            Case {
                image: Image::Larger,
                ..USUAL
            },
        ),
        (
            "waits; the file is shorter",
            Case {
                image: Image::Shorter,
                ..USUAL
            },
        ),
        (
            "waits; another file is at the path",
            Case {
                image: Image::Replaced,
                ..USUAL
            },
        ),
        (
            "waits; the file is gone",
            Case {
                image: Image::Gone,
                ..USUAL
            },
        ),
        (
            "waits; another program has the file",
            Case {
                image: Image::Claimed,
                ..USUAL
            },
        ),
        (
            "waits; `read-only` was changed",
            Case {
                options: Options::ReadOnly,
                ..USUAL
            },
        ),
        (
            "waits; `block-size` was changed",
            Case {
                options: Options::BlockSize,
                ..USUAL
            },
        ),
        (
            "waits; `ublk=no` now, or no usable driver",
            Case {
                options: Options::NoUblk,
                ..USUAL
            },
        ),
        (
            "waits; another `ublk-id`",
            Case {
                options: Options::OtherId,
                ..USUAL
            },
        ),
        (
            "waits; the notes are lost",
            Case {
                notes: Notes::Lost,
                ..USUAL
            },
        ),
        (
            "dead",
            Case {
                device: Device::Dead,
                ..USUAL
            },
        ),
        (
            "dead; the file is gone",
            Case {
                device: Device::Dead,
                image: Image::Gone,
                ..USUAL
            },
        ),
        (
            "has a server that lives",
            Case {
                device: Device::Served,
                ..USUAL
            },
        ),
        (
            "another program's has the number",
            Case {
                device: Device::Foreign,
                ..USUAL
            },
        ),
        (
            "none",
            Case {
                device: Device::Gone,
                ..USUAL
            },
        ),
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
    let world = World::new(Case {
        image: Image::Gone,
        ..USUAL
    });
    let error = world.serve(true).unwrap_err();
    assert!(error.downcast_ref::<OpenError>().is_some(), "{error:#}");
    assert!(world.driver.device.borrow().is_some());
}
