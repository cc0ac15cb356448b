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
use crate::request::Limits;

/// How long a client's requests may take to end when the door closes.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// What the admin socket's thread sees.
pub(super) struct Shared {
    pub(super) config: ExportConfig,
    pub(super) limits: Limits,
    /// Dropped as soon as the doors are closed: an admin client must not keep the next server from it.
    pub(super) storage: Mutex<Option<Arc<dyn StorageControl>>>,
    pub(super) access: Arc<Ownership>,
    /// Serializes resizes.
    pub(super) resizing: Mutex<()>,
    pub(super) doors: Mutex<Doors>,
    pub(super) ended: Condvar,
    pub(super) events: mpsc::Sender<Event>,
}

#[derive(Default)]
pub(super) struct Doors {
    pub(super) state: State,
    /// Whether the block device was taken over from another server.
    pub(super) is_inherited: bool,
    /// Declared before the doors that it leads to.
    pub(super) upgrade: Option<UpgradeListener>,
    pub(super) ublk: Option<Counted<UblkDoor>>,
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
    Ublk(UblkDoor),
    Vhost(VhostDoor),
}

impl Closing {
    pub(super) fn close(self, name: &str, claim: &NameLock) {
        match self {
            Self::Ublk(door) => match door.stop() {
                Ok(()) => claim.forget_device(),
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
    pub(super) fn doors(&self) -> MutexGuard<'_, Doors> {
        // A holder that panicked has taken a door or has not: both are valid states.
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes both doors and drops the storage. If the export is left to another server, the block
    /// device stays.
    pub(super) fn close_doors(&self, claim: &NameLock, is_left: bool) {
        let name = &self.config.name;
        let (upgrade, ublk, vhost) = {
            let mut doors = self.doors();
            doors.state = State::Stopping;
            (doors.upgrade.take(), doors.ublk.take(), doors.vhost.take())
        };
        // Before the block device, whose removal waits for pending connections to it.
        drop(upgrade);
        // From here on ownership stays as it is noted.
        self.access.close();
        // The ublk door first: it may have a file system on it that wants to write.
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
        // Not under the lock: to close a file may take time, and `stat` must not wait for it.
        let storage = self.storage().take();
        drop(storage);
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
