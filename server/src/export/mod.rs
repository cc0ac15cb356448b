//! A served disk: one storage and its doors, from opening to closing.
//!
//! | file               | tells                                                    |
//! |--------------------|----------------------------------------------------------|
//! | `open.rs`          | how it is opened: storage, doors, what an earlier server left |
//! | `shared.rs`        | what its threads share, and how its doors are closed     |
//! | `admin/`           | the admin sockets: protocol, server and client           |
//! | `add.rs`           | how a command adds one to a server that runs already     |
//! | `addition.rs`      | what that server does with it                            |
//! | `admin_service.rs` | what an export answers there                             |
//! | `server.rs`        | what a server answers, and what its exports share        |
//! | `succession.rs`    | how a server gets an export from another one             |
//! | `recovery.rs`      | what becomes of the block device that a dead server left |
//! | `upgrade.rs`       | clients that come by the block device's descriptor       |
//! | `runtime_dir.rs`   | which exports this machine serves: `/run/ublkup`         |
//! | `name_lock.rs`     | the lock of one name, and the notes below it             |
//! | `spares.rs`        | folders for exports that are added later                 |
//! | `explain.rs`       | errors as users read them                                |

mod add;
mod addition;
pub mod admin;
mod admin_service;
mod event;
mod explain;
pub mod name_lock;
mod open;
mod recovery;
pub mod runtime_dir;
mod server;
mod shared;
mod spares;
mod succession;
pub mod upgrade;

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use anyhow::{Context, Result};

pub use add::add;
pub use addition::{Addition, Answer};
pub use event::{Door, Event};
pub use explain::explain;
pub use server::{Configuration, Server, ServerOptions, ServerSocket};
pub use succession::Predecessor;

use crate::config::{ExportConfig, Origin, StorageSpec};
use crate::door::ublk::{self, UblkDoor};
use crate::engine::crash;
use crate::engine::events::{self, What};
use crate::engine::sandbox::{self, Access, Reach};
use crate::engine::socket::Socket;
use crate::engine::throttle::Throttle;
use addition::Handed;
use admin::{ExportStatus, Listening, Service};
use name_lock::{CONTROL, NameLock};
use open::{Opened, Opening};
use runtime_dir::RuntimeDir;
use shared::{Closing, Live, Shared, State};
use upgrade::UpgradeListener;

/// The number of the export that was opened last.
static LAST_NUMBER: AtomicU64 = AtomicU64::new(0);

/// A served export. Dropping it without [`Export::stop`] closes the doors all the same.
pub struct Export {
    shared: Arc<Shared>,
    server: Arc<Server>,
    claim: NameLock,
    /// Declared after what its service uses; dropped last in [`Export::stop`].
    admin: Listening,
}

impl Export {
    /// Claims the name, opens the storage, opens the doors. On failure nothing is left behind but
    /// what was there.
    ///
    /// A block device that waits for a server is recovered or left as it is, and still waits after a failure,
    /// unless it is to be [replaced](Predecessor::Replace).
    ///
    /// # Errors
    ///
    /// When any of it fails, or no door can be opened.
    pub fn start(
        dir: &RuntimeDir,
        config: ExportConfig,
        predecessor: Predecessor,
        server: &Arc<Server>,
    ) -> Result<Self> {
        let take_over = predecessor == Predecessor::TakeOver;
        let claim = match take_over {
            true => succession::claim(dir, &config)?,
            false => dir.claim(&config.name)?,
        };
        Self::open(dir, (config, claim, Handed::default()), predecessor, server)
    }

    /// Opens an export that was added while the server runs. On failure nothing is left behind but what was there.
    ///
    /// # Errors
    ///
    /// As for [`start`](Self::start).
    pub fn add(dir: &RuntimeDir, addition: Addition, server: &Arc<Server>) -> Result<Self> {
        let Addition {
            config,
            handed,
            claim,
        } = addition;
        Self::open(dir, (config, claim, handed), Predecessor::Dead, server)
    }

    fn open(
        dir: &RuntimeDir,
        (config, mut claim, mut handed): (ExportConfig, NameLock, Handed),
        predecessor: Predecessor,
        server: &Arc<Server>,
    ) -> Result<Self> {
        let take_over = predecessor == Predecessor::TakeOver;
        crash::point("claimed");
        server.expect(&config);
        let control = handed.control.take();
        // The only place where it is noted.
        let must_stay = claim.was_served() && matches!(config.saved.origin, Origin::Added(_));
        let throttle = Throttle::new(&config.name, config.live.limits());
        let number = LAST_NUMBER.fetch_add(1, Ordering::Relaxed) + 1;
        let opening = Opening {
            number,
            config: &config,
            dir,
            claim: &claim,
            server,
            throttle: &throttle,
            replace: predecessor == Predecessor::Replace,
            handed: handed.into(),
        };
        let finished = match opening.open_storage() {
            Ok(opened) => Self::finish(
                dir,
                (number, opened),
                config,
                throttle,
                (&claim, control),
                server,
            ),
            Err(error) => Err(error),
        };
        match finished {
            Ok((shared, admin)) => {
                claim.serves();
                Ok(Self {
                    shared,
                    server: Arc::clone(server),
                    claim,
                    admin,
                })
            }
            Err(mut error) => {
                if take_over && claim.has_device() {
                    let name = claim.name();
                    error = error.context(format!(
                        "no server has it now, and its block device waits (ublkup recover {name})"
                    ));
                }
                let note_is_lost = || {
                    let recorded = dir.devices(claim.name()).unwrap_or_default();
                    !claim.has_device() && recovery::any_exists(&recovery::Kernel, &recorded)
                };
                // The next server keeps the disk for the client that had it, and recovers its block device.
                if claim.was_upgraded() || must_stay || note_is_lost() {
                    claim.leave();
                }
                Err(error)
            }
        }
    }

    fn finish(
        dir: &RuntimeDir,
        (number, (doors, storage, access)): (u64, Opened),
        config: ExportConfig,
        throttle: Arc<Throttle>,
        (claim, control): (&NameLock, Option<Socket>),
        server: &Arc<Server>,
    ) -> Result<(Arc<Shared>, Listening)> {
        let is_inherited = doors.is_inherited;
        let live = Live {
            config: config.clone(),
            note: claim.served_note(),
        };
        let shared = Arc::new(Shared {
            number,
            may_set_log: server.admits(&config.admin_access),
            config,
            live: Mutex::new(Some(live)),
            server: server.name().to_owned(),
            started_unix_seconds: server::unix_seconds(),
            limits: storage.limits().clone(),
            storage: Mutex::new(Some(storage)),
            access,
            throttle,
            resizing: Mutex::default(),
            doors: Mutex::new(doors),
            ended: Condvar::new(),
            events: server.events().clone(),
        });
        match publish(dir, &shared, claim, control) {
            Ok(admin) => {
                server.add(&shared);
                shared.tell_begin();
                Ok((shared, admin))
            }
            Err(error) => {
                shared.close_doors(claim, is_inherited);
                Err(error)
            }
        }
    }

    /// The open doors and where they are.
    #[must_use]
    pub fn doors(&self) -> Vec<(Door, PathBuf)> {
        let doors = self.shared.doors();
        let ublk = doors
            .ublk
            .as_ref()
            .map(|(door, _)| (Door::Ublk, door.block_path()));
        let vhost = doors
            .vhost
            .as_ref()
            .map(|(door, _)| (Door::Vhost, door.path().to_owned()));
        ublk.into_iter().chain(vhost).collect()
    }

    /// Adds what the export goes on needing.
    pub fn add_reach(&self, reach: &mut Reach) {
        let mut add = |path: &Path, access| reach.paths.push((path.to_owned(), access));
        let config = &self.shared.config;
        // A file stays open, and is not opened again. A device is, when a guest that may move claims it.
        if let StorageSpec::File { path, .. } = &config.storage
            && fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
        {
            add(
                path,
                match config.read_only {
                    true => Access::Read,
                    false => Access::Data,
                },
            );
        }
        reach.servers.network |= matches!(config.storage, StorageSpec::Rbd(_));
        if let StorageSpec::VhostUser { socket } = &config.storage {
            reach.servers.sockets = true;
            // A server that starts again makes its socket anew.
            if let Some(folder) = socket.parent() {
                add(folder, Access::Sockets);
            }
        }
        let folder = self.claim.folder();
        if matches!(config.storage, StorageSpec::Qemu(_)) {
            reach.servers.sockets = true;
            add(folder, Access::Sockets);
        }
        add(folder, Access::Folder);
        if let Some(exports) = folder.parent() {
            add(exports, Access::RemoveFolders);
        }
        let doors = self.shared.doors();
        if let Some((door, _)) = &doors.vhost
            && door.removes_socket()
            && let Some(outside) = door.path().parent().filter(|parent| *parent != folder)
        {
            add(outside, Access::RemoveFiles);
        }
        if let Some(entry) = doors.upgrade.as_ref().and_then(UpgradeListener::entry) {
            // Its folder, and that of all entries.
            let folders = entry.ancestors().skip(1);
            for (folder, access) in folders.zip([Access::RemoveFiles, Access::RemoveFolders]) {
                add(folder, access);
            }
        }
        if let Some((door, _)) = &doors.ublk {
            add(UblkDoor::CONTROL.as_ref(), Access::Data);
            reach.has_block_devices = true;
            reach.administers_devices |= door.is_administrators();
        }
    }

    /// The number that no other export of this process has.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.shared.number
    }

    /// What it says about itself.
    #[must_use]
    pub fn status(&self) -> ExportStatus {
        self.shared.status()
    }

    /// Closes a door that closed by itself; whether another is still open.
    pub fn close(&mut self, door: Door) -> bool {
        let mut doors = self.shared.doors();
        // Whichever door goes, no client can come from one to the other any more.
        let upgrade = doors.upgrade.take();
        let closed = match door {
            Door::Ublk => {
                self.shared.access.forget_block_door();
                doors.ublk.take().map(|(door, _)| Closing::Ublk(door))
            }
            Door::Vhost => doors.vhost.take().map(|(door, _)| Closing::Vhost(door)),
        };
        let left = doors.ublk.is_some() || doors.vhost.is_some();
        // Closing takes time; `stat` must not wait for it.
        drop(doors);
        drop(upgrade);
        if let Some(closed) = closed {
            closed.close(&self.shared.config.name, &self.claim);
        }
        left
    }

    /// Ends serving, and leaves block device and clients to another server: what is under way is
    /// finished, clients are hung up on as if this server had died, the notes stay.
    ///
    /// An export that no server could take over is stopped. Returns whether all requests had ended.
    pub fn leave(self) -> bool {
        if let Err(error) = self.shared.may_leave() {
            tracing::warn!("{}: {error:#}: it is stopped", self.shared.config.name);
            return self.stop();
        }
        crash::point("asked-to-leave");
        let all_ended = self.shared.close_doors(&self.claim, true);
        crash::point("doors-left");
        let name = &self.shared.config.name;
        tracing::info!("{name}: left to another server");
        self.claim.leave();
        self.server.remove(&self.shared);
        events::tell(name, What::HandedOver);
        self.shared.set_ended(State::Left);
        drop(self.admin);
        all_ended
    }

    /// Ends serving because something else failed: a block device that was another server's before is
    /// left to the next server, all else goes. Returns whether all requests had ended.
    pub fn tear_down(self) -> bool {
        if self.shared.doors().is_inherited {
            self.leave()
        } else {
            self.stop()
        }
    }

    /// Drains both doors, closes them and gives the name back. Returns whether all requests had ended.
    pub fn stop(self) -> bool {
        let all_ended = self.shared.close_doors(&self.claim, false);
        let name = &self.shared.config.name;
        match all_ended {
            true => tracing::info!("{name}: stopped"),
            false => tracing::error!("{name}: stopped, but not all of its requests had ended"),
        }
        drop(self.claim);
        self.server.remove(&self.shared);
        let in_order = all_ended;
        events::tell(name, What::Stopped { in_order });
        self.shared.set_ended(State::Stopped);
        // Waits until the clients that asked for the stop have their answer.
        drop(self.admin);
        all_ended
    }

    /// For threads that have to do with the export, but not to end it.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.shared))
    }
}

/// An export that another thread has.
pub struct Watch(Arc<Shared>);

impl Watch {
    /// What it waits for, if it is known.
    #[must_use]
    pub fn waits_for(&self) -> Option<String> {
        let what = self.0.doors().waits_for.clone()?;
        let storage = self
            .0
            .storage()
            .as_ref()
            .and_then(|storage| storage.waits_for());
        Some(match storage {
            Some(why) => format!("{what} ({why})"),
            None => what,
        })
    }

    /// Makes the disk as large as its storage, which another program may have changed.
    ///
    /// # Errors
    ///
    /// When that cannot be done, or the storage has become smaller.
    pub fn follow_growth(&self) -> Result<()> {
        self.0.follow_growth()
    }
}

/// The names of exports whose block devices are there, whether they have a server or not, with the numbers of the devices.
#[must_use]
pub fn recorded_devices(dir: &RuntimeDir) -> Vec<(String, u32)> {
    let of = |name: String| {
        let recorded = dir.devices(&name).unwrap_or_default();
        let ids = recorded
            .into_iter()
            .filter_map(|one| ublk::marked(one.mark).ok()?);
        ids.map(|id| (name.clone(), id)).collect::<Vec<_>>()
    };
    dir.names_with_devices().into_iter().flat_map(of).collect()
}

/// Removes the block device that a killed server of this name left behind, waiting or dead. Returns its number.
///
/// # Errors
///
/// When it cannot be removed, or has a living server.
pub fn remove_left_device(dir: &RuntimeDir, name: &NameLock) -> Result<Option<u32>> {
    let recorded = dir.devices(name.name())?;
    recovery::clean(&recovery::Kernel, name, &recorded)
}

/// Notes what is served, and listens for commands.
fn publish(
    dir: &RuntimeDir,
    shared: &Arc<Shared>,
    claim: &NameLock,
    control: Option<Socket>,
) -> Result<Listening> {
    let served = serde_json::to_string(&shared.config.saved)?;
    if !sandbox::status().on {
        // Else who handed it over has.
        dir.export_record(claim.name())?
            .replace(&served, || {})
            .with_context(|| format!("cannot write to {}", dir.path().display()))?;
    }
    claim
        .note_served(&served)
        .with_context(|| format!("cannot write to {}", claim.folder().display()))?;
    crash::point("export-noted");
    let socket = match control {
        Some(socket) => socket,
        None => Socket::bind(&claim.folder().join(CONTROL), &shared.config.admin_access)?,
    };
    admin::listen_at(claim.name(), socket, Arc::clone(shared))
}
