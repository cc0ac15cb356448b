//! Commands to `/dev/ublk-control`, each with a time limit.
//!
//! A command has a ring to itself while it runs, so that one that hangs (`DEL_DEV` after an oops, `STOP_DEV` while the
//! storage does not answer) holds up no other. The ring of one that has completed is kept for the next.

mod bounded;
mod commands;

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use libublk::sys;

use super::error::{DeviceName, UblkError, Unavailable};
use super::features::Features;
use super::params::Params;
use super::paths::char_path;
use super::privileges::is_administrator;
use bounded::{End, run_bounded};
use commands::*;

pub(super) const CONTROL_PATH: &str = "/dev/ublk-control";

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(30);

/// How long a deleted device may take to give its id back.
const HELD_LIMIT: Duration = Duration::from_secs(2);

/// Words of a mask of processors: as many as any kernel is built for (`NR_CPUS`).
const CPU_WORDS: usize = 128;

/// The id that asks the driver to choose one.
const ANY_ID: u32 = u32::MAX;

/// What a new device shall be.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewDevice {
    pub(super) id: Option<u32>,
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) buffer_bytes: u32,
    /// A number by which its maker knows it again; the driver keeps it and does not look at it.
    pub(super) mark: u64,
    /// `UBLK_F_*` bits besides the one that is always set.
    pub(super) flags: u32,
}

/// What became of a deleted device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deleted {
    /// Nothing is left.
    IdIsFree,
    /// Disk and character device are gone, but the disk is still open, for instance as a
    /// mounted file system. The id becomes free when that ends.
    DiskIsOpen,
}

impl Deleted {
    /// Says what the user should know.
    pub(super) fn tell(self, id: u32) {
        if self == Self::DiskIsOpen {
            tracing::warn!(
                "ublk{id} is removed, but its disk is still open, perhaps as a mounted file system: the \
                 id is taken until that ends"
            );
        }
    }
}

/// Whether ublk devices can be made here, by this process, and what the driver offers.
///
/// # Errors
///
/// Why not, in words for the user.
pub fn available() -> Result<Features, Unavailable> {
    Control::open()?.features()
}

/// The control device.
pub(super) struct Control {
    file: File,
    /// Commands name the character device too: the driver asks that of devices of ordinary users,
    /// and looks whether the sender may read and write it.
    by_path: Cell<bool>,
}

/// Bytes of a character device's name in a command: enough for any, and the payload stays aligned.
const PATH_BYTES: u16 = 32;

/// A payload behind the name of the character device.
#[repr(C)]
#[derive(Clone, Copy)]
struct Named<T> {
    path: [u8; PATH_BYTES as usize],
    payload: T,
}

impl<T> Named<T> {
    fn new(id: u32, payload: T) -> Self {
        const { assert!(align_of::<T>() <= PATH_BYTES as usize) };
        let mut path = [0; PATH_BYTES as usize];
        let name = char_path(id);
        let name = name.as_os_str().as_encoded_bytes();
        path[..name.len()].copy_from_slice(name);
        Self { path, payload }
    }
}

impl Control {
    /// Opens the control device.
    pub(super) fn open() -> Result<Self, Unavailable> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL_PATH);
        Ok(Self {
            file: file.map_err(Unavailable::from_open)?,
            by_path: Cell::new(false),
        })
    }

    /// What the driver can do, if this process can make devices with it.
    pub(super) fn features(&self) -> Result<Features, Unavailable> {
        let features = self
            .exchange(GET_FEATURES, None, 0)
            .map(Features)
            .map_err(|error| match error {
                UblkError::Unavailable(unavailable) => unavailable,
                // Drivers before 6.5 do not know the question.
                UblkError::Command { source, .. } => match source.raw_os_error() {
                    Some(libc::EPERM | libc::EACCES) => Unavailable::NoPermission,
                    _ => Unavailable::TooOld,
                },
                other => Unavailable::Other(io::Error::other(other)),
            })?;
        if !features.has(sys::UBLK_F_CMD_IOCTL_ENCODE) {
            return Err(Unavailable::TooOld);
        }
        if !features.has(sys::UBLK_F_UNPRIVILEGED_DEV) && !is_administrator()? {
            return Err(Unavailable::NoPermission);
        }
        Ok(features)
    }

    /// Makes a device. The answer says what it became: id, queues (no more than the machine has
    /// CPUs), depth.
    pub(super) fn add(&self, new: NewDevice) -> Result<sys::ublksrv_ctrl_dev_info, UblkError> {
        let info = sys::ublksrv_ctrl_dev_info {
            nr_hw_queues: new.queues,
            queue_depth: new.depth,
            max_io_buf_bytes: new.buffer_bytes,
            dev_id: new.id.unwrap_or(ANY_ID),
            flags: u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE | new.flags),
            ublksrv_flags: new.mark,
            ..Default::default()
        };
        let words = sys::ublksrv_ctrl_cmd::default();
        self.run_as_it_is(ADD_DEV, new.id, words, info, None)
            .inspect(|info| self.speak_to(info))
            .map_err(|error| match (&error, new.id) {
                (UblkError::Command { source, .. }, id) => match (source.raw_os_error(), id) {
                    (Some(libc::EEXIST), Some(id)) => UblkError::IdInUse {
                        id,
                        whose: self.ordinary_owner(id).unwrap_or_default(),
                    },
                    (Some(libc::ENOSPC | libc::EACCES | libc::EEXIST), None) => {
                        UblkError::TooManyDevices
                    }
                    (Some(libc::EPERM), _) => Unavailable::NoPermission.into(),
                    // Queues and depth were checked before; ids end somewhere.
                    (Some(libc::EINVAL), Some(id)) => {
                        UblkError::Config(format!("the driver has no id {id}; try a smaller one"))
                    }
                    _ => error,
                },
                _ => error,
            })
    }

    /// The ordinary user who has a device, for a message.
    fn ordinary_owner(&self, id: u32) -> Option<String> {
        let info = self.info(id).ok()?;
        let (user, process) = (info.owner_uid, info.ublksrv_pid);
        let theirs = info.flags & u64::from(sys::UBLK_F_UNPRIVILEGED_DEV) != 0;
        theirs.then(|| format!(" by a device of user {user} (process {process})"))
    }

    /// Says what the disk of a device is like.
    pub(super) fn set_params(&self, id: u32, params: Params) -> Result<(), UblkError> {
        self.exchange(SET_PARAMS, Some(id), params).map(drop)
    }

    /// What the disk of a device is like.
    pub(super) fn params(&self, id: u32) -> Result<sys::ublk_params, UblkError> {
        let params = sys::ublk_params {
            // A struct of some hundred bytes.
            len: u32::try_from(size_of::<sys::ublk_params>()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        self.exchange(GET_PARAMS, Some(id), params)
    }

    /// At multiples of how many bytes the data of a device's requests lies in memory.
    pub(super) fn data_alignment(&self, id: u32) -> Result<u32, UblkError> {
        let answer = self.exchange(GET_PARAMS, Some(id), Params::room())?;
        Ok(answer.alignment_bytes())
    }

    /// Begins to take over a device whose server has died. EBUSY while the driver still cleans up
    /// behind that.
    pub(super) fn start_recovery(&self, id: u32) -> Result<(), UblkError> {
        self.exchange(START_USER_RECOVERY, Some(id), ())
    }

    /// Ends the taking over: the disk's requests go on. Waits as [`start`](Self::start) does.
    pub(super) fn end_recovery(&self, id: u32, cancel: &dyn Fn() -> bool) -> Result<(), UblkError> {
        self.run(END_USER_RECOVERY, Some(id), our_pid(), (), Some(cancel))
            .map(drop)
    }

    /// Makes the disk appear. The driver waits until every tag of every queue was fetched; when
    /// `cancel` says so, because a queue failed, we do not.
    pub(super) fn start(&self, id: u32, cancel: &dyn Fn() -> bool) -> Result<(), UblkError> {
        self.run(START_DEV, Some(id), our_pid(), (), Some(cancel))
            .map(drop)
    }

    /// Takes the disk away, after the requests under way, and aborts all fetches.
    pub(super) fn stop(&self, id: u32) -> Result<(), UblkError> {
        self.exchange(STOP_DEV, Some(id), ())
    }

    /// As [`stop`](Self::stop), unless the disk is open: then EBUSY.
    pub(super) fn stop_unless_open(&self, id: u32) -> Result<(), UblkError> {
        self.exchange(TRY_STOP_DEV, Some(id), ())
    }

    /// No more requests for the server; its idle fetches are aborted. There is no way back but a new
    /// server. EBUSY if a queue has no idle tag within `limit`: requests are held back all the same.
    pub(super) fn quiesce(&self, id: u32, limit: Duration) -> Result<(), UblkError> {
        let words = sys::ublksrv_ctrl_cmd {
            // Zero would be for ever.
            data: [u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1)],
            ..Default::default()
        };
        self.run(QUIESCE_DEV, Some(id), words, (), None)
    }

    /// Removes a device. The process that has its character device open must close it.
    ///
    /// The driver ends the command when the id is free, which it is not while a process has the disk
    /// open, were it for days. The device has gone by then, so that is not waited for.
    pub(super) fn delete(&self, id: u32) -> Result<Deleted, UblkError> {
        let node = format!("/sys/class/ublk-char/ublkc{id}");
        let gone_since = Cell::new(None);
        let held = || match gone_since.get() {
            Some(since) => Instant::elapsed(&since) > HELD_LIMIT,
            None => {
                if !Path::new(&node).exists() {
                    gone_since.set(Some(Instant::now()));
                }
                false
            }
        };
        let words = sys::ublksrv_ctrl_cmd::default();
        match self.run(DEL_DEV, Some(id), words, (), Some(&held)) {
            Ok(()) => Ok(Deleted::IdIsFree),
            Err(_) if held() => Ok(Deleted::DiskIsOpen),
            Err(error) => Err(error),
        }
    }

    /// What the driver knows of a device. Its `ublksrv_pid` is -1 without a (visible) server.
    pub(super) fn info(&self, id: u32) -> Result<sys::ublksrv_ctrl_dev_info, UblkError> {
        let info = sys::ublksrv_ctrl_dev_info::default();
        let words = sys::ublksrv_ctrl_cmd::default();
        let answer = self.run_as_it_is(GET_DEV_INFO, Some(id), words, info, None);
        let answer = match answer {
            // It is, or may be, the device of an ordinary user.
            Err(UblkError::Command { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) =>
            {
                self.run_named(GET_DEV_INFO2, id, words, info, None)
            }
            other => other,
        };
        answer.inspect(|info| self.speak_to(info))
    }

    /// From now on commands are for this device.
    fn speak_to(&self, info: &sys::ublksrv_ctrl_dev_info) {
        let unprivileged = u64::from(sys::UBLK_F_UNPRIVILEGED_DEV);
        self.by_path.set(info.flags & unprivileged != 0);
    }

    /// Gives the disk another size, which its users see at once.
    pub(super) fn update_size(&self, id: u32, sectors: u64) -> Result<(), UblkError> {
        let words = sys::ublksrv_ctrl_cmd {
            data: [sectors],
            ..Default::default()
        };
        self.run(UPDATE_SIZE, Some(id), words, (), None)
    }

    /// The processors whose requests go to a queue, as a mask.
    pub(super) fn queue_affinity(
        &self,
        id: u32,
        queue: u16,
    ) -> Result<[u64; CPU_WORDS], UblkError> {
        let words = sys::ublksrv_ctrl_cmd {
            data: [queue.into()],
            ..Default::default()
        };
        self.run(GET_QUEUE_AFFINITY, Some(id), words, [0; CPU_WORDS], None)
    }

    /// Runs a command that reads or fills `payload` and nothing else.
    fn exchange<T: Copy>(
        &self,
        command: Command,
        id: Option<u32>,
        payload: T,
    ) -> Result<T, UblkError> {
        self.run(command, id, sys::ublksrv_ctrl_cmd::default(), payload, None)
    }

    fn run<T: Copy>(
        &self,
        command: Command,
        id: Option<u32>,
        words: sys::ublksrv_ctrl_cmd,
        payload: T,
        cancel: Option<&dyn Fn() -> bool>,
    ) -> Result<T, UblkError> {
        match id {
            Some(id) if self.by_path.get() => self.run_named(command, id, words, payload, cancel),
            _ => self.run_as_it_is(command, id, words, payload, cancel),
        }
    }

    fn run_named<T: Copy>(
        &self,
        command: Command,
        id: u32,
        mut words: sys::ublksrv_ctrl_cmd,
        payload: T,
        cancel: Option<&dyn Fn() -> bool>,
    ) -> Result<T, UblkError> {
        words.dev_path_len = PATH_BYTES;
        let named = Named::new(id, payload);
        let answer = self.run_as_it_is(command, Some(id), words, named, cancel)?;
        Ok(answer.payload)
    }

    fn run_as_it_is<T: Copy>(
        &self,
        command: Command,
        id: Option<u32>,
        mut words: sys::ublksrv_ctrl_cmd,
        payload: T,
        cancel: Option<&dyn Fn() -> bool>,
    ) -> Result<T, UblkError> {
        // On the heap, because it is left to the driver if the command does not come back.
        let mut payload = Box::new(payload);
        words.dev_id = id.unwrap_or(ANY_ID);
        words.queue_id = u16::MAX;
        words.len = u16::try_from(size_of::<T>()).unwrap_or(u16::MAX);
        if words.len > 0 {
            words.addr = std::ptr::from_mut(&mut *payload) as u64;
        }
        let sqe = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), command.number)
            .cmd(command_bytes(words))
            .build();
        let begun = Instant::now();
        // SAFETY: `payload` lives until the command completed, or for ever (below).
        let end = unsafe { run_bounded(&sqe, LIMIT, cancel) };
        let failed = |source| UblkError::Command {
            command: command.name,
            device: DeviceName(id),
            source,
        };
        let end = match end {
            End::Result(result) if result >= 0 => return Ok(*payload),
            End::Result(result) => return Err(failed(io::Error::from_raw_os_error(-result))),
            End::NoRing(error) => return Err(Unavailable::NoUring(error).into()),
            End::Lost(error) => failed(error),
            End::Cancelled => failed(io::Error::other("cancelled")),
            End::NoAnswer => UblkError::NoAnswer {
                command: command.name,
                device: DeviceName(id),
                waited: begun.elapsed(),
            },
        };
        Box::leak(payload);
        Err(end)
    }
}

/// A command that names this process as the server.
fn our_pid() -> sys::ublksrv_ctrl_cmd {
    sys::ublksrv_ctrl_cmd {
        data: [u64::from(std::process::id())],
        ..Default::default()
    }
}

/// The command as it travels in the 80 bytes of a large submission entry.
fn command_bytes(words: sys::ublksrv_ctrl_cmd) -> [u8; 80] {
    const LEN: usize = size_of::<sys::ublksrv_ctrl_cmd>();
    const { assert!(LEN == 32) };
    // SAFETY: 32 bytes of integers without padding, any of which is a valid byte.
    let words = unsafe { std::mem::transmute::<sys::ublksrv_ctrl_cmd, [u8; LEN]>(words) };
    let mut bytes = [0; 80];
    bytes[..LEN].copy_from_slice(&words);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_missing_exactly_when_its_control_device_is() {
        let exists = std::path::Path::new("/dev/ublk-control").exists();
        let missing = matches!(available(), Err(Unavailable::NoDriver));
        assert_eq!(missing, !exists);
    }
}
