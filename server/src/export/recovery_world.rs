//! A dead server's block device, notes and image in all states, and a driver that has one device.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;

use super::super::*;
use crate::engine::StorageControl as _;
use crate::export::name_lock::DeviceNote;
use crate::request::Serial;
use crate::storage::{CacheMode, File, FileOptions};

pub(super) const NAME: &str = "disk";
pub(super) const MARK: u64 = 77;
pub(super) const SIZE: u64 = 1 << 20;

/// What is there of a block device with the number that was noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    Gone,
    Waiting,
    Dead,
    Served,
    /// Another program's, which waits.
    Foreign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notes {
    There,
    /// Written by a guest that has taken the server over, perhaps, to name the device of another export: there is no record.
    Unrecorded,
    /// There is the record alone.
    Lost,
    /// There is nothing.
    AllLost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Image {
    Same,
    Larger,
    Gone,
    Shorter,
    Replaced,
    Claimed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Options {
    Same,
    ReadOnly,
    BlockSize,
    NoUblk,
    OtherId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// `serve`, `serve --take-over`, `recover`, with or without `--take-over`, when no server lives.
    Serve,
    /// `serve --replace`, `recover --replace`.
    Replace,
    /// `stop --force`, `doctor --clean`.
    Clean,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Recovers,
    New,
    Removes,
    Refuses,
    Nothing,
}

pub(super) const DEVICES: [Device; 5] = [
    Device::Waiting,
    Device::Dead,
    Device::Gone,
    Device::Served,
    Device::Foreign,
];
pub(super) const IMAGES: [Image; 6] = [
    Image::Same,
    Image::Larger,
    Image::Gone,
    Image::Shorter,
    Image::Replaced,
    Image::Claimed,
];
pub(super) const OPTIONS: [Options; 5] = [
    Options::Same,
    Options::ReadOnly,
    Options::BlockSize,
    Options::NoUblk,
    Options::OtherId,
];
pub(super) const COMMANDS: [Command; 3] = [Command::Serve, Command::Replace, Command::Clean];

#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) device: Device,
    pub(super) notes: Notes,
    pub(super) image: Image,
    pub(super) options: Options,
}

pub(super) const USUAL: Case = Case {
    device: Device::Waiting,
    notes: Notes::There,
    image: Image::Same,
    options: Options::Same,
};

pub(super) const UNRECORDED: Case = Case {
    notes: Notes::Unrecorded,
    ..USUAL
};

impl Case {
    pub(super) fn of_image(image: Image) -> Self {
        Self { image, ..USUAL }
    }

    pub(super) fn of_options(options: Options) -> Self {
        Self { options, ..USUAL }
    }

    pub(super) fn of_device(device: Device) -> Self {
        Self { device, ..USUAL }
    }
}

pub(super) const USUAL_LEFT: (Device, Notes, Options) = (USUAL.device, USUAL.notes, USUAL.options);

/// A driver with one device, number 3.
pub(super) struct Fake {
    pub(super) device: RefCell<Option<(u64, Device)>>,
    pub(super) limits: Limits,
}

impl Driver for Fake {
    fn marked(&self, mark: u64) -> Result<Option<u32>, UblkError> {
        let device = *self.device.borrow();
        Ok(device.filter(|(its, _)| *its == mark).map(|_| 3))
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

pub(super) struct World {
    pub(super) temp: tempfile::TempDir,
    pub(super) dir: RuntimeDir,
    pub(super) driver: Fake,
    pub(super) case: Case,
    /// Keeps the image claimed.
    pub(super) _other: Option<File>,
}

impl World {
    pub(super) fn new(case: Case) -> Self {
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
            mark: Some(MARK),
            storage: storage.identity(),
        };
        if !matches!(self.case.notes, Notes::Unrecorded | Notes::AllLost) {
            let record = DeviceRecord {
                mark: MARK,
                storage: note.storage.clone(),
            };
            let file = self.dir.device_record(NAME).unwrap();
            file.replace(&DeviceRecord::text(&[record]), || {}).unwrap();
        }
        if !matches!(self.case.notes, Notes::Lost | Notes::AllLost) {
            name.note_device(&note).unwrap();
        }
        name.leave();
        *self.driver.device.borrow_mut() = match self.case.device {
            Device::Gone => None,
            Device::Foreign => Some((MARK + 5, Device::Foreign)),
            other => Some((MARK, other)),
        };
    }

    pub(super) fn run(&self, command: Command) -> (Outcome, String) {
        let before = *self.driver.device.borrow();
        let refused = |error: anyhow::Error| (Outcome::Refuses, format!("{error:#}"));
        let (outcome, why) = match command {
            Command::Clean => match self
                .dir
                .claim(NAME)
                .and_then(|name| clean(&self.driver, &name, &self.dir.devices(NAME)?))
            {
                Ok(Some(_)) => (Outcome::Removes, String::new()),
                Ok(None) => (Outcome::Nothing, String::new()),
                Err(error) => refused(error),
            },
            Command::Serve => self.serve(false).map_or_else(refused, |begun| match begun {
                Beginning::New => (Outcome::New, String::new()),
                Beginning::Recover { id, mark, limits } => {
                    let found = (id, mark, limits.block_bytes);
                    assert_eq!(found, (3, MARK, 512), "{:?}", self.case);
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

    pub(super) fn serve(&self, replace: bool) -> Result<Beginning> {
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
        begin(&self.driver, &name, &self.dir.devices(NAME)?, &wanted)
    }
}

pub(super) fn options(path: PathBuf, options: Options) -> FileOptions {
    FileOptions {
        export: "test".into(),
        path,
        cache: CacheMode::Buffered,
        format: None,
        read_only: options == Options::ReadOnly,
        block_bytes: (options == Options::BlockSize).then_some(4096),
        serial: Serial::default(),
        claim_later: false,
    }
}
