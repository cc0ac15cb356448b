//! A server: what its exports share, and what it answers at its own admin socket.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak, mpsc};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::addition::{Addition, Host, Opener, device_folders};
use super::admin::{
    self, AllStatus, Answerer, Client, Command, ExportStatus, Listening, NewExport, Reply, Request,
    SCHEMA, ServerStatus, Service,
};
use super::event::Event;
use super::name_lock::{CONTROL, NameLock, remove_links};
use super::runtime_dir::RuntimeDir;
use super::shared::Shared;
use super::spares::Spares;
use crate::config::{ExportConfig, ExportOptions};
use crate::engine::events::Reader;
use crate::engine::sandbox::{Access, Reach};
use crate::engine::socket::SocketAccess;
use crate::engine::{log, sandbox};

/// What the exports of a server share.
pub struct Server {
    dir: RuntimeDir,
    name: String,
    started_unix_seconds: u64,
    events: mpsc::Sender<Event>,
    exports: Mutex<BTreeMap<String, Weak<Shared>>>,
    /// Sockets of the service manager for vhost-user doors, by export.
    sockets: Mutex<BTreeMap<String, OwnedFd>>,
    /// Who may connect to its admin socket.
    access: SocketAccess,
    configuration: Option<Configuration>,
    /// Whether exports can be added: not while it starts, and not while it ends.
    takes_exports: Mutex<bool>,
    /// Folders for exports that are added later, while its admin socket is open.
    spares: OnceLock<Weak<Spares>>,
    /// Where it finds the ublk devices of exports that are added.
    devices: OnceLock<PathBuf>,
    apart: Mutex<BTreeSet<String>>,
    uid: u32,
    this: Weak<Self>,
}

/// Where a server got its exports from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The file, or the folder.
    pub path: PathBuf,
    /// The options of the command line, which those in files have precedence over.
    pub options: ExportOptions,
}

/// What a server is.
#[derive(Debug, Default)]
pub struct ServerOptions {
    /// Its name; its process number if none is given.
    pub name: Option<String>,
    /// Sockets of the service manager, by export.
    pub sockets: BTreeMap<String, OwnedFd>,
    /// Who may connect to its admin socket.
    pub access: SocketAccess,
    /// Where its exports come from.
    pub configuration: Option<Configuration>,
}

impl Server {
    /// A server that gets `events`.
    #[must_use]
    pub fn new(dir: &RuntimeDir, options: ServerOptions, events: mpsc::Sender<Event>) -> Arc<Self> {
        let own = || std::process::id().to_string();
        Arc::new_cyclic(|this| Self {
            dir: dir.clone(),
            name: options.name.unwrap_or_else(own),
            started_unix_seconds: unix_seconds(),
            events,
            exports: Mutex::default(),
            sockets: Mutex::new(options.sockets),
            access: options.access,
            configuration: options.configuration,
            takes_exports: Mutex::new(false),
            spares: OnceLock::new(),
            devices: OnceLock::new(),
            apart: Mutex::default(),
            uid: geteuid().as_raw(),
            this: this.clone(),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where events go.
    #[must_use]
    pub fn events(&self) -> &mpsc::Sender<Event> {
        &self.events
    }

    /// Whether the users of this access may change what concerns all exports: they are this server's own, or those of all.
    pub(super) fn admits(&self, access: &SocketAccess) -> bool {
        [&self.access, &SocketAccess::default()].contains(&access)
    }

    /// Takes the socket that the service manager has for the vhost-user door of an export, if there is one.
    pub(super) fn take_socket(&self, export: &str) -> Option<OwnedFd> {
        self.sockets().remove(export)
    }

    /// The names of the service manager's sockets that no export has taken.
    #[must_use]
    pub fn sockets_left(&self) -> Vec<String> {
        self.sockets().keys().cloned().collect()
    }

    fn sockets(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        // The table is whole after any panic.
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens at the admin socket of this server, with room for this many exports that are added later.
    ///
    /// # Errors
    ///
    /// When another server has the name, or there can be no socket.
    pub fn listen(self: &Arc<Self>, room: u32) -> Result<ServerSocket> {
        let claim = self.dir.claim_server(&self.name)?;
        let record = self.dir.server_record(&self.name)?;
        match &self.configuration {
            Some(configuration) => {
                let text = serde_json::to_string(configuration)?;
                record
                    .replace(&text, || {})
                    .context("cannot note where the exports come from")?;
            }
            None => record.remove()?,
        }
        let spares = Arc::new(Spares::make(&claim, room)?);
        // A server listens once.
        let _ = self.spares.set(Arc::downgrade(&spares));
        let socket = claim.folder().join(CONTROL);
        let listening = admin::serve("server", &socket, &self.access, Arc::clone(self))?;
        Ok(ServerSocket {
            _listening: listening,
            server: Arc::clone(self),
            devices: None,
            spares,
            exports: self.dir.exports_folder(),
            records: self.dir.records_folder(),
            claim,
        })
    }

    /// Says whether exports can be added from now on.
    pub fn take_exports(&self, takes: bool) {
        *self.takes_exports() = takes;
    }

    fn takes_exports(&self) -> MutexGuard<'_, bool> {
        // Yes or no.
        (self.takes_exports.lock()).unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves an export that a client hands over, and waits until it is served.
    fn take_in(&self, new: NewExport, mut client: Client) -> Result<ExportStatus> {
        ensure!(
            self.is_own(client.uid),
            "exports are added by the user of the server, or root"
        );
        ensure!(
            *self.takes_exports(),
            "the server is starting, or ending: try again"
        );
        let spares = self.spares.get().and_then(Weak::upgrade);
        let host = Host {
            dir: &self.dir,
            spares: spares.as_deref(),
            devices: self.devices.get().map(PathBuf::as_path),
        };
        let descriptors = std::mem::take(&mut client.descriptors);
        let (opener, errands) = Opener::new();
        let addition = Addition::receive(&host, new, descriptors, opener)?;
        let (answer, answered) = mpsc::channel();
        let addition = Box::new(addition);
        // Without a receiver it is dropped, and so is the sender. The table is held: what is sent is received.
        let takes_exports = self.takes_exports();
        ensure!(*takes_exports, "the server is ending");
        let _ = self.events.send(Event::Add { addition, answer });
        drop(takes_exports);
        // Until nothing more can be wanted.
        for errand in errands {
            errand.run(|wanted| client.open(wanted));
        }
        answered.recv().context("the server is ending")?
    }

    fn exports(&self) -> MutexGuard<'_, BTreeMap<String, Weak<Shared>>> {
        // The table is whole after any panic.
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns who may hear of an export, before there is something to tell.
    pub(super) fn expect(&self, config: &ExportConfig) {
        match config.admin_access == self.access {
            true => self.apart().remove(&config.name),
            false => self.apart().insert(config.name.clone()),
        };
    }

    pub(super) fn add(&self, export: &Arc<Shared>) {
        let name = export.config.name.clone();
        self.exports().insert(name, Arc::downgrade(export));
    }

    pub(super) fn remove(&self, export: &Arc<Shared>) {
        let mut exports = self.exports();
        let name = &export.config.name;
        if (exports.get(name)).is_some_and(|there| there.as_ptr() == Arc::as_ptr(export)) {
            exports.remove(name);
        }
    }

    fn export(&self, name: &str) -> Result<Arc<Shared>> {
        let export = self.exports().get(name).and_then(Weak::upgrade);
        export.with_context(|| format!("server '{}' has no export called '{name}'", self.name))
    }

    /// Its exports, by name. They are asked without the lock of the table.
    fn all(&self) -> Vec<Arc<Shared>> {
        self.exports().values().filter_map(Weak::upgrade).collect()
    }

    /// Whether a client at the socket of the server may ask for an export. Who may connect was decided for the exports that
    /// it began with.
    fn lets(&self, client: &Client, export: &Shared) -> bool {
        export.config.admin_access == self.access || self.is_own(client.uid)
    }

    /// Whether a client is of the server's user, or root.
    fn is_own(&self, uid: Option<u32>) -> bool {
        uid.is_some_and(|uid| [self.uid, 0].contains(&uid))
    }

    /// Exports with other users than the socket of the server, also those that have ended.
    fn apart(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // The set is whole after any panic.
        self.apart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each of its exports says about itself.
    #[must_use]
    pub fn statuses(&self) -> Vec<ExportStatus> {
        self.all().iter().map(|export| export.status()).collect()
    }

    /// What it is, with the exports that a client may ask for.
    fn status(&self, client: &Client) -> ServerStatus {
        ServerStatus {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            server: self.name.clone(),
            pid: std::process::id(),
            started_unix_seconds: self.started_unix_seconds,
            sandbox: sandbox::status(),
            makes_block_devices: !sandbox::status().on || self.devices.get().is_some(),
            lost_log_lines: log::lost_lines(),
            exports: (self.all().iter())
                .filter(|export| self.lets(client, export))
                .map(|export| export.config.name.clone())
                .collect(),
        }
    }
}

impl Answerer for Server {
    fn answer(&self, request: Request, client: Client) -> Result<Reply> {
        if let Some(name) = &request.export {
            let export = self.export(name)?;
            ensure!(
                self.lets(&client, &export),
                "'{name}' has other users than this socket: ask at its own"
            );
            return admin::answer_for(&*export, request.command);
        }
        let answer = match request.command {
            Command::Server {} => serde_json::to_value(self.status(&client)),
            Command::Stat {} => serde_json::to_value(AllStatus {
                schema: SCHEMA,
                exports: (self.all().iter())
                    .filter(|export| self.lets(&client, export))
                    .map(|export| export.status())
                    .collect(),
            }),
            Command::Add(new) => serde_json::to_value(self.take_in(*new, client)?),
            Command::Events {} => {
                let (server, uid) = (self.this.clone(), client.uid);
                let lets = move |export: &str| {
                    server.upgrade().is_some_and(|server| {
                        server.is_own(uid) || !server.apart().contains(export)
                    })
                };
                return Ok(Reply::Events(Reader::new(lets)?));
            }
            Command::Stop { .. }
            | Command::Leave {}
            | Command::Resize { .. }
            | Command::Snapshot { .. }
            | Command::Set { .. } => {
                bail!("of which export? Give its name as \"export\"")
            }
        };
        Ok(Reply::Answer(answer?))
    }
}

/// The admin socket of a server. Dropping it waits until its clients have their answers.
pub struct ServerSocket {
    _listening: Listening,
    server: Arc<Server>,
    devices: Option<NameLock>,
    spares: Arc<Spares>,
    exports: PathBuf,
    records: PathBuf,
    /// Declared after what is in its folder.
    claim: NameLock,
}

impl ServerSocket {
    /// Adds what it still needs in the sandbox.
    pub fn add_reach(&self, reach: &mut Reach) {
        let folder = self.claim.folder();
        reach.paths.push((folder.to_owned(), Access::Folder));
        if let Some(servers) = folder.parent() {
            let entry = (servers.to_owned(), Access::RemoveFolders);
            reach.paths.push(entry);
        }
        let records = (self.records.clone(), Access::RemoveFiles);
        reach.paths.push(records);
        self.spares.add_reach(&self.exports, reach);
    }

    /// Makes it possible to make block devices in the sandbox, and adds what that needs.
    ///
    /// # Errors
    ///
    /// Why it is not possible.
    pub fn keep_making_devices(&mut self, reach: &mut Reach) -> Result<()> {
        if self.spares.is_empty() {
            return Ok(());
        }
        let pid = std::process::id().to_string();
        let devices = device_folders()?.claim_server(&pid)?;
        let folder = devices.folder().to_owned();
        // Of an earlier process with this number.
        remove_links(&devices.dir);
        reach.paths.push((folder.clone(), Access::Devices));
        if let Some(all) = folder.parent() {
            reach.paths.push((all.to_owned(), Access::RemoveFolders));
        }
        // A server confines itself once.
        let _ = self.server.devices.set(folder);
        self.devices = Some(devices);
        Ok(())
    }
}

/// The time.
pub(super) fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
