//! Adding an export to a server that runs, as the command does it that was told to.
//!
//! The command is the same user as the server, or root, and may open what a confined server cannot; and since such a server may
//! not be what it was, it records what is added where that one cannot write ([`addition`](super::addition) is its side).

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, CWD, linkat, unlinkat};
use rustix::io::Errno;
use upgrade_proto::{Peer, TrustedDir};

use super::addition::{claims_later, device_folders};
use super::admin::{
    self, ExportStatus, HandedOver, NewExport, OPEN_INTERVAL, ServerStatus, Wanted,
};
use super::name_lock::{CONTROL, DeviceRecord, NameLock, VHOST_SOCKET, new_mark};
use super::recovery::{self, Kernel, is_same_storage};
use super::runtime_dir::RuntimeDir;
use super::upgrade;
use crate::config::{DoorMode, ExportConfig, SavedExport, StorageSpec};
use crate::door::ublk::{self, is_marked};
use crate::engine::durable::NoteFile;
use crate::engine::socket::Socket;
use crate::engine::wait::repeat_while;
use crate::storage::{identity, open_file};

/// The devices that a dead server of the name has left. What is of use to no program is removed, which a confined server
/// cannot do.
fn left_devices(dir: &RuntimeDir, name: &str) -> Result<Vec<DeviceRecord>> {
    recovery::sweep(&Kernel, dir);
    let mut recorded = dir.devices(name)?;
    recorded.retain(|device| !is_gone(device.mark) && !recovery::remove_dead(&Kernel, device.mark));
    Ok(recorded)
}

/// Whether there is no device with a mark. Where that cannot be known there may be one.
fn is_gone(mark: u64) -> bool {
    matches!(ublk::marked(mark), Ok(None))
}

/// The records of an export, out of the reach of its server, with what they were before. That of the block device comes
/// last.
struct Record(Vec<(NoteFile, Option<String>)>);

impl Record {
    /// Records what is about to be added, and its block device beside those that were left, if it is to have one.
    fn write(
        dir: &RuntimeDir,
        name: &str,
        served: &SavedExport,
        left: &[DeviceRecord],
        device: Option<DeviceRecord>,
    ) -> Result<Self> {
        let mut texts = vec![(dir.export_record(name)?, serde_json::to_string(served)?)];
        if let Some(device) = device {
            let all = [left, &[device]].concat();
            texts.push((dir.device_record(name)?, DeviceRecord::text(&all)));
        }
        let mut record = Self(Vec::new());
        for (file, text) in texts {
            let written = file.read().map_err(Into::into).and_then(|before| {
                put(&file, Some(&text))?;
                Ok(before)
            });
            match written {
                Ok(before) => record.0.push((file, before)),
                Err(error) => {
                    record.undo();
                    return Err(error);
                }
            }
        }
        Ok(record)
    }

    /// Makes it what it was.
    fn undo(&self) {
        restore(&self.0);
    }

    /// Makes that of the block device what it was: none was made.
    fn undo_device(&self) {
        restore(&self.0[1..]);
    }
}

fn restore(files: &[(NoteFile, Option<String>)]) {
    for (file, before) in files {
        if let Err(error) = put(file, before.as_deref()) {
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
    let makes_devices = server.makes_block_devices || !is_confined;
    if !makes_devices && as_served.ublk == DoorMode::Auto {
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
    let left = left_devices(dir, &config.name)?;
    let device = (makes_devices && as_served.ublk != DoorMode::No).then(|| DeviceRecord {
        mark: new_mark(),
        storage: image.as_ref().and_then(identity),
    });
    // The server has the image, and does not see the record.
    let found = image.as_ref().and_then(identity);
    for one in &left {
        is_same_storage(one.storage.as_deref(), found.as_deref())
            .with_context(|| format!("{} is not added: its block device waits", config.name))?;
    }
    let mark = device.as_ref().map(|device| device.mark);
    let left_marks: Vec<u64> = left.iter().map(|device| device.mark).collect();
    let record = Record::write(dir, &config.name, &served, &left, device)?;
    let new = NewExport {
        served,
        spare,
        mark,
        left_marks: left_marks.clone(),
        descriptors: kinds,
    };
    let socket = dir.server_socket(&server.server);
    let helper = Helper {
        dir,
        marks: left_marks.into_iter().chain(mark).collect(),
        asked: BTreeMap::new(),
        link: None,
    };
    match admin::add(&socket, new, &descriptors, limit, helper) {
        Ok(status) => {
            if status.ublk.is_none() {
                record.undo_device();
            }
            claim.leave();
            sockets.into_iter().for_each(Socket::hand_over);
            Ok(status)
        }
        Err(error) => {
            clean_up(dir, claim, sockets, &record, mark);
            Err(error)
        }
    }
}

/// How long the command waits for udev to make a device's node: less long than the server waits for the command.
const NODE_LIMIT: Duration = Duration::from_secs(2);

/// Opens what a server wants for an export. Its block device has to be one that was made for the export: the server may not
/// be what it was.
struct Helper<'a> {
    dir: &'a RuntimeDir,
    marks: Vec<u64>,
    /// What it was asked for, and for which device.
    asked: BTreeMap<&'static str, u32>,
    /// A name of a character device that is there for a moment: it would lead to whatever device gets the number next.
    link: Option<Link>,
}

/// Dropping it removes it.
struct Link(TrustedDir, String);

impl Drop for Link {
    fn drop(&mut self) {
        let Self(folder, name) = self;
        if let Err(error) = unlinkat(&*folder, name.as_str(), AtFlags::empty()) {
            let folder = folder.path().display();
            tracing::warn!("{folder}/{name} cannot be removed: {error}");
        }
    }
}

impl admin::Help for Helper<'_> {
    fn open(&mut self, server: Peer, wanted: Wanted) -> Result<Option<OwnedFd>> {
        self.settle();
        let (kind, number) = match wanted {
            Wanted::UblkDevice(number) => ("device", number),
            Wanted::UpgradeEntry(number) => ("entry", number),
        };
        let is_new = self.asked.insert(kind, number).is_none();
        let is_one = self.asked.values().all(|other| *other == number);
        ensure!(
            is_new && is_one,
            "the server asks for more than one block device"
        );
        match wanted {
            Wanted::UblkDevice(_) => {
                self.check(number, None)?;
                self.link = Some(link_device(server, number)?);
                // It may have become another one in between.
                self.check(number, None).inspect_err(|_| self.link = None)?;
                Ok(None)
            }
            Wanted::UpgradeEntry(_) => {
                let key = upgrade::key_of(number)?;
                // The key is of one disk, and this is the one that was to be made if it was there after that.
                self.check(number, Some(server.pid))?;
                upgrade::publish(self.dir.path(), &key).map(Some)
            }
        }
    }

    fn settle(&mut self) {
        self.link = None;
    }
}

impl Helper<'_> {
    fn check(&self, number: u32, served_by: Option<i32>) -> Result<()> {
        ensure!(
            is_marked(number, &self.marks, served_by)?,
            "the server asks for /dev/ublkc{number}, which is not what it was to make"
        );
        Ok(())
    }
}

/// Links a character device for a server. The driver takes the process that opens a device for its server, so that a
/// descriptor would not do.
fn link_device(server: Peer, number: u32) -> Result<Link> {
    let name = format!("ublkc{number}");
    let folder = device_folders()?.server_folder(&server.pid.to_string())?;
    let device = format!("/dev/{name}");
    let link = || linkat(CWD, &device, &folder, &name, AtFlags::empty());
    // udev may not have made it.
    repeat_while(NODE_LIMIT, OPEN_INTERVAL, link, |linked| {
        *linked == Err(Errno::NOENT)
    })
    .with_context(|| format!("cannot link {device} into {}", folder.path().display()))?;
    Ok(Link(folder, name))
}

/// Opens the image, if it is a file.
fn open_image(config: &ExportConfig, is_confined: bool) -> Result<Option<File>> {
    let path = match &config.storage {
        StorageSpec::File { path, .. } => path,
        StorageSpec::Rbd(image) => {
            ensure!(
                !is_confined,
                "a confined server makes no connection to a cluster for an export that is added: serve rbd:{image} by \
                 another server, or start this one with --sandbox=no"
            );
            return Ok(None);
        }
        StorageSpec::Qemu(disk) => {
            ensure!(
                !is_confined,
                "a confined server starts no program for an export that is added: serve {disk} by another server, or start \
                 this one with --sandbox=no"
            );
            return Ok(None);
        }
        StorageSpec::VhostUser { socket } => {
            ensure!(
                !is_confined,
                "a confined server makes no connection to another one for an export that is added: serve vhost-user:{} by \
                 another server, or start this one with --sandbox=no",
                socket.display()
            );
            return Ok(None);
        }
        StorageSpec::Null { .. } | StorageSpec::Memory { .. } => return Ok(None),
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
fn clean_up(
    dir: &RuntimeDir,
    claim: NameLock,
    sockets: Vec<Socket>,
    record: &Record,
    mark: Option<u64>,
) {
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
            // A server that has died may have made the device.
            if mark.is_none_or(is_gone) {
                record.undo();
            }
            if dir.is_folder_of(&name, &folder) {
                again.home = home;
            }
            drop(again.keep_notes());
        }
        Err(_) => sockets.into_iter().for_each(Socket::hand_over),
    }
}
