//! An export that is added to a server which runs and has confined itself: the server's side.
//!
//! What lies outside of what a confined server reaches is opened by the command that asks ([`add`](super::add)), as the
//! same user, and handed over: the name with its folder ([`spares`](super::spares)), the sockets, the image.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::admin::{ExportStatus, HandedOver, NewExport, Wanted};
use super::name_lock::NameLock;
use super::runtime_dir::RuntimeDir;
use super::spares::Spares;
use crate::config::{DoorMode, ExportConfig, SavedExport, StorageSpec, check_name};
use crate::door::ublk::NodeElsewhere;
use crate::engine::sandbox;
use crate::engine::socket::Socket;

/// An export as it arrives at the server.
#[derive(Debug)]
pub struct Addition {
    pub(super) config: ExportConfig,
    pub(super) handed: Handed,
    /// Declared after what is in its folder.
    pub(super) claim: NameLock,
}

/// Where the command that asked for an export waits for its end.
pub type Answer = Sender<Result<ExportStatus>>;

/// What was opened for an export by another process.
#[derive(Debug, Default)]
pub(super) struct Handed {
    pub(super) control: Option<Socket>,
    pub(super) vhost: Option<Socket>,
    pub(super) image: Option<File>,
    pub(super) mark: Option<u64>,
    pub(super) left_marks: Vec<u64>,
    /// Opens what this process cannot when there is to be a block device.
    pub(super) opener: Option<Opener>,
    /// The folder in which that links character devices.
    pub(super) devices: Option<PathBuf>,
}

/// The command that adds an export, as the server sees it: it opens what the server wants while it opens the export.
#[derive(Clone, Debug)]
pub(super) struct Opener(Sender<Errand>);

/// Something to open.
#[derive(Debug)]
pub(super) struct Errand {
    wanted: Wanted,
    done: Sender<Result<Vec<OwnedFd>>>,
}

impl Opener {
    /// And what it is asked for, as long as it is there.
    pub(super) fn new() -> (Self, Receiver<Errand>) {
        let (ask, errands) = mpsc::channel();
        (Self(ask), errands)
    }

    /// Has something opened.
    fn open(&self, wanted: Wanted) -> Result<Vec<OwnedFd>> {
        let (done, is_done) = mpsc::channel();
        let gone = "the command that adds the export has gone";
        (self.0.send(Errand { wanted, done })).map_err(|_| anyhow!(gone))?;
        is_done.recv().context(gone)?
    }

    /// Has the entry in the registry made for the disk of a ublk device.
    pub(super) fn upgrade_entry(&self, number: u32) -> Result<OwnedFd> {
        let mut opened = self.open(Wanted::UpgradeEntry(number))?;
        opened.pop().context("no socket came with the entry")
    }
}

impl Errand {
    pub(super) fn run(self, open: impl FnOnce(Wanted) -> Result<Vec<OwnedFd>>) {
        // Who asked waits.
        let _ = self.done.send(open(self.wanted));
    }
}

impl Handed {
    /// How the character device of a ublk device is reached, if not in `/dev`.
    pub(super) fn elsewhere(&self) -> Option<NodeElsewhere> {
        let (folder, opener) = self.devices.clone().zip(self.opener.clone())?;
        let link = move |number| {
            let opened = opener.open(Wanted::UblkDevice(number));
            opened.map(drop).map_err(io::Error::other)
        };
        Some(NodeElsewhere {
            folder,
            link: Arc::new(link),
        })
    }
}

/// What a server has for exports that are added.
#[derive(Debug)]
pub(super) struct Host<'a> {
    pub(super) dir: &'a RuntimeDir,
    pub(super) spares: Option<&'a Spares>,
    /// Where the character devices of ublk devices are linked, if the server is confined and makes some.
    pub(super) devices: Option<&'a Path>,
}

impl Addition {
    /// Takes what a command hands over; `opener` is that command.
    ///
    /// # Errors
    ///
    /// When it is not what the command says, or cannot be served by a confined server.
    pub(super) fn receive(
        host: &Host<'_>,
        new: NewExport,
        descriptors: Vec<OwnedFd>,
        opener: Opener,
    ) -> Result<Self> {
        ensure!(
            descriptors.len() == new.descriptors.len(),
            "{} descriptors were announced, and {} came",
            new.descriptors.len(),
            descriptors.len()
        );
        let (mut lock, mut handed) = (None, Handed::default());
        let what = |what| move || format!("the {what} that was handed over cannot be used");
        for (kind, descriptor) in new.descriptors.into_iter().zip(descriptors) {
            let was_there = match kind {
                HandedOver::Lock => lock.replace(File::from(descriptor)).is_some(),
                HandedOver::Control => {
                    let socket = Socket::adopt(descriptor).with_context(what("admin socket"))?;
                    handed.control.replace(socket).is_some()
                }
                HandedOver::VhostUserBlk => {
                    let socket =
                        Socket::adopt(descriptor).with_context(what("vhost-user socket"))?;
                    handed.vhost.replace(socket).is_some()
                }
                HandedOver::Image => handed.image.replace(File::from(descriptor)).is_some(),
            };
            ensure!(!was_there, "of {kind:?} two were handed over");
        }
        let lock = lock.context("the lock of its name was not handed over")?;
        let name = new.served.options.name.clone().unwrap_or_default();
        check_name(&name)?;
        let home = new.spare.zip(host.spares);
        let home = home.and_then(|(number, spares)| spares.home(number));
        ensure!(
            home.is_some() || !sandbox::status().on && new.spare.is_none(),
            "its folder is none of those that this server has ready"
        );
        // From here on the folder is cleared with this value.
        let claim = host.dir.adopt(&name, lock, home)?;
        // Dropped before the folder that the sockets are in.
        let mut handed = handed;
        // A client that gives no mark opens nothing.
        let devices = host.devices.filter(|_| new.mark.is_some());
        handed.mark = new.mark;
        handed.left_marks = new.left_marks;
        handed.devices = devices.map(Path::to_owned);
        handed.opener = devices.map(|_| opener);
        Ok(Self {
            config: configure(new.served, &handed)?,
            handed,
            claim,
        })
    }
}

/// What is to be served, with what was handed over.
fn configure(served: SavedExport, handed: &Handed) -> Result<ExportConfig> {
    let mut config = served.export()?;
    let wants_image = matches!(config.storage, StorageSpec::File { .. });
    let wants_vhost = config.vhost != DoorMode::No;
    let fits = handed.image.is_some() == wants_image
        && handed.vhost.is_some() == wants_vhost
        && handed.control.is_some();
    ensure!(fits, "what was handed over is not what the export needs");
    if sandbox::status().on {
        confine(&mut config, handed.devices.is_some())?;
    }
    Ok(config)
}

/// Leaves out what a confined server cannot do, or refuses.
fn confine(config: &mut ExportConfig, makes_devices: bool) -> Result<()> {
    match config.ublk {
        DoorMode::No => {}
        DoorMode::Auto | DoorMode::Yes if makes_devices => {}
        DoorMode::Auto => {
            let name = &config.name;
            tracing::info!("{name}: no ublk door: this server has given up making block devices");
            config.ublk = DoorMode::No;
        }
        DoorMode::Yes => bail!(
            "this server has given up making block devices, since it was started without one of an administrator: \
             serve it by another server, start this one with a block device or --sandbox=no, or give ublk=no"
        ),
    }
    Ok(())
}

/// Whether the storage is claimed only while a client has the disk, so that other servers can have it.
/// A ublk door would use it all the time.
pub(super) fn claims_later(config: &ExportConfig) -> bool {
    config.migration && config.ublk == DoorMode::No && !config.read_only
}

/// Where confined servers find the character devices of ublk devices that they make: on the file system of `/dev`, each
/// below a folder of its own.
pub(super) fn device_folders() -> Result<RuntimeDir> {
    RuntimeDir::find(Some("/dev/ublkup".into()))
}
