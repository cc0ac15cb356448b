//! What an export's threads share: its doors, its storage and its state.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use super::event::Event;
use super::name_lock::NameLock;
use super::upgrade::UpgradeListener;
use crate::config::ExportConfig;
use crate::door::ownership::Ownership;
use crate::door::ublk::UblkDoor;
use crate::door::vhost::VhostDoor;
use crate::engine::StorageControl;
use crate::engine::counters::CounterSet;
use crate::engine::crash;
use crate::engine::durable::NoteFile;
use crate::engine::events::{self, What};
use crate::engine::throttle::{RateLimits, Throttle};
use crate::request::Limits;

/// How long a client's requests may take to end when the door closes.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// What the admin socket's thread sees.
pub(super) struct Shared {
    /// No other export of this process has it.
    pub(super) number: u64,
    pub(super) config: ExportConfig,
    /// What can be changed while it is served; `None` once it is being ended.
    pub(super) live: Mutex<Option<Live>>,
    /// Name of the server.
    pub(super) server: String,
    pub(super) started_unix_seconds: u64,
    /// Whether those who may connect to the admin socket may change the log, which is the server's.
    pub(super) may_set_log: bool,
    pub(super) limits: Limits,
    /// Dropped as soon as the doors are closed: an admin client must not keep the next server from it.
    pub(super) storage: Mutex<Option<Arc<dyn StorageControl>>>,
    pub(super) access: Arc<Ownership>,
    /// What clients may do.
    pub(super) throttle: Arc<Throttle>,
    /// Serializes resizes.
    pub(super) resizing: Mutex<()>,
    pub(super) doors: Mutex<Doors>,
    pub(super) ended: Condvar,
    pub(super) events: mpsc::Sender<Event>,
}

/// The configuration with what was changed, and its note.
pub(super) struct Live {
    pub(super) config: ExportConfig,
    pub(super) note: NoteFile,
}

#[derive(Default)]
pub(super) struct Doors {
    pub(super) state: State,
    /// What the export waits for while it ends.
    pub(super) waits_for: Option<String>,
    /// Whether the block device was taken over from another server.
    pub(super) is_inherited: bool,
    /// Declared before the doors that it leads to.
    pub(super) upgrade: Option<UpgradeListener>,
    /// Shared, so that what takes time is done without the lock of the doors.
    pub(super) ublk: Option<Counted<Arc<UblkDoor>>>,
    pub(super) vhost: Option<Counted<VhostDoor>>,
}

/// A door and its counters.
pub(super) type Counted<D> = (D, Arc<CounterSet>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Serving,
    Stopping,
    Stopped,
    /// Left to another server.
    Left,
}

/// A door that is being closed.
pub(super) enum Closing {
    Ublk(Arc<UblkDoor>),
    Vhost(VhostDoor),
}

impl Closing {
    /// Whether all requests had ended and nothing is left of the door.
    pub(super) fn close(self, name: &str, claim: &NameLock) -> bool {
        match self {
            Self::Ublk(door) => match door.stop() {
                Ok(()) => claim.forget_device(),
                Err(error) => {
                    tracing::error!("{name}: {error:#}");
                    return false;
                }
            },
            Self::Vhost(door) => {
                let left = door.stop(DRAIN_LIMIT);
                if left > 0 {
                    tracing::error!("{name}: vhost sessions that are stuck in the storage: {left}");
                    return false;
                }
            }
        }
        true
    }

    /// What closing waits for, for messages.
    fn waits_for(&self) -> String {
        match self {
            Self::Ublk(door) => format!("the requests of {}", door.block_path().display()),
            Self::Vhost(_) => "the requests of its vhost-user clients".into(),
        }
    }
}

impl Shared {
    pub(super) fn doors(&self) -> MutexGuard<'_, Doors> {
        // A holder that panicked has taken a door or has not: both are valid states.
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ublk door, if it is open. `stat` must not wait for what the driver is asked by it, so that is done without
    /// the lock.
    pub(super) fn ublk(&self) -> Option<Arc<UblkDoor>> {
        let doors = self.doors();
        doors.ublk.as_ref().map(|(door, _)| Arc::clone(door))
    }

    /// Closes both doors and drops the storage. If the export is left to another server, the block
    /// device stays. Returns whether all requests had ended.
    pub(super) fn close_doors(&self, claim: &NameLock, is_left: bool) -> bool {
        let name = &self.config.name;
        // From here on nothing is noted of it.
        drop(self.live().take());
        let mut all_ended = true;
        let close = |closing: Closing| {
            self.doors().waits_for = Some(closing.waits_for());
            closing.close(name, claim)
        };
        let (upgrade, ublk, vhost) = {
            let mut doors = self.doors();
            doors.state = State::Stopping;
            (doors.upgrade.take(), doors.ublk.take(), doors.vhost.take())
        };
        // Before the block device, whose removal waits for pending connections to it.
        drop(upgrade);
        // From here on ownership stays as it is noted.
        self.access.close();
        // What is held back is to end now, however long it would have had to wait.
        self.throttle.set(RateLimits::default());
        // The ublk door first: it may have a file system on it that wants to write.
        match ublk {
            Some((door, _)) if is_left => {
                if let Err(error) = door.leave() {
                    tracing::error!("{name}: {error:#}");
                }
            }
            Some((door, _)) => all_ended &= close(Closing::Ublk(door)),
            None => {}
        }
        if is_left {
            crash::point("block-door-left");
        }
        if let Some((door, _)) = vhost {
            all_ended &= close(Closing::Vhost(door));
        }
        // Not under the lock: to close a file may take time, and `stat` must not wait for it.
        let storage = self.storage().take();
        if let Some(storage) = &storage {
            // Threads that are stuck, or about to end, keep it.
            storage.end();
        }
        drop(storage);
        all_ended
    }

    /// Publishes as an event that the export is served.
    pub(super) fn tell_begin(&self) {
        let doors = self.doors();
        let recovered = doors.ublk.as_ref().filter(|_| doors.is_inherited);
        let what = match recovered {
            Some((door, _)) => What::Recovered {
                device: door.block_path(),
            },
            None => What::Started,
        };
        events::tell(&self.config.name, what);
    }

    pub(super) fn live(&self) -> MutexGuard<'_, Option<Live>> {
        // Replaced as a whole.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn storage(&self) -> MutexGuard<'_, Option<Arc<dyn StorageControl>>> {
        // An `Option` is valid whatever its holder panicked about.
        self.storage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_ended(&self, state: State) {
        self.doors().state = state;
        self.ended.notify_all();
    }

    /// Waits until the export has stopped or was left, and returns which.
    pub(super) fn await_end(&self) -> State {
        let mut doors = self.doors();
        while !matches!(doors.state, State::Stopped | State::Left) {
            doors = (self.ended.wait(doors)).unwrap_or_else(PoisonError::into_inner);
        }
        doors.state
    }
}
