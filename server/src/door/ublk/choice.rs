//! What a new device gets of what the driver offers.

use libublk::sys;

use super::config::{DataPath, Recovery, UblkConfig};
use super::error::UblkError;
use super::features::Features;
use crate::engine::RingBuffers;

/// What was chosen for a new device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// How its data travels; never [`DataPath::Auto`].
    pub(super) data: DataPath,
    /// Its `UBLK_F_*` bits besides the one that is always set.
    pub(super) flags: u32,
}

/// Chooses as the configuration says.
///
/// # Errors
///
/// [`UblkError::Config`] when it insists on what cannot be had.
pub(super) fn of(
    config: &UblkConfig,
    ring_buffers: RingBuffers,
    features: Features,
    is_administrator: bool,
) -> Result<Choice, UblkError> {
    let (data, recovery) = match is_administrator {
        true => (
            data_path(config.data, ring_buffers, features)?,
            recovery_flags(config.recovery, features)?,
        ),
        false => (only_copied(config.data)?, no_recovery(config.recovery)?),
    };
    let no_scan = sys::UBLK_F_NO_AUTO_PART_SCAN;
    if !config.scan_partitions && !features.has(no_scan) {
        return Err(UblkError::Config(
            "this kernel's driver always looks for partitions (UBLK_F_NO_AUTO_PART_SCAN, Linux \
             7.0); leave --no-partition-scan away"
                .into(),
        ));
    }
    let flags = [
        (true, recovery),
        (data == DataPath::ZeroCopy, sys::UBLK_F_AUTO_BUF_REG),
        // Also for what the driver cannot register. It is older than that.
        (data != DataPath::Copy, sys::UBLK_F_USER_COPY),
        (!config.scan_partitions, no_scan),
        (!is_administrator, sys::UBLK_F_UNPRIVILEGED_DEV),
    ];
    let wanted = flags
        .into_iter()
        .filter_map(|(wanted, bits)| wanted.then_some(bits));
    Ok(Choice {
        data,
        flags: wanted.sum(),
    })
}

/// The flags of a new device that decide what becomes of it when its server dies.
fn recovery_flags(wanted: Recovery, features: Features) -> Result<u32, UblkError> {
    let missing = |name: &str, linux: &str| {
        Err(UblkError::Config(format!(
            "this kernel's driver cannot keep a device for its next server as asked ({name}, Linux \
             {linux}); leave --ublk-recovery away"
        )))
    };
    let reissue = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE;
    let fail = sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_FAIL_IO;
    let flags = match wanted {
        Recovery::Off => return Ok(0),
        Recovery::Auto if !features.has(reissue) => return Ok(0),
        Recovery::Reissue if !features.has(reissue) => {
            return missing("UBLK_F_USER_RECOVERY_REISSUE", "6.1");
        }
        Recovery::FailIo if !features.has(fail) => {
            return missing("UBLK_F_USER_RECOVERY_FAIL_IO", "6.12");
        }
        Recovery::Auto | Recovery::Reissue => reissue,
        Recovery::FailIo => fail,
    };
    let quiesce = sys::UBLK_F_QUIESCE;
    Ok(if features.has(quiesce) {
        flags | quiesce
    } else {
        flags
    })
}

/// How data shall get to the storage of a new device and back.
fn data_path(
    wanted: DataPath,
    storage: RingBuffers,
    features: Features,
) -> Result<DataPath, UblkError> {
    let driver = features.has(sys::UBLK_F_AUTO_BUF_REG);
    match wanted {
        DataPath::Auto if driver && matches!(storage, RingBuffers::Better { .. }) => {
            Ok(DataPath::ZeroCopy)
        }
        DataPath::Auto | DataPath::Copy => Ok(DataPath::Copy),
        DataPath::UserCopy if !features.has(sys::UBLK_F_USER_COPY) => Err(UblkError::Config(
            "this kernel's driver does not let servers copy (UBLK_F_USER_COPY, Linux 6.5)".into(),
        )),
        DataPath::UserCopy => Ok(DataPath::UserCopy),
        DataPath::ZeroCopy if !driver => Err(UblkError::Config(
            "this kernel's driver cannot do without a copy (UBLK_F_AUTO_BUF_REG, Linux 6.16)"
                .into(),
        )),
        DataPath::ZeroCopy if storage == RingBuffers::No => Err(UblkError::Config(
            "a disk in memory cannot do without a copy; leave --ublk-data away".into(),
        )),
        DataPath::ZeroCopy => Ok(DataPath::ZeroCopy),
    }
}

/// How data gets to the storage of an ordinary user's device: the driver lets only itself copy it.
fn only_copied(wanted: DataPath) -> Result<DataPath, UblkError> {
    match wanted {
        DataPath::Auto | DataPath::Copy => Ok(DataPath::Copy),
        DataPath::UserCopy | DataPath::ZeroCopy => Err(UblkError::Config(
            "the driver copies the data of an ordinary user's device; leave --ublk-data away"
                .into(),
        )),
    }
}

/// The driver does not keep an ordinary user's device for its next server.
fn no_recovery(wanted: Recovery) -> Result<u32, UblkError> {
    match wanted {
        Recovery::Off | Recovery::Auto => Ok(0),
        Recovery::Reissue | Recovery::FailIo => Err(UblkError::Config(
            "an ordinary user's device goes with its server; leave --ublk-recovery away".into(),
        )),
    }
}

/// How data gets to the storage of a device and back.
pub(super) fn data_path_of(info: &sys::ublksrv_ctrl_dev_info) -> DataPath {
    let features = Features(info.flags);
    if features.has(sys::UBLK_F_AUTO_BUF_REG) {
        DataPath::ZeroCopy
    } else if features.has(sys::UBLK_F_USER_COPY) {
        DataPath::UserCopy
    } else {
        DataPath::Copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Features = Features(sys::UBLK_F_CMD_IOCTL_ENCODE as u64);
    const NEW: Features = Features(u64::MAX);
    const BETTER: RingBuffers = RingBuffers::Better {
        alignment_bytes: 512,
    };

    fn config(data: DataPath, recovery: Recovery) -> UblkConfig {
        UblkConfig {
            id: None,
            queues: 1,
            depth: 1,
            threads: crate::engine::threads::ThreadOptions::default(),
            throttle: std::sync::Arc::default(),
            affinity: None,
            scan_partitions: true,
            data,
            ring_places: None,
            recovery,
            mark: 1,
            take_over: None,
            refuse_writes: false,
            elsewhere: None,
        }
    }

    #[test]
    fn left_to_itself_a_device_gets_what_there_is() {
        let auto = config(DataPath::Auto, Recovery::Auto);
        let old = of(&auto, BETTER, OLD, true).unwrap();
        assert_eq!((old.data, old.flags), (DataPath::Copy, 0));
        let new = of(&auto, BETTER, NEW, true).unwrap();
        let flags = sys::UBLK_F_AUTO_BUF_REG
            | sys::UBLK_F_USER_COPY
            | sys::UBLK_F_USER_RECOVERY
            | sys::UBLK_F_USER_RECOVERY_REISSUE
            | sys::UBLK_F_QUIESCE;
        assert_eq!((new.data, new.flags), (DataPath::ZeroCopy, flags));
        // What is no better without a copy is copied.
        for plain in [RingBuffers::No, RingBuffers::Possible] {
            let data = of(&auto, plain, NEW, true).unwrap().data;
            assert_eq!(data, DataPath::Copy, "{plain:?}");
        }
        let users = of(&auto, BETTER, NEW, false).unwrap();
        let unprivileged = sys::UBLK_F_UNPRIVILEGED_DEV;
        assert_eq!((users.data, users.flags), (DataPath::Copy, unprivileged));
    }

    #[test]
    fn what_is_insisted_on_and_cannot_be_had_is_refused_with_its_option() {
        let refused = |config: &UblkConfig, buffers, features, root| {
            of(config, buffers, features, root).unwrap_err().to_string()
        };
        let data = |data| config(data, Recovery::Off);
        let stays = |recovery| config(DataPath::Copy, recovery);
        for (why, word) in [
            (
                refused(&data(DataPath::UserCopy), BETTER, OLD, true),
                "USER_COPY",
            ),
            (
                refused(&data(DataPath::ZeroCopy), BETTER, OLD, true),
                "AUTO_BUF_REG",
            ),
            (
                refused(&data(DataPath::ZeroCopy), RingBuffers::No, NEW, true),
                "--ublk-data",
            ),
            (
                refused(&data(DataPath::ZeroCopy), BETTER, NEW, false),
                "--ublk-data",
            ),
            (
                refused(&stays(Recovery::Reissue), BETTER, OLD, true),
                "RECOVERY_REISSUE",
            ),
            (
                refused(&stays(Recovery::FailIo), BETTER, OLD, true),
                "RECOVERY_FAIL_IO",
            ),
            (
                refused(&stays(Recovery::FailIo), BETTER, NEW, false),
                "--ublk-recovery",
            ),
        ] {
            assert!(why.contains(word), "{word}: {why}");
        }
        let mut quiet = data(DataPath::Copy);
        quiet.scan_partitions = false;
        let why = refused(&quiet, BETTER, OLD, true);
        assert!(why.contains("--no-partition-scan"), "{why}");
        let flags = of(&quiet, BETTER, NEW, true).unwrap().flags;
        assert_eq!(flags, sys::UBLK_F_NO_AUTO_PART_SCAN);
    }
}
