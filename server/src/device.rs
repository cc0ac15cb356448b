//! One export: a backend and its doors.
//!
//! | file            | tells                                            |
//! |-----------------|--------------------------------------------------|
//! | `open.rs`       | how it is opened: backend, doors, what was left  |
//! | `succession.rs` | how a server gets it from another                |

mod open;
mod succession;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::access::{Access, AccessState};
use crate::backend::Backend;
use crate::config::{BackendSpec, ExportConfig, format_size};
use crate::control::{
    self, ExportStatus, Listening, Resized, SessionStatus, UblkStatus, VhostStatus,
};
use crate::counters::Registry;
use crate::crash;
use crate::door::ublk::UblkDoor;
use crate::door::vhost::{SessionInfo, VhostDoor};
use crate::offer::Offer;
use crate::request::{Limits, MAX_DISK_BYTES};
use crate::runtime::{CONTROL, Claim, RuntimeDir};
use crate::serve::Event;
pub use open::remove_left_over_device;
use open::{House, Opened};

/// Which door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `/dev/ublkbN`.
    Ublk,
    /// The vhost-user-blk socket.
    Vhost,
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ublk => "ublk",
            Self::Vhost => "vhost-user-blk",
        })
    }
}

/// How long a client's requests may take to end when the door closes.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// A served export. Dropping it without [`Export::stop`] closes the doors all the same.
pub struct Export {
    shared: Arc<Shared>,
    claim: Claim,
    /// Declared after what its service uses; dropped last in [`Export::stop`].
    admin: Listening,
}

/// What the admin socket's thread sees.
struct Shared {
    config: ExportConfig,
    limits: Limits,
    /// Gone as soon as the doors are closed: whoever still talks to the admin socket must not keep
    /// the next server from it.
    storage: Mutex<Option<Arc<dyn Storage>>>,
    access: Arc<Access>,
    /// One at a time.
    resizing: Mutex<()>,
    doors: Mutex<Doors>,
    ended: Condvar,
    events: mpsc::Sender<Event>,
}

/// The disk itself, whatever it is made of.
trait Storage: Send + Sync {
    fn limits(&self) -> &Limits;
    fn grow(&self, wanted_bytes: Option<u64>) -> std::io::Result<u64>;
    fn cut(&self, capacity_bytes: u64) -> std::io::Result<()>;
}

impl<B: Backend> Storage for B {
    fn limits(&self) -> &Limits {
        Backend::limits(self)
    }

    fn grow(&self, wanted_bytes: Option<u64>) -> std::io::Result<u64> {
        Backend::grow(self, wanted_bytes)
    }

    fn cut(&self, capacity_bytes: u64) -> std::io::Result<()> {
        Backend::cut(self, capacity_bytes)
    }
}

#[derive(Default)]
struct Doors {
    state: State,
    /// Whether the block device was another server's before.
    is_inherited: bool,
    /// Declared before the doors that it leads to.
    offer: Option<Offer>,
    ublk: Option<Counted<UblkDoor>>,
    vhost: Option<Counted<VhostDoor>>,
}

/// A door and its counters.
type Counted<D> = (D, Arc<Registry>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Serving,
    Stopping,
    Stopped,
    /// Another server's from now on.
    Left,
}

impl Export {
    /// Claims the name, opens the backend, opens the doors. On failure nothing is left behind but
    /// what was there.
    ///
    /// With `take_over` a living server of the name is asked to make way, and its block device is gone
    /// on with or left alone, but never replaced. A block device that waits for a server still does so
    /// after a failure.
    ///
    /// # Errors
    ///
    /// When any of it fails, or no door can be opened.
    pub fn start(
        dir: &RuntimeDir,
        config: ExportConfig,
        take_over: bool,
        events: mpsc::Sender<Event>,
    ) -> Result<Self> {
        let claim = match take_over {
            true => succession::claim(dir, &config)?,
            false => dir.claim(&config.name)?,
        };
        crash::point("claimed");
        let house = House {
            config: &config,
            dir,
            claim: &claim,
            events: &events,
            take_over,
        };
        let finished = match house.open_backend() {
            Ok(opened) => Self::finish(opened, config, &claim, events),
            Err(error) => Err(error),
        };
        match finished {
            Ok((shared, admin)) => Ok(Self {
                shared,
                claim,
                admin,
            }),
            Err(error) if take_over && claim.left_device().is_some() => {
                let name = claim.name();
                Err(error.context(format!(
                    "nobody serves it now, and its block device waits (ublkup recover {name})"
                )))
            }
            Err(error) => Err(error),
        }
    }

    fn finish(
        (doors, storage, access): Opened,
        config: ExportConfig,
        claim: &Claim,
        events: mpsc::Sender<Event>,
    ) -> Result<(Arc<Shared>, Listening)> {
        let is_inherited = doors.is_inherited;
        let shared = Arc::new(Shared {
            config,
            limits: storage.limits().clone(),
            storage: Mutex::new(Some(storage)),
            access,
            resizing: Mutex::default(),
            doors: Mutex::new(doors),
            ended: Condvar::new(),
            events,
        });
        match publish(&shared, claim) {
            Ok(admin) => Ok((shared, admin)),
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

    /// Closes a door that closed by itself; whether another is still open.
    pub fn close(&mut self, door: Door) -> bool {
        let mut doors = self.shared.doors();
        // Whichever door goes, nobody can come from one to the other any more.
        let offer = doors.offer.take();
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
        drop(offer);
        if let Some(closed) = closed {
            closed.close(&self.shared.config.name, &self.claim);
        }
        left
    }

    /// Ends serving, and leaves block device and clients to another server: what is under way is
    /// finished, clients are hung up on as if this server had died, the notes stay.
    ///
    /// An export that nobody could go on with is stopped.
    pub fn leave(self) {
        if let Err(error) = self.shared.may_leave() {
            tracing::warn!("{}: {error:#}: it is stopped", self.shared.config.name);
            return self.stop();
        }
        crash::point("asked-to-leave");
        self.shared.close_doors(&self.claim, true);
        crash::point("doors-left");
        let name = &self.shared.config.name;
        tracing::info!("{name}: left to another server");
        self.claim.leave();
        self.shared.set_ended(State::Left);
        drop(self.admin);
    }

    /// Ends serving because something else failed: a block device that was another server's before is
    /// left to the next who tries, all else goes.
    pub fn give_up(self) {
        if self.shared.doors().is_inherited {
            self.leave();
        } else {
            self.stop();
        }
    }

    /// Drains both doors, closes them and gives the name back.
    pub fn stop(self) {
        self.shared.close_doors(&self.claim, false);
        tracing::info!("{}: stopped", self.shared.config.name);
        drop(self.claim);
        self.shared.set_ended(State::Stopped);
        // Waits until those who asked for the stop have their answer.
        drop(self.admin);
    }
}

/// Notes what is served, and listens to those who ask for it.
fn publish(shared: &Arc<Shared>, claim: &Claim) -> Result<Listening> {
    let served = serde_json::to_string(&shared.config.served_as)?;
    claim
        .note_served(&served)
        .with_context(|| format!("cannot write to {}", claim.folder().display()))?;
    crash::point("export-noted");
    control::listen(&claim.folder().join(CONTROL), Arc::clone(shared))
}

/// A door on its way out.
enum Closing {
    Ublk(UblkDoor),
    Vhost(VhostDoor),
}

impl Closing {
    fn close(self, name: &str, claim: &Claim) {
        match self {
            Self::Ublk(door) => match door.stop() {
                Ok(()) => claim.forget_ublk_id(),
                Err(error) => tracing::error!("{name}: {error:#}"),
            },
            Self::Vhost(door) => {
                let left = door.stop(DRAIN_LIMIT);
                if left > 0 {
                    tracing::error!("{name}: {left} vhost sessions are stuck in the storage");
                }
            }
        }
    }
}

impl Shared {
    fn doors(&self) -> MutexGuard<'_, Doors> {
        // Whoever panicked with the lock has taken a door or has not: both are states we know.
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Closes both doors and lets go of the storage. If the export is left to another server, the block
    /// device stays.
    fn close_doors(&self, claim: &Claim, is_left: bool) {
        let name = &self.config.name;
        let (offer, ublk, vhost) = {
            let mut doors = self.doors();
            doors.state = State::Stopping;
            (doors.offer.take(), doors.ublk.take(), doors.vhost.take())
        };
        // Before the block device, whose removal waits for clients that nobody accepts.
        drop(offer);
        // From here on the right to write stays as it is noted.
        self.access.close();
        // The block door first: it may have a file system on it that wants to write.
        match ublk {
            Some((door, _)) if is_left => {
                if let Err(error) = door.leave() {
                    tracing::error!("{name}: {error:#}");
                }
            }
            Some((door, _)) => Closing::Ublk(door).close(name, claim),
            None => {}
        }
        if is_left {
            crash::point("block-door-left");
        }
        if let Some((door, _)) = vhost {
            Closing::Vhost(door).close(name, claim);
        }
        drop(self.storage().take());
    }

    fn storage(&self) -> MutexGuard<'_, Option<Arc<dyn Storage>>> {
        // It is there or it is not.
        self.storage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_ended(&self, state: State) {
        self.doors().state = state;
        self.ended.notify_all();
    }

    /// Waits for the end, and says which it was.
    fn await_end(&self) -> State {
        let mut doors = self.doors();
        while !matches!(doors.state, State::Stopped | State::Left) {
            doors = (self.ended.wait(doors)).unwrap_or_else(PoisonError::into_inner);
        }
        doors.state
    }

    /// Whether another server could go on with this export.
    fn may_leave(&self) -> Result<()> {
        if let BackendSpec::Memory { .. } = self.config.backend {
            bail!("what is in memory goes with its server");
        }
        if let Some((door, _)) = &self.doors().ublk
            && !door.can_be_left()
        {
            bail!(
                "{} goes with its server (--ublk-recovery, and a kernel with user recovery, would \
                 keep it)",
                door.block_path().display()
            );
        }
        Ok(())
    }

    /// Takes the disk away from those who might begin to use it.
    ///
    /// # Errors
    ///
    /// Who uses it already.
    fn close_if_unused(&self) -> Result<()> {
        const FORCE: &str = "stop --force stops it all the same";
        match self.access.state() {
            AccessState::Waiting => {
                bail!("in use: the disk is kept for a client that died ({FORCE})")
            }
            _ => {
                if let Some(holder) = self.access.holder() {
                    bail!("in use: {holder} has the disk ({FORCE})");
                }
            }
        }
        let doors = self.doors();
        if let Some((door, _)) = &doors.vhost {
            let running = door.sessions().into_iter().find(|client| client.vrings > 0);
            if let Some(client) = running {
                let pid = client.peer_pid.map_or("?".into(), |pid| pid.to_string());
                bail!("in use: the vhost-user client of process {pid} has the disk ({FORCE})");
            }
        }
        if let Some((door, _)) = &doors.ublk
            && !door.close_unless_open()?
        {
            let user = door.user().unwrap_or("nobody we can see".into());
            bail!(
                "in use: {} is open: {user} ({FORCE})",
                door.block_path().display()
            );
        }
        Ok(())
    }

    /// Gives the disk its size back: the storage keeps what was to be cut off.
    fn undo_shrinking(&self, old_size_bytes: u64) {
        self.limits.capacity.set(old_size_bytes);
        let doors = self.doors();
        if let Some((door, _)) = &doors.ublk
            && let Err(error) = door.resize(old_size_bytes)
        {
            tracing::error!("{}: {error}", self.config.name);
        }
        if let Some((door, _)) = &doors.vhost {
            // Who cannot be told sees it when it connects anew.
            let _ = door.tell_new_size();
        }
    }

    /// Whether something may be cut off the disk.
    fn may_shrink(&self, less_bytes: u64, wanted: bool) -> Result<()> {
        if !wanted {
            bail!(
                "{} would be cut off: say --shrink if that is what you want",
                format_size(less_bytes)
            );
        }
        let doors = self.doors();
        if doors
            .vhost
            .as_ref()
            .is_some_and(|(door, _)| !door.sessions().is_empty())
        {
            bail!("a vhost-user client has the disk, which can only grow then");
        }
        if let Some((door, _)) = &doors.ublk
            && let Some(user) = door.writes().in_use()
        {
            bail!("the block device is in use ({user}), and can only grow then");
        }
        Ok(())
    }
}

impl control::Service for Shared {
    fn status(&self) -> ExportStatus {
        let doors = self.doors();
        let (config, limits) = (&self.config, &self.limits);
        ExportStatus {
            name: config.name.clone(),
            state: match doors.state {
                State::Serving => "serving",
                State::Stopping | State::Stopped | State::Left => "stopping",
            }
            .into(),
            access: self.access.state(),
            pid: std::process::id(),
            backend: match config.faults.is_empty() {
                true => config.backend.to_string(),
                false => format!("fault:…;{}", config.backend),
            },
            size_bytes: limits.capacity.bytes(),
            block_bytes: limits.block_bytes,
            read_only: limits.read_only,
            write_cache: limits.write_cache,
            serial: limits.serial.as_str().to_owned(),
            poll_us: config.threads.polling.to_string(),
            cpus: config.threads.cpus.as_ref().map(ToString::to_string),
            ublk: (doors.ublk.as_ref()).map(|(door, registry)| ublk_status(door, registry)),
            vhost: doors.vhost.as_ref().map(|(door, registry)| VhostStatus {
                socket: door.path().to_owned(),
                queues: config.queues,
                threads: config.vhost_threads,
                upgrade: doors
                    .offer
                    .iter()
                    .flat_map(Offer::ways)
                    .map(str::to_owned)
                    .collect(),
                sessions: door.sessions().iter().map(session_status).collect(),
                counters: registry.totals(),
            }),
        }
    }

    fn resize(&self, size_bytes: Option<u64>, shrink: bool) -> Result<Resized> {
        let _one = (self.resizing.lock()).unwrap_or_else(PoisonError::into_inner);
        let (name, capacity) = (&self.config.name, &self.limits.capacity);
        let old_size_bytes = capacity.bytes();
        let block_bytes = u64::from(self.limits.block_bytes);
        if let Some(wanted) = size_bytes
            && (wanted == 0 || !wanted.is_multiple_of(block_bytes) || wanted > MAX_DISK_BYTES)
        {
            bail!(
                "{wanted} is no size for a disk with blocks of {block_bytes}, or too large (at most {})",
                format_size(MAX_DISK_BYTES)
            );
        }
        let storage = (self.storage().clone()).context("it is being stopped")?;
        let have_bytes = storage.grow(size_bytes)?;
        let size_bytes = size_bytes.unwrap_or(have_bytes).min(have_bytes);
        if size_bytes == 0 {
            bail!("nothing would be left of it");
        }
        if size_bytes < old_size_bytes {
            self.may_shrink(old_size_bytes - size_bytes, shrink)?;
        } else {
            // What the clients are about to be told is true already.
            capacity.set(size_bytes);
        }
        let doors = self.doors();
        if size_bytes != old_size_bytes
            && let Some((door, _)) = &doors.ublk
            && let Err(error) = door.resize(size_bytes)
        {
            capacity.set(old_size_bytes);
            return Err(error.into());
        }
        capacity.set(size_bytes);
        let untold_clients = match &doors.vhost {
            Some((door, _)) if size_bytes != old_size_bytes => door.tell_new_size(),
            _ => 0,
        };
        drop(doors);
        if size_bytes < old_size_bytes
            && let Err(error) = storage.cut(size_bytes)
        {
            self.undo_shrinking(old_size_bytes);
            return Err(error.into());
        }
        tracing::info!(
            "{name}: {}, was {}",
            format_size(size_bytes),
            format_size(old_size_bytes)
        );
        Ok(Resized {
            size_bytes,
            old_size_bytes,
            untold_clients,
        })
    }

    fn stop(&self, force: bool) -> Result<()> {
        if !force {
            self.close_if_unused()?;
        }
        let name = self.config.name.clone();
        // Nobody listens any more when the server is on its way out, and then it stops anyway.
        let _ = self.events.send(Event::Stop { name });
        match self.await_end() {
            State::Left => bail!("it has just been left to another server: stop it there"),
            _ => Ok(()),
        }
    }

    fn leave(&self) -> Result<()> {
        if self.doors().state != State::Serving {
            bail!("it is being stopped");
        }
        self.may_leave()?;
        let name = self.config.name.clone();
        // As above.
        let _ = self.events.send(Event::Leave { name });
        // If somebody else has stopped it the name is free as well.
        self.await_end();
        Ok(())
    }
}

fn ublk_status(door: &UblkDoor, registry: &Registry) -> UblkStatus {
    let facts = door.facts();
    let affinity = facts.affinity.as_ref();
    UblkStatus {
        device: door.block_path(),
        queues: facts.queues,
        depth: facts.depth,
        data: facts.data,
        features: facts.features.names(),
        affinity: affinity.map(|queues| queues.iter().map(ToString::to_string).collect()),
        counters: registry.totals(),
    }
}

fn session_status(info: &SessionInfo) -> SessionStatus {
    SessionStatus {
        pid: info.peer_pid,
        state: info.state,
        vrings: info.vrings,
        age_seconds: info.since.elapsed().unwrap_or_default().as_secs(),
    }
}
