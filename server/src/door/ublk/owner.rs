//! Whose a device is: of which ordinary user (`UBLK_F_UNPRIVILEGED_DEV`), of which export.

use libublk::sys;

use super::control::Control;
use super::error::UblkError;
use super::stale_device::is_waiting;

/// User and group of the ordinary user who made the device with this kernel name (`ublkc0`,
/// `ublkb0`); `None` if an administrator did.
///
/// # Errors
///
/// When there is no such device, or not for us.
pub fn owner(kernel_name: &str) -> Result<Option<(u32, u32)>, UblkError> {
    let info = info(kernel_name)?;
    let owned = info.flags & u64::from(sys::UBLK_F_UNPRIVILEGED_DEV) != 0;
    Ok(owned.then_some((info.owner_uid, info.owner_gid)))
}

/// The mark that the server of the device with this kernel name made it with ([`super::UblkConfig::mark`]); zero if
/// it made none.
///
/// # Errors
///
/// When there is no such device, or not for us.
pub fn mark(kernel_name: &str) -> Result<u64, UblkError> {
    Ok(info(kernel_name)?.ublksrv_flags)
}

/// Whether the device with this number was made with one of these marks, and is served by the process `served_by`, or by
/// none.
///
/// # Errors
///
/// As for [`mark`].
pub fn is_marked(number: u32, marks: &[u64], served_by: Option<i32>) -> Result<bool, UblkError> {
    let info = Control::open()?.info(number)?;
    let has_mark = info.ublksrv_flags != 0 && marks.contains(&info.ublksrv_flags);
    let served = match served_by {
        Some(pid) => info.ublksrv_pid == pid,
        // Some kernels go on naming the process that has ended.
        None => info.ublksrv_pid <= 0 || is_waiting(&info),
    };
    Ok(has_mark && served)
}

fn info(kernel_name: &str) -> Result<sys::ublksrv_ctrl_dev_info, UblkError> {
    let id = id_of(kernel_name)
        .ok_or_else(|| UblkError::Config(format!("'{kernel_name}' is no ublk device")))?;
    Control::open()?.info(id)
}

fn id_of(kernel_name: &str) -> Option<u32> {
    let digits = ["ublkc", "ublkb"]
        .iter()
        .find_map(|prefix| kernel_name.strip_prefix(prefix))?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_the_names_the_kernel_gives_them() {
        assert_eq!(id_of("ublkc17"), Some(17));
        assert_eq!(id_of("ublkb0"), Some(0));
        for other in ["ublkb0p1", "ublkc", "ublkc+1", "ublk0", "sda", "../ublkc0"] {
            assert_eq!(id_of(other), None, "{other}");
        }
    }
}
