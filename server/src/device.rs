//! One export: a backend and its doors.
//!
//! | file            | tells                                            |
//! |-----------------|--------------------------------------------------|
//! | `open.rs`       | how it is opened: backend, doors, what was left  |
//! | `service.rs`    | what its admin socket answers                    |
//! | `succession.rs` | how a server gets it from another                |

mod open;
mod service;
mod succession;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::access::Access;
use crate::backend::Backend;
use crate::config::ExportConfig;
use crate::control::{self, Listening};
use crate::counters::Registry;
use crate::crash;
use crate::door::ublk::UblkDoor;
use crate::door::vhost::VhostDoor;
use crate::offer::Offer;
use crate::request::Limits;
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
}
