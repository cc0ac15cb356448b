//! Opening an export: its storage, its doors, and what an earlier server left of them.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::{Arc, Once};

use anyhow::{Context, Result, bail};

use super::addition::{Handed, claims_later};
use super::event::{Door, Event};
use super::name_lock::{DeviceNote, DeviceRecord, NameLock, VHOST_SOCKET, new_mark};
use super::recovery::{self, Beginning, Kernel, Wanted};
use super::runtime_dir::RuntimeDir;
use super::server::Server;
use super::shared::{Counted, Doors};
use super::upgrade::{Registry, UpgradeListener};
use crate::config::{DoorMode, ExportConfig, StorageSpec};
use crate::door::ownership::{ClientNote, Ownership};
use crate::door::ublk::{self, DoorEnd, Recovery, UblkConfig, UblkDoor};
use crate::door::vhost::{VhostConfig, VhostDoor};
use crate::engine::counters::CounterSet;
use crate::engine::crash;
use crate::engine::sandbox;
use crate::engine::socket::{Socket, SocketAccess};
use crate::engine::throttle::Throttle;
use crate::engine::{Storage, StorageControl};
use crate::request::Limits;
use crate::request::format_size;
#[cfg(feature = "testing")]
use crate::storage::Fault;
use crate::storage::{
    File, FileOptions, Memory, Null, Qemu, Rbd, RbdOptions, VhostUser, VhostUserOptions,
};

/// Largest discard and write-zeroes that clients of null and memory disks are told of.
const MAX_RANGE_BYTES: u64 = 1 << 30;

/// Largest read or write that the doors offer.
const MAX_IO_BYTES: u32 = 1 << 20;

/// What doors are opened with.
pub(super) struct Opening<'a> {
    pub(super) number: u64,
    pub(super) config: &'a ExportConfig,
    pub(super) dir: &'a RuntimeDir,
    pub(super) claim: &'a NameLock,
    pub(super) server: &'a Server,
    pub(super) throttle: &'a Arc<Throttle>,
    pub(super) replace: bool,
    /// What another process has opened for it; the first that needs a part of it takes that.
    pub(super) handed: RefCell<Handed>,
}

/// What an export is made of.
pub(super) type Opened = (Doors, Arc<dyn StorageControl>, Arc<Ownership>);

impl Opening<'_> {
    pub(super) fn open_storage(&self) -> Result<Opened> {
        let config = self.config;
        match &config.storage {
            StorageSpec::Null { size_bytes } => {
                self.open(Null::new(plain_limits(config, *size_bytes)))
            }
            StorageSpec::Memory { size_bytes } => {
                let disk = Memory::new(plain_limits(config, *size_bytes))
                    .with_context(|| format!("cannot reserve {}", format_size(*size_bytes)))?;
                self.open(disk)
            }
            StorageSpec::File {
                path,
                cache,
                format,
            } => {
                let options = FileOptions {
                    export: config.name.clone(),
                    path: path.clone(),
                    cache: *cache,
                    format: *format,
                    read_only: config.read_only,
                    block_bytes: config.block_bytes,
                    serial: config.serial,
                    claim_later: claims_later(config),
                };
                let handed = self.handed.borrow_mut().image.take();
                self.open(match handed {
                    Some(file) => File::adopt(options, file)?,
                    None => File::open(options)?,
                })
            }
            StorageSpec::Rbd(image) => {
                let note = self.claim.locked_by_note();
                let predecessor = note.read().context("cannot read whose the image was")?;
                let disk = Rbd::open(RbdOptions {
                    export: config.name.clone(),
                    image: image.clone(),
                    read_only: config.read_only,
                    block_bytes: config.block_bytes,
                    serial: config.serial,
                    claim_later: claims_later(config),
                    predecessor,
                    note_owner: Box::new(move |owner| note.replace(owner, || {})),
                })?;
                self.open(disk)
            }
            StorageSpec::Qemu(disk) => {
                let folder = self.claim.folder();
                // QEMU locks the image.
                let options = self.vhost_user(Qemu::socket(folder), None);
                self.open(Qemu::open(disk, folder, &options)?)
            }
            StorageSpec::VhostUser { socket } => {
                let locks = Some(self.dir.path().to_owned());
                let options = self.vhost_user(socket.clone(), locks);
                self.open(VhostUser::open(&options)?)
            }
        }
    }

    fn vhost_user(&self, socket: PathBuf, locks: Option<PathBuf>) -> VhostUserOptions {
        let config = self.config;
        VhostUserOptions {
            export: config.name.clone(),
            socket,
            locks,
            read_only: config.read_only,
            block_bytes: config.block_bytes,
            serial: config.serial,
            // Those of both doors.
            queues: config.queues.saturating_add(config.vhost_threads),
        }
    }

    /// Opens the doors, with fault injection if that is configured.
    fn open<B: Storage>(&self, mut disk: B) -> Result<Opened> {
        if !self.config.discard {
            disk.limits_mut().max_discard_bytes = 0;
        }
        #[cfg(feature = "testing")]
        if !self.config.faults.is_empty() {
            tracing::warn!("{}: fault injection is on", self.config.name);
            return self.open_doors(Fault::new(disk, self.config.faults.clone()));
        }
        self.open_doors(disk)
    }

    fn open_doors<B: Storage>(&self, mut disk: B) -> Result<Opened> {
        let recoverable = match self.begin(&disk)? {
            Beginning::New => None,
            Beginning::Recover { id, mark, limits } => {
                *disk.limits_mut() = limits;
                Some((id, mark))
            }
        };
        let disk = Arc::new(disk);
        let (events, export) = (self.server.events().clone(), self.number);
        disk.on_fenced(Box::new(move |why| {
            // Without a receiver the server is ending anyway.
            let _ = events.send(Event::Fenced { export, why });
        }));
        let events = self.server.events().clone();
        disk.on_change(Box::new(move || {
            // As above.
            let _ = events.send(Event::StorageChanged { export });
        }));
        let limits = disk.limits().clone();
        let config = self.config;
        if !outlives_server(config) {
            self.claim.forget_client();
        }
        let note = ClientNote::new(self.claim.upgraded_note(), disk.identity());
        self.check_client(&note, disk.identity().as_deref())?;
        let access = Ownership::new(
            &config.name,
            limits.read_only,
            config.live.reconnect_grace(),
            Some(note),
        );
        if config.migration {
            let claimed = || Arc::clone(&disk) as Arc<dyn StorageControl>;
            access.allow_moves(claims_later(config).then(claimed));
        }
        let vhost = self.open_vhost(&disk, &access)?;
        // Clients that have connected already wait until ownership is opened.
        let ublk = (self.open_ublk(&disk, recoverable, access.is_kept()))
            .inspect_err(|_| access.close())?;
        let mut doors = Doors {
            ublk: ublk.map(|(door, counters)| (Arc::new(door), counters)),
            vhost,
            is_inherited: recoverable.is_some(),
            ..Doors::default()
        };
        if doors.ublk.is_none() && doors.vhost.is_none() {
            bail!("no door can be opened: there is no ublk here, and --vhost is no");
        }
        access.open(doors.ublk.as_ref().map(|(door, _)| door.writes()));
        doors.upgrade = self.listen_for_upgrades(&doors);
        Ok((doors, disk, access))
    }

    /// What an earlier server of the name left, and what is to be done with it.
    fn begin<B: Storage>(&self, disk: &B) -> Result<Beginning> {
        let config = self.config;
        let identity = disk.identity();
        let wanted = Wanted {
            limits: disk.limits(),
            storage: identity.as_deref(),
            opens_ublk: may_open_ublk(config)?,
            ublk_id: config.ublk_id,
            block_bytes: config.block_bytes,
            replace: self.replace,
        };
        recovery::begin(&Kernel, self.claim, &self.recorded()?, &wanted)
    }

    /// Checks that a client of an earlier server, which may come back with requests under way, finds the storage that it
    /// had. If a person has said that it is not to be waited for, it is forgotten.
    fn check_client(&self, note: &ClientNote, found: Option<&str>) -> Result<()> {
        match recovery::is_same_storage(note.noted_storage().as_deref(), found) {
            Err(_) if self.replace => self.claim.forget_client(),
            same => same.context(
                "a vhost-user client that had the disk may come back with requests under way; if it has ended, --replace \
                 serves what is there",
            )?,
        }
        Ok(())
    }

    fn open_vhost<B: Storage>(
        &self,
        disk: &Arc<B>,
        access: &Arc<Ownership>,
    ) -> Result<Option<Counted<VhostDoor>>> {
        if self.config.vhost == DoorMode::No {
            return Ok(None);
        }
        let socket = self.listen_for_vhost()?;
        let registry = Arc::new(CounterSet::default());
        let vhost = VhostConfig {
            name: self.config.name.clone(),
            socket,
            queues: self.config.queues,
            queue_threads: self.config.vhost_threads,
            threads: self.config.threads.clone(),
            throttle: Arc::clone(self.throttle),
            ownership: Arc::clone(access),
        };
        let door = VhostDoor::start(vhost, Arc::clone(disk), Arc::clone(&registry))?;
        Ok(Some((door, registry)))
    }

    /// The socket of the vhost door: that of the service manager, or one of our own.
    fn listen_for_vhost(&self) -> Result<Socket> {
        let config = self.config;
        let handed = self.handed.borrow_mut().vhost.take();
        if let Some(socket) = handed {
            return Ok(socket);
        }
        if let Some(socket) = self.server.take_socket(&config.name) {
            if config.vhost_access != SocketAccess::default() {
                tracing::warn!(
                    "{}: vhost-socket-owner, -group and -mode are those of the service manager's socket (SocketUser=, \
                     SocketGroup=, SocketMode=)",
                    config.name
                );
            }
            return Socket::inherit(socket).with_context(|| {
                format!(
                    "the service manager's socket '{}' cannot be used (ListenStream= with a path)",
                    config.name
                )
            });
        }
        let default = || self.claim.folder().join(VHOST_SOCKET);
        let path = config.vhost_socket.clone().unwrap_or_else(default);
        Ok(Socket::bind(&path, &config.vhost_access)?)
    }

    fn open_ublk<B: Storage>(
        &self,
        disk: &Arc<B>,
        recoverable: Option<(u32, u64)>,
        refuse_writes: bool,
    ) -> Result<Option<Counted<UblkDoor>>> {
        let config = self.config;
        if !may_open_ublk(config)? {
            return Ok(None);
        }
        let registry = Arc::new(CounterSet::default());
        let counters = || registry.register();
        let (ended, export) = (self.server.events().clone(), self.number);
        let on_end = move |end| {
            let why = match end {
                DoorEnd::Outside => "another program removed its device".to_owned(),
                DoorEnd::Failed(error) => error.to_string(),
            };
            let closed = Event::Closed {
                export,
                door: Door::Ublk,
                why,
            };
            // Without a receiver the server is ending anyway.
            let _ = ended.send(closed);
        };
        let ublk = UblkConfig {
            id: config.ublk_id,
            queues: config.queues,
            depth: config.depth,
            threads: config.threads.clone(),
            throttle: Arc::clone(self.throttle),
            affinity: config.ublk_affinity,
            scan_partitions: config.scan_partitions,
            data: config.ublk_data,
            ring_places: None,
            recovery: recovery(config),
            mark: match recoverable {
                Some((_, mark)) => mark,
                None => self.new_mark(disk.identity())?,
            },
            take_over: recoverable.map(|(id, _)| id),
            refuse_writes,
            elsewhere: self.handed.borrow().elsewhere(),
        };
        let mark = ublk.mark;
        let door = UblkDoor::start(&ublk, disk, counters, on_end).inspect_err(|_| {
            if recoverable.is_none() && matches!(ublk::marked(mark), Ok(None)) {
                self.claim.forget_device();
            }
        })?;
        if recoverable.is_some() {
            let (name, disk) = (&config.name, door.block_path());
            tracing::info!("{name}: took over {}", disk.display());
        }
        let noted = self.note(&DeviceNote {
            id: Some(door.id()),
            mark: Some(mark),
            storage: disk.identity(),
        });
        if let Err(error) = noted {
            // The old note still identifies the device.
            let ended = match recoverable {
                Some(_) => door.leave(),
                None => door.stop().inspect(|()| self.claim.forget_device()),
            };
            if let Err(error) = ended {
                tracing::error!("{}: {error}", config.name);
            }
            return Err(error);
        }
        crash::point("id-noted");
        Ok(Some((door, registry)))
    }

    fn note(&self, note: &DeviceNote) -> Result<()> {
        let folder = self.claim.folder().display();
        (self.claim.note_device(note)).with_context(|| format!("cannot write to {folder}"))
    }

    /// The block devices that were made for the export.
    fn recorded(&self) -> Result<Vec<DeviceRecord>> {
        let handed = self.handed.borrow();
        if handed.mark.is_none() && !sandbox::status().on {
            let cannot_read = || format!("cannot read the record of {}", self.config.name);
            return self
                .dir
                .devices(&self.config.name)
                .with_context(cannot_read);
        }
        let record = |&mark| DeviceRecord {
            mark,
            storage: None,
        };
        Ok(handed.left_marks.iter().map(record).collect())
    }

    /// A mark for a new block device, which is recorded and noted before the device is added, so that the device is found
    /// whenever this server dies.
    fn new_mark(&self, storage: Option<String>) -> Result<u64> {
        let handed = self.handed.borrow().mark;
        let mark = handed.unwrap_or_else(new_mark);
        if handed.is_none() {
            let record = DeviceRecord {
                mark,
                storage: storage.clone(),
            };
            let file = self.dir.device_record(&self.config.name)?;
            (file.replace(&DeviceRecord::text(&[record]), || {}))
                .with_context(|| format!("cannot write to {}", self.dir.path().display()))?;
            crash::point("device-recorded");
        }
        self.note(&DeviceNote {
            mark: Some(mark),
            storage,
            ..DeviceNote::default()
        })?;
        crash::point("mark-noted");
        Ok(mark)
    }

    /// Offers the upgrade from the block device to the vhost door, if there are both. The doors work
    /// without it.
    fn listen_for_upgrades(&self, doors: &Doors) -> Option<UpgradeListener> {
        let ((ublk, _), (vhost, _)) = doors.ublk.as_ref().zip(doors.vhost.as_ref())?;
        let name = &self.config.name;
        let opener = self.handed.borrow_mut().opener.take();
        let registry = match opener.map(|opener| opener.upgrade_entry(ublk.id())) {
            None => Registry::Own(self.dir.path()),
            Some(Ok(entry)) => Registry::Given(entry),
            Some(Err(error)) => {
                tracing::warn!("{name}: no entry in the registry: {error:#}");
                Registry::None
            }
        };
        match UpgradeListener::start(name, ublk, registry, vhost.adopter()) {
            Ok(listener) => Some(listener),
            Err(error) => {
                let disk = ublk.block_path();
                tracing::warn!("{name}: no upgrade from {}: {error:#}", disk.display());
                None
            }
        }
    }
}

/// Whether the contents are there after the death of this server.
fn outlives_server(config: &ExportConfig) -> bool {
    matches!(
        config.storage,
        StorageSpec::File { .. }
            | StorageSpec::Rbd(_)
            | StorageSpec::VhostUser { .. }
            | StorageSpec::Qemu(_)
    )
}

/// What happens to the block device when this server dies.
fn recovery(config: &ExportConfig) -> Recovery {
    match config.recovery {
        // The contents are lost with the server, so requests must fail.
        Recovery::Auto if !outlives_server(config) => Recovery::Off,
        asked_for => asked_for,
    }
}

/// Whether the ublk door is to be opened. In automatic mode the reason why not is logged once.
pub(super) fn may_open_ublk(config: &ExportConfig) -> Result<bool> {
    if config.ublk == DoorMode::No {
        return Ok(false);
    }
    match ublk::available() {
        Ok(_) => Ok(true),
        Err(why) if config.ublk == DoorMode::Auto => {
            static SAID: Once = Once::new();
            SAID.call_once(|| tracing::warn!("no ublk door: {why}"));
            Ok(false)
        }
        Err(why) => Err(why.into()),
    }
}

/// The limits of null and memory disks.
fn plain_limits(config: &ExportConfig, size_bytes: u64) -> Limits {
    let block_bytes = config.block_bytes.unwrap_or(512);
    Limits {
        capacity: (size_bytes).into(),
        block_bytes,
        physical_block_bytes: 4096,
        optimal_io_bytes: 0,
        max_io_bytes: MAX_IO_BYTES,
        discard_granularity_bytes: 4096,
        max_discard_bytes: MAX_RANGE_BYTES,
        max_write_zeroes_bytes: MAX_RANGE_BYTES,
        read_only: config.read_only,
        // There is nothing to flush to.
        write_cache: false,
        serial: config.serial,
    }
}
