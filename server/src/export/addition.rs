//! Adding an export to a server that runs and has confined itself.
//!
//! What lies outside of what a confined server reaches is opened by the command that asks, as the same user, and handed
//! over: the name with its folder ([`spares`](super::spares)), the sockets, the image.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::admin::{self, ExportStatus, HandedOver, NewExport, ServerStatus};
use super::name_lock::{CONTROL, NameLock, VHOST_SOCKET};
use super::runtime_dir::RuntimeDir;
use super::spares::Spares;
use crate::config::{DoorMode, ExportConfig, StorageSpec, check_name};
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
            match kind {
                HandedOver::Lock => lock = Some(File::from(descriptor)),
                HandedOver::Control => {
                    let socket = Socket::adopt(descriptor).with_context(what("admin socket"))?;
                    handed.control = Some(socket);
                }
                HandedOver::VhostUserBlk => {
                    let socket =
                        Socket::adopt(descriptor).with_context(what("vhost-user socket"))?;
                    handed.vhost = Some(socket);
                }
                HandedOver::Image => handed.image = Some(File::from(descriptor)),
            }
        }
        let lock = lock.context("the lock of its name was not handed over")?;
        let name = new.served.options.name.clone().unwrap_or_default();
        check_name(&name)?;
        let home = new.spare.zip(spares);
        let home = home.and_then(|(number, spares)| spares.home(number));
        // From here on the folder is cleared with this value.
        let claim = dir.adopt(&name, lock, home)?;
        // Dropped before the folder that the sockets are in.
        let handed = handed;
        let mut config = new.served.export()?;
        if sandbox::status().on {
            confine(&mut config)?;
        }
        Ok(Self {
            config,
            handed,
            claim,
        })
    }
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
    let (is_confined, name) = (server.sandbox.on, &config.name);
    let (claim, spare) = dir.claim_in_server(&server.server, is_confined, name)?;
    let is_device = |file: &File| {
        let found = file.metadata();
        found.is_ok_and(|found| found.file_type().is_block_device())
    };
    let image = match &config.storage {
        StorageSpec::File { path, .. } => {
            let later = claims_later(config);
            let file = open_file(path, config.read_only, later)?;
            ensure!(
                !(is_confined && later && is_device(&file)),
                "a guest that may move (migration) needs {} opened again, which a confined server does not do for an \
                 export that is added: serve it by another server, or start this one with --sandbox=no",
                path.display()
            );
            Some(file)
        }
        StorageSpec::Null { .. } | StorageSpec::Memory { .. } => None,
    };
    let control = Socket::bind(&claim.folder().join(CONTROL), &config.admin_access)?;
    let vhost = match config.vhost {
        DoorMode::No => None,
        DoorMode::Auto | DoorMode::Yes => {
            let default = || claim.folder().join(VHOST_SOCKET);
            let path = config.vhost_socket.clone().unwrap_or_else(default);
            Some(Socket::bind(&path, &config.vhost_access)?)
        }
    };
    let mut handed: Vec<(HandedOver, BorrowedFd<'_>)> = vec![
        (HandedOver::Lock, claim.lock().as_fd()),
        (HandedOver::Control, control.as_fd()),
    ];
    handed.extend(
        vhost
            .as_ref()
            .map(|socket| (HandedOver::VhostUserBlk, socket.as_fd())),
    );
    handed.extend(image.as_ref().map(|file| (HandedOver::Image, file.as_fd())));
    let (kinds, descriptors): (_, Vec<_>) = handed.into_iter().unzip();
    let new = NewExport {
        // A confined server cannot look at accounts.
        served: config.saved.clone().by_number()?,
        spare,
        descriptors: kinds,
    };
    let request = admin::send_export(&dir.server_socket(&server.server), new, &descriptors, limit)?;
    // From here on all of it is the server's.
    claim.leave();
    control.hand_over();
    vhost.into_iter().for_each(Socket::hand_over);
    request.answer()
}
