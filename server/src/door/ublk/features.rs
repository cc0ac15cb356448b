//! The feature bits of the ublk driver and their names.

use libublk::sys;

/// The feature bits of `UBLK_U_CMD_GET_FEATURES` by name. The newest ones are not in the bindings
/// yet and stand here by number (`include/uapi/linux/ublk_cmd.h`, Linux 7.3).
const NAMES: [(u64, &str); 21] = [
    (sys::UBLK_F_SUPPORT_ZERO_COPY as u64, "SUPPORT_ZERO_COPY"),
    (
        sys::UBLK_F_URING_CMD_COMP_IN_TASK as u64,
        "URING_CMD_COMP_IN_TASK",
    ),
    (sys::UBLK_F_NEED_GET_DATA as u64, "NEED_GET_DATA"),
    (sys::UBLK_F_USER_RECOVERY as u64, "USER_RECOVERY"),
    (
        sys::UBLK_F_USER_RECOVERY_REISSUE as u64,
        "USER_RECOVERY_REISSUE",
    ),
    (sys::UBLK_F_UNPRIVILEGED_DEV as u64, "UNPRIVILEGED_DEV"),
    (sys::UBLK_F_CMD_IOCTL_ENCODE as u64, "CMD_IOCTL_ENCODE"),
    (sys::UBLK_F_USER_COPY as u64, "USER_COPY"),
    (sys::UBLK_F_ZONED as u64, "ZONED"),
    (
        sys::UBLK_F_USER_RECOVERY_FAIL_IO as u64,
        "USER_RECOVERY_FAIL_IO",
    ),
    (sys::UBLK_F_UPDATE_SIZE as u64, "UPDATE_SIZE"),
    (sys::UBLK_F_AUTO_BUF_REG as u64, "AUTO_BUF_REG"),
    (sys::UBLK_F_QUIESCE as u64, "QUIESCE"),
    (sys::UBLK_F_PER_IO_DAEMON as u64, "PER_IO_DAEMON"),
    (sys::UBLK_F_BUF_REG_OFF_DAEMON as u64, "BUF_REG_OFF_DAEMON"),
    (sys::UBLK_F_BATCH_IO as u64, "BATCH_IO"),
    (sys::UBLK_F_INTEGRITY as u64, "INTEGRITY"),
    (sys::UBLK_F_SAFE_STOP_DEV as u64, "SAFE_STOP_DEV"),
    (sys::UBLK_F_NO_AUTO_PART_SCAN as u64, "NO_AUTO_PART_SCAN"),
    (sys::UBLK_F_SHMEM_ZC as u64, "SHMEM_ZC"),
    (1 << 20, "IO_DESC_SIZE"),
];

/// What the driver can do: the bits of `UBLK_F_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Whether all of these `UBLK_F_*` bits are there.
    #[must_use]
    pub fn has(self, bits: u32) -> bool {
        self.0 & u64::from(bits) == u64::from(bits)
    }

    /// The features by name, without their prefix `UBLK_F_`; those that we do not know as `BIT_n`.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        (0..u64::BITS)
            .filter(|shift| self.0 >> shift & 1 == 1)
            .map(|shift| {
                let known = NAMES.iter().find(|(bit, _)| *bit == 1 << shift);
                known.map_or_else(|| format!("BIT_{shift}"), |(_, name)| (*name).to_owned())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_each_bit_once_and_in_order() {
        for (shift, (bit, name)) in NAMES.iter().enumerate() {
            assert_eq!(*bit, 1 << shift, "{name}");
        }
    }

    #[test]
    fn features_are_told_by_name_and_unknown_ones_by_number() {
        let features = Features(1 << 3 | 1 << 6 | 1 << 40);
        assert_eq!(
            features.names(),
            ["USER_RECOVERY", "CMD_IOCTL_ENCODE", "BIT_40"]
        );
        assert!(features.has(sys::UBLK_F_CMD_IOCTL_ENCODE));
        assert!(!features.has(sys::UBLK_F_CMD_IOCTL_ENCODE | sys::UBLK_F_ZONED));
    }
}
