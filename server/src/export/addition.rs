//! Adding an export to a server that runs and has confined itself.
//!
//! What lies outside of what a confined server reaches is opened by the command that asks, as the same user, and handed
//! over: the name with its folder ([`spares`](super::spares)), the sockets, the image.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::admin::{self, ExportStatus, HandedOver, NewExport, ServerStatus};
use super::name_lock::{CONTROL, NameLock, VHOST_SOCKET};
use super::runtime_dir::RuntimeDir;
use super::spares::Spares;
use crate::config::{DoorMode, ExportConfig, Origin, SavedExport, StorageSpec, check_name};
use crate::engine::durable::NoteFile;
use crate::engine::sandbox;
use crate::engine::socket::Socket;
use crate::storage::open_file;

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
}

impl Addition {
    /// Takes what a command hands over.
    ///
    /// # Errors
    ///
    /// When it is not what the command says, or cannot be served by a confined server.
    pub(super) fn receive(
        dir: &RuntimeDir,
        spares: Option<&Spares>,
        new: NewExport,
        descriptors: Vec<OwnedFd>,
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
        let home = new.spare.zip(spares);
        let home = home.and_then(|(number, spares)| spares.home(number));
        ensure!(
            home.is_some() || !sandbox::status().on && new.spare.is_none(),
            "its folder is none of those that this server has ready"
        );
        // From here on the folder is cleared with this value.
        let claim = dir.adopt(&name, lock, home)?;
        // Dropped before the folder that the sockets are in.
        let handed = handed;
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
        confine(&mut config)?;
    }
    Ok(config)
}

/// Leaves out what a confined server cannot do, or refuses.
fn confine(config: &mut ExportConfig) -> Result<()> {
    match config.ublk {
        DoorMode::No => {}
        DoorMode::Auto => {
            tracing::info!(
                "{}: no ublk door: a confined server makes no block devices",
                config.name
            );
            config.ublk = DoorMode::No;
        }
        DoorMode::Yes => bail!(
            "a server that has confined itself makes no block devices: serve it by another server, start this one \
             with --sandbox=no, or give ublk=no"
        ),
    }
    Ok(())
}

/// Whether the storage is claimed only while a client has the disk, so that other servers can have it.
/// A ublk door would use it all the time.
pub(super) fn claims_later(config: &ExportConfig) -> bool {
    config.migration && config.ublk == DoorMode::No && !config.read_only
}

/// The record of an export for the next server of the name, out of the reach of this one.
struct Record {
    file: NoteFile,
    before: Option<String>,
}

impl Record {
    /// Records what is about to be added.
    fn write(dir: &RuntimeDir, name: &str, served: &SavedExport) -> Result<Self> {
        let file = dir.export_record(name)?;
        let before = file.read()?;
        let text = match &served.origin {
            Origin::Added(_) => Some(serde_json::to_string(served)?),
            // The configuration file has it.
            Origin::Config | Origin::CommandLine => None,
        };
        put(&file, text.as_deref())?;
        Ok(Self { file, before })
    }

    /// Makes it what it was.
    fn undo(&self) {
        if let Err(error) = put(&self.file, self.before.as_deref()) {
            tracing::warn!("cannot restore the record of an export: {error:#}");
        }
    }
}

fn put(file: &NoteFile, text: Option<&str>) -> Result<()> {
    let done = match text {
        Some(text) => file.replace(text, || {}),
        None => file.remove(),
    };
    done.context("it cannot be noted for the next server")
}

/// Adds an export to a server.
///
/// # Errors
///
/// Why the server does not have it; then nothing is left of it.
pub fn add(
    dir: &RuntimeDir,
    server: &ServerStatus,
    config: &ExportConfig,
    limit: Duration,
) -> Result<ExportStatus> {
    let is_confined = server.sandbox.on;
    let mut as_served = config.clone();
    if is_confined && as_served.ublk == DoorMode::Auto {
        as_served.ublk = DoorMode::No;
    }
    // Before the name is taken, and with it what a dead server left under it.
    let image = open_image(&as_served, is_confined)?;
    // A confined server cannot look at accounts.
    let served = config.saved.clone().by_number()?;
    let (claim, spare) = dir.claim_in_server(&server.server, is_confined, &config.name)?;
    let sockets = bind(config, &claim)?;
    let mut handed = vec![(HandedOver::Lock, claim.lock().as_fd())];
    let kinds = [HandedOver::Control, HandedOver::VhostUserBlk];
    handed.extend(kinds.into_iter().zip(sockets.iter().map(Socket::as_fd)));
    handed.extend(image.iter().map(|file| (HandedOver::Image, file.as_fd())));
    let (kinds, descriptors): (_, Vec<BorrowedFd<'_>>) = handed.into_iter().unzip();
    let record = Record::write(dir, &config.name, &served)?;
    let new = NewExport {
        served,
        spare,
        descriptors: kinds,
    };
    let socket = dir.server_socket(&server.server);
    match admin::add(&socket, new, &descriptors, limit) {
        Ok(status) => {
            claim.leave();
            sockets.into_iter().for_each(Socket::hand_over);
            Ok(status)
        }
        Err(error) => {
            clean_up(dir, claim, sockets, &record);
            Err(error)
        }
    }
}

/// Opens the image.
fn open_image(config: &ExportConfig, is_confined: bool) -> Result<Option<File>> {
    let StorageSpec::File { path, .. } = &config.storage else {
        return Ok(None);
    };
    let later = claims_later(config);
    let file = open_file(path, config.read_only, later)?;
    let is_device = file.metadata()?.file_type().is_block_device();
    ensure!(
        !(is_confined && later && is_device),
        "a guest that may move (migration) needs {} opened again, which a confined server does not do for an export that \
         is added: serve it by another server, or start this one with --sandbox=no",
        path.display()
    );
    Ok(Some(file))
}

/// Binds the admin socket, and behind it the one of the vhost-user door if there is to be one.
fn bind(config: &ExportConfig, claim: &NameLock) -> Result<Vec<Socket>> {
    let control = claim.folder().join(CONTROL);
    let mut sockets = vec![Socket::bind(&control, &config.admin_access)?];
    if config.vhost != DoorMode::No {
        let default = || claim.folder().join(VHOST_SOCKET);
        let path = config.vhost_socket.clone().unwrap_or_else(default);
        sockets.push(Socket::bind(&path, &config.vhost_access)?);
    }
    Ok(sockets)
}

/// Removes what was made for an export that a server did not take, if it has not done so, and does not have it.
fn clean_up(dir: &RuntimeDir, claim: NameLock, sockets: Vec<Socket>, record: &Record) {
    let (name, folder, home) = (
        claim.name().to_owned(),
        Arc::clone(&claim.dir),
        claim.home.clone(),
    );
    // The server may have its lock, which is the same.
    claim.leave();
    match dir.claim(&name) {
        Ok(mut again) => {
            drop(sockets);
            record.undo();
            if dir.is_folder_of(&name, &folder) {
                again.home = home;
            }
            drop(again.keep_notes());
        }
        Err(_) => sockets.into_iter().for_each(Socket::hand_over),
    }
}
