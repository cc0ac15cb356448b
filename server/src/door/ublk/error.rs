//! What can go wrong on the way to a ublk device and back, one line each.

use std::io;
use std::time::Duration;

/// Why this machine, or this user, has no ublk at all.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// There is no control device.
    #[error(
        "/dev/ublk-control does not exist: load the driver with `modprobe ublk_drv` (Linux 6.5 or later, CONFIG_BLK_DEV_UBLK)"
    )]
    NoDriver,
    /// The control device may not be opened, or not be used.
    #[error(
        "no permission for /dev/ublk-control: ublk devices need root (CAP_SYS_ADMIN), or udev rules for the devices of ordinary users (docs/operations.md)"
    )]
    NoPermission,
    /// The driver does not know ioctl-encoded commands.
    #[error(
        "the ublk driver of this kernel is too old (no ioctl-encoded commands): Linux 6.5 or later is needed"
    )]
    TooOld,
    /// `io_uring` cannot be had.
    #[error(
        "cannot set up io_uring for /dev/ublk-control: {0}; see the sysctl kernel.io_uring_disabled and the seccomp profile of the container"
    )]
    NoUring(#[source] io::Error),
    /// Anything else.
    #[error("cannot use /dev/ublk-control: {0}")]
    Other(#[source] io::Error),
}

/// Why a ublk device could not be made, or not be removed.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// No ublk at all.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Disk or configuration ask for what the driver cannot do.
    #[error("the ublk door cannot do that: {0}")]
    Config(String),
    /// Another device has the id.
    #[error(
        "ublk id {id} is in use{whose}: choose another one, leave it out, or stop the server that has it; `ublkup doctor` lists devices whose server is dead"
    )]
    IdInUse {
        /// The id asked for.
        id: u32,
        /// ` by …`, if it is an ordinary user's: any of them may take a number first.
        whose: String,
    },
    /// The driver has no device left to give.
    #[error(
        "cannot add a ublk device: the driver has no free id; stop a server or remove dead devices"
    )]
    TooManyDevices,
    /// The driver refused a command.
    #[error("{command} of {device} failed: {source}")]
    Command {
        /// The command as the driver calls it.
        command: &'static str,
        /// The device.
        device: DeviceName,
        /// What the driver answered.
        source: io::Error,
    },
    /// The driver did not answer.
    #[error("{command} of {device} did not answer within {} s: the driver waits for something, perhaps for storage behind the disk; see `dmesg`, and reboot if it shows an oops", waited.as_secs())]
    NoAnswer {
        /// The command as the driver calls it.
        command: &'static str,
        /// The device.
        device: DeviceName,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The character device did not open.
    #[error("cannot open /dev/ublkc{id}: {source}; is /dev a devtmpfs, or udev running?")]
    CharDevice {
        /// The device.
        id: u32,
        /// What open(2) answered.
        source: io::Error,
    },
    /// The character device does not belong to the user who made it.
    #[error(
        "/dev/ublkc{id} does not become ours: the udev rules are missing that give users their devices (docs/operations.md); root removes it with `ublkup doctor --clean`"
    )]
    NotOurs {
        /// The device.
        id: u32,
    },
    /// No thread to be had.
    #[error(
        "cannot start a thread for ublk{id}: {source}; see `ulimit -u` and the pids limit of the container"
    )]
    Thread {
        /// The device.
        id: u32,
        /// Why not.
        source: io::Error,
    },
    /// A queue thread did not come up, or fell over.
    #[error("queue {queue} of ublk{id} failed: {reason}")]
    Queue {
        /// The device.
        id: u32,
        /// The queue.
        queue: u16,
        /// Why.
        reason: String,
    },
    /// Queue threads that do not end.
    #[error("{threads} queue thread(s) of ublk{id} did not end within {} s: requests to the storage behind the disk are stuck", limit.as_secs())]
    Stuck {
        /// The device.
        id: u32,
        /// How many.
        threads: usize,
        /// How long we waited.
        limit: Duration,
    },
    /// Requests that the storage does not answer, when the device is to be stopped.
    #[error("requests of queue {queue} of ublk{id} did not end within {} s: they are stuck in the storage behind the disk; the device is left as after a crash (`ublkup doctor` lists it)", limit.as_secs())]
    Unanswered {
        /// The device.
        id: u32,
        /// The queue.
        queue: u16,
        /// How long we waited.
        limit: Duration,
    },
    /// The device to be removed, or to be recovered, is not dead.
    #[error("ublk{id} is left alone: {why}")]
    Alive {
        /// The device.
        id: u32,
        /// How we know.
        why: String,
    },
}

/// A device in a message: `ublk3`, or "a new device" before it has an id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceName(pub Option<u32>);

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(id) => write!(f, "ublk{id}"),
            None => f.write_str("a new ublk device"),
        }
    }
}

impl Unavailable {
    /// From the error of opening the control device.
    pub(super) fn from_open(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoDriver,
            Some(libc::EACCES | libc::EPERM) => Self::NoPermission,
            _ => Self::Other(error),
        }
    }
}

impl UblkError {
    /// Whether the driver says that there is no such device (any more).
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Command { source, .. } if source.raw_os_error() == Some(libc::ENODEV))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_one_line_that_names_its_subject() {
        let cases: [(UblkError, &[&str]); 8] = [
            (
                Unavailable::from_open(io::Error::from_raw_os_error(libc::ENOENT)).into(),
                &["/dev/ublk-control", "modprobe ublk_drv"],
            ),
            (
                Unavailable::from_open(io::Error::from_raw_os_error(libc::EACCES)).into(),
                &["/dev/ublk-control", "root"],
            ),
            (Unavailable::TooOld.into(), &["too old", "6.5"]),
            (
                UblkError::IdInUse {
                    id: 7,
                    whose: " by a device of user 1000 (process 42)".into(),
                },
                &["id 7 is in use by a device of user 1000", "choose another"],
            ),
            (
                UblkError::NoAnswer {
                    command: "STOP_DEV",
                    device: DeviceName(Some(3)),
                    waited: Duration::from_secs(30),
                },
                &["STOP_DEV", "ublk3", "30 s", "dmesg"],
            ),
            (
                UblkError::Command {
                    command: "ADD_DEV",
                    device: DeviceName(None),
                    source: io::Error::from_raw_os_error(libc::ENOMEM),
                },
                &["ADD_DEV", "a new ublk device", "memory"],
            ),
            (
                UblkError::CharDevice {
                    id: 2,
                    source: io::Error::from_raw_os_error(libc::ENOENT),
                },
                &["/dev/ublkc2", "udev"],
            ),
            (
                UblkError::Stuck {
                    id: 1,
                    threads: 2,
                    limit: Duration::from_secs(30),
                },
                &["ublk1", "30 s"],
            ),
        ];
        for (error, words) in cases {
            let text = error.to_string();
            assert!(!text.contains('\n'), "{text}");
            for word in words {
                assert!(text.contains(word), "{word:?} is missing in {text:?}");
            }
        }
    }
}
