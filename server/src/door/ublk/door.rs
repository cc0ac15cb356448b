//! An open ublk door, as the rest of the server sees it.

use std::fmt;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use libublk::sys;

use super::config::{DoorEnd, Facts, UblkConfig};
use super::control::{CONTROL_PATH, Control};
use super::device::Device;
use super::error::UblkError;
use super::gate::WriteGate;
use super::paths::{char_path, disk_number};
use super::queue_threads::OnEnd;
use super::users;
use crate::door::ownership::BlockDoor;
use crate::engine::Storage;
use crate::engine::counters::Counters;
use crate::request::SECTOR_SHIFT;

/// A disk that is served as `/dev/ublkbN`. Dropping it stops it.
pub struct UblkDoor {
    id: u32,
    facts: Facts,
    gate: Arc<WriteGate>,
    /// Weak: the device can be removed only after this file was closed.
    char_device: Weak<File>,
    device: Arc<DeviceCell>,
}

/// A device until it is taken down. The lock is held meanwhile: a second caller finds it done.
struct DeviceCell(Mutex<Option<Device>>);

impl DeviceCell {
    fn lock(&self) -> MutexGuard<'_, Option<Device>> {
        // There is a device or there is none.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UblkDoor {
    /// The device that takes commands for all devices.
    pub const CONTROL: &str = CONTROL_PATH;

    /// Serves `storage`. When this returns, the disk is there.
    ///
    /// `counters` is asked once per queue, on the calling thread. `on_end` is called, on a queue
    /// thread that has ended, if the device ends without having been stopped; it must not wait for
    /// the door.
    ///
    /// # Errors
    ///
    /// What failed; no device is left then.
    pub fn start<B: Storage>(
        config: &UblkConfig,
        storage: &Arc<B>,
        counters: impl FnMut() -> Arc<Counters>,
        on_end: impl FnOnce(DoorEnd) + Send + 'static,
    ) -> Result<Self, UblkError> {
        let device = Device::start(config, storage, counters)?;
        let door = Self {
            id: device.id(),
            facts: device.facts().clone(),
            gate: Arc::new(device.queues().gate()),
            char_device: device.char_device(),
            device: Arc::new(DeviceCell(Mutex::new(Some(device)))),
        };
        let cell = Arc::downgrade(&door.device);
        let on_queue_end = move || {
            // Without a door it is being dropped, which stops the device.
            let Some(cell) = cell.upgrade() else { return };
            let mut guard = cell.lock();
            // One that is not there any more was stopped.
            let Some(mut device) = guard.take() else {
                return;
            };
            let end = device
                .take_down()
                .map_or_else(DoorEnd::Failed, |()| DoorEnd::Outside);
            // Before the report, so that nothing of the device is left when it arrives.
            drop(device);
            drop(guard);
            on_end(end);
        };
        door.watch(Box::new(on_queue_end));
        Ok(door)
    }

    /// Calls `on_end` when a queue thread ends; now if one has ended already.
    fn watch(&self, on_end: OnEnd) {
        let guard = self.device.lock();
        let missed = match &*guard {
            Some(device) => device.queues().watch(on_end),
            None => None,
        };
        drop(guard);
        if let Some(on_end) = missed {
            on_end();
        }
    }

    /// The number of the device.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What the device turned out to be.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Whether the driver takes commands for the device from administrators only (`CAP_SYS_ADMIN`).
    #[must_use]
    pub fn is_administrators(&self) -> bool {
        !self.facts.features.has(sys::UBLK_F_UNPRIVILEGED_DEV)
    }

    /// The disk.
    #[must_use]
    pub fn block_path(&self) -> PathBuf {
        format!("/dev/ublkb{}", self.id).into()
    }

    /// The device through which it is served.
    #[must_use]
    pub fn char_path(&self) -> PathBuf {
        char_path(self.id)
    }

    /// The open character device, for binding sockets to the disk. Keep it no longer than that: the
    /// device cannot be removed while it is open. `None` when the device is on its way out.
    #[must_use]
    pub fn char_device(&self) -> Option<Arc<File>> {
        self.char_device.upgrade()
    }

    /// Major and minor number of the disk; `None` when it has gone.
    #[must_use]
    pub fn disk_number(&self) -> Option<(u32, u32)> {
        disk_number(self.id)
    }

    /// Gives the disk another size, which its users see at once.
    ///
    /// # Errors
    ///
    /// When the driver cannot (Linux 6.16 can).
    pub fn resize(&self, capacity_bytes: u64) -> Result<(), UblkError> {
        // While it is open no other device has the number.
        let Some(_open) = self.char_device() else {
            return Err(UblkError::Config(format!(
                "ublk{} has just been removed",
                self.id
            )));
        };
        let control = Control::open()?;
        if !control.features()?.has(sys::UBLK_F_UPDATE_SIZE) {
            return Err(UblkError::Config(
                "this kernel's driver cannot give a disk another size (UBLK_F_UPDATE_SIZE, Linux \
                 6.16)"
                    .into(),
            ));
        }
        control.info(self.id)?;
        control.update_size(self.id, capacity_bytes >> SECTOR_SHIFT)
    }

    /// This door, as far as the right to write goes.
    #[must_use]
    pub fn writes(&self) -> Arc<dyn BlockDoor> {
        Arc::<WriteGate>::clone(&self.gate)
    }

    /// Finishes the requests under way and removes the device. Takes some minutes at the very
    /// most, when everything hangs.
    ///
    /// # Errors
    ///
    /// What did not go as it should. A device that ended by itself reported to `on_end` instead.
    pub fn stop(&self) -> Result<(), UblkError> {
        self.end(Device::take_down)
    }

    /// As [`stop`](Self::stop), in two steps: if the disk is not open it goes away and stays away,
    /// and `stop` does the rest. Otherwise nothing happens, and the answer is false.
    ///
    /// A driver before Linux 7.0 cannot be asked. Then nothing is taken away, and the answer is what the caller says,
    /// who sees which processes have the disk open when this one is in its sandbox, and what `/proc` tells here.
    ///
    /// # Errors
    ///
    /// What the driver answered.
    pub fn close_unless_open(&self, may_be_open: bool) -> Result<bool, UblkError> {
        if !Control::open()?.features()?.has(sys::UBLK_F_SAFE_STOP_DEV) {
            return Ok(!may_be_open && self.user().is_none());
        }
        let guard = self.device.lock();
        let Some(device) = &*guard else {
            // It has ended already.
            return Ok(true);
        };
        // The driver ends the queue threads if it stops the device.
        let on_end = device.queues().unwatch();
        match device.stop_unless_open() {
            Ok(()) => Ok(true),
            Err(error) if error.is_gone() => Ok(true),
            Err(error) => {
                drop(guard);
                if let Some(on_end) = on_end {
                    self.watch(on_end);
                }
                match error {
                    UblkError::Command { source, .. }
                        if source.raw_os_error() == Some(libc::EBUSY) =>
                    {
                        Ok(false)
                    }
                    error => Err(error),
                }
            }
        }
    }

    /// What uses the disk: a mount, say, or processes that have it open, as far as we can see. In its sandbox a server
    /// sees no other processes.
    #[must_use]
    pub fn user(&self) -> Option<String> {
        let disk = self.disk_number()?;
        upgrade_proto::disk_user(disk.0, disk.1).or_else(|| users::openers(disk))
    }

    /// Whether the device goes on when its server is gone.
    #[must_use]
    pub fn can_be_left(&self) -> bool {
        self.facts.features.has(sys::UBLK_F_USER_RECOVERY)
    }

    /// Leaves the device to another server: the disk stays, its requests wait or fail, as
    /// [`Recovery`](super::Recovery) says, until the other one takes it over ([`UblkConfig::take_over`]).
    ///
    /// # Errors
    ///
    /// What did not go as it should; the device stays all the same.
    pub fn leave(&self) -> Result<(), UblkError> {
        self.end(Device::leave)
    }

    fn end(&self, how: impl FnOnce(&mut Device) -> Result<(), UblkError>) -> Result<(), UblkError> {
        let mut guard = self.device.lock();
        match guard.take() {
            Some(mut device) => how(&mut device),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for UblkDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UblkDoor({})", self.id)
    }
}

impl Drop for UblkDoor {
    fn drop(&mut self) {
        if let Err(error) = self.end(Device::take_down) {
            tracing::error!("{error}");
        }
    }
}
