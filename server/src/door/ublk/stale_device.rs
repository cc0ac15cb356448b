//! Devices whose server has died: stale ones, which are removed, and recoverable ones, which the next
//! server of the export takes over.
//!
//! After SIGKILL the driver stops the device by itself, but does not delete it: its id stays in use.
//! A device is removed here only if it cannot have a server: its state in the driver is DEAD, and its
//! character device, which a server holds open from beginning to end, can be opened. That includes
//! devices of other programs. A device in user recovery, which waits for a server, is not stale; only
//! the export that it belongs to takes it over or removes it.

use std::fs::{self, OpenOptions};
use std::io;
use std::time::Duration;

use libublk::sys;

use super::control::Control;
use super::error::{UblkError, Unavailable};
use super::params::limits;
use super::paths::char_path;
use crate::engine::wait::repeat_while;
use crate::request::Limits;

/// How long the driver may take to stop the device of a server that was killed.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// How often it is asked whether it has.
const STOP_INTERVAL: Duration = Duration::from_millis(10);

/// The devices whose state is DEAD. One that a living server is setting up looks the same; [`remove`]
/// tells them apart.
///
/// # Errors
///
/// When there is no ublk, or not for us.
pub fn stale_devices() -> Result<Vec<u32>, UblkError> {
    devices(is_dead)
}

/// The ids of devices that are as wanted.
fn devices(wanted: impl Fn(&sys::ublksrv_ctrl_dev_info) -> bool) -> Result<Vec<u32>, UblkError> {
    let ids = known_ids().map_err(Unavailable::Other)?;
    if ids.is_empty() {
        // Also without a driver. Where only its control device is missing, it is not known what there is.
        return Ok(Vec::new());
    }
    let control = Control::open()?;
    let mut found = Vec::new();
    for id in ids {
        match control.info(id) {
            Ok(info) if wanted(&info) => found.push(id),
            // Gone meanwhile, or the device of an unprivileged user, which is not ours to judge.
            Ok(_) | Err(UblkError::Command { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// What a device whose server has died is to the next server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// There is no such device.
    Gone,
    /// Its state is DEAD: requests to it fail, and it can only be removed.
    Dead,
    /// It waits for a server. The limits are those that its users see.
    Waiting(Limits),
}

/// The state of a device without a server.
///
/// # Errors
///
/// [`UblkError::Alive`] when it still has one after some seconds; otherwise what the driver answered.
pub fn device_state(id: u32) -> Result<DeviceState, UblkError> {
    let control = Control::open()?;
    // The driver may not have noticed yet that the server is dead.
    let Some(info) = settled(&control, id, is_live)? else {
        return Ok(DeviceState::Gone);
    };
    if is_live(&info) {
        let why = match info.ublksrv_pid {
            pid if pid > 0 => format!("process {pid} still serves it; stop that first"),
            _ => "its server has not ended, or is out of sight; try again when it has".to_owned(),
        };
        return Err(UblkError::Alive { id, why });
    }
    if !is_waiting(&info) {
        return Ok(DeviceState::Dead);
    }
    Ok(DeviceState::Waiting(limits(&control.params(id)?)))
}

/// The devices that wait for a server.
///
/// # Errors
///
/// When there is no ublk, or not for us.
pub fn waiting_devices() -> Result<Vec<u32>, UblkError> {
    devices(is_waiting)
}

/// The device that was made with this mark ([`super::UblkConfig::mark`]), if there is one. A mark of
/// zero is none.
///
/// # Errors
///
/// When there is no ublk, or not for us.
pub fn marked(mark: u64) -> Result<Option<u32>, UblkError> {
    if mark == 0 {
        return Ok(None);
    }
    let has_it =
        |info: &sys::ublksrv_ctrl_dev_info| info.ublksrv_flags == mark && may_be_ours(info);
    let ours = devices(has_it)?;
    if ours.len() > 1 {
        // Any program that can read a mark can make another device with it, and only one of them had users.
        let waiting = devices(|info| has_it(info) && is_waiting(info))?;
        if let Some(id) = waiting.first() {
            return Ok(Some(*id));
        }
    }
    Ok(ours.first().copied())
}

/// Begins to take over a device that waits for a server: how it was made.
pub(super) fn take_over(
    control: &Control,
    id: u32,
) -> Result<sys::ublksrv_ctrl_dev_info, UblkError> {
    claim_waiting(control, id)?;
    control.info(id)
}

/// Makes sure that a waiting device has no server, also none that is on its way out or in.
fn claim_waiting(control: &Control, id: u32) -> Result<(), UblkError> {
    let recover = || control.start_recovery(id);
    let busy = |started: &Result<(), UblkError>| match started {
        Err(UblkError::Command { source, .. }) => source.raw_os_error() == Some(libc::EBUSY),
        _ => false,
    };
    repeat_while(STOP_LIMIT, STOP_INTERVAL, recover, busy)
}

/// What the driver knows of a device, once that is no longer one to `wait` for. `None` if there is no
/// such device.
fn settled(
    control: &Control,
    id: u32,
    wait: impl Fn(&sys::ublksrv_ctrl_dev_info) -> bool,
) -> Result<Option<sys::ublksrv_ctrl_dev_info>, UblkError> {
    let ask = || match control.info(id) {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    };
    repeat_while(
        STOP_LIMIT,
        STOP_INTERVAL,
        ask,
        |known| matches!(known, Ok(Some(info)) if wait(info)),
    )
}

/// Removes a device whose server is dead. It is no error if there is no such device. With
/// `even_if_waiting` one that waits for a server is removed as well, with the requests that wait: only a
/// person may say so.
///
/// # Errors
///
/// [`UblkError::Alive`] when the device has a server, or may get one again; otherwise what the
/// driver answered.
pub fn remove(id: u32, even_if_waiting: bool) -> Result<(), UblkError> {
    let control = Control::open()?;
    // Its server was killed a moment ago, or lives where we cannot see it.
    let dying = |info: &sys::ublksrv_ctrl_dev_info| {
        is_live(info) && (even_if_waiting || info.ublksrv_pid <= 0)
    };
    let Some(info) = settled(&control, id, dying)? else {
        return Ok(());
    };
    let alive = |why: String| Err(UblkError::Alive { id, why });
    if even_if_waiting && is_waiting(&info) {
        claim_waiting(&control, id)?;
        return delete(&control, id);
    }
    if info.ublksrv_pid > 0 {
        let pid = info.ublksrv_pid;
        return alive(format!("process {pid} serves it; stop that instead"));
    }
    if is_live(&info) {
        return alive("its disk is in use or its server is out of sight".to_owned());
    }
    if !is_dead(&info) {
        return alive("it waits for its server to come back".to_owned());
    }
    let path = char_path(id);
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    // The driver may still be cleaning up behind the dead server.
    let busy = |opened: &io::Result<_>| match opened {
        Err(error) => error.raw_os_error() == Some(libc::EBUSY),
        Ok(_) => false,
    };
    match repeat_while(STOP_LIMIT, STOP_INTERVAL, open, busy) {
        // As long as we have it no other process does: the device is as dead as it says. The driver
        // deletes it when we let go.
        Ok(held) => {
            let dead = control.info(id).map(|info| is_dead(&info))?;
            drop(held);
            if !dead {
                return alive("it has just been started".to_owned());
            }
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return alive(format!("a living process has {} open", path.display()));
        }
        Err(source) => return Err(UblkError::CharDevice { id, source }),
    }
    delete(&control, id)
}

fn delete(control: &Control, id: u32) -> Result<(), UblkError> {
    match control.delete(id) {
        Err(error) if error.is_gone() => Ok(()),
        other => other.map(|deleted| deleted.tell(id)),
    }
}

/// Whether we may have made a device. Any user may give a device a mark that was read somewhere.
fn may_be_ours(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    let ordinary_users = info.flags & u64::from(sys::UBLK_F_UNPRIVILEGED_DEV) != 0;
    !ordinary_users || info.owner_uid == rustix::process::geteuid().as_raw()
}

fn is_live(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    u32::from(info.state) == sys::UBLK_S_DEV_LIVE
}

fn is_dead(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    u32::from(info.state) == sys::UBLK_S_DEV_DEAD && info.ublksrv_pid <= 0
}

pub(super) fn is_waiting(info: &sys::ublksrv_ctrl_dev_info) -> bool {
    let states = [sys::UBLK_S_DEV_QUIESCED, sys::UBLK_S_DEV_FAIL_IO];
    states.contains(&info.state.into()) && info.flags & u64::from(sys::UBLK_F_USER_RECOVERY) != 0
}

/// The ids that the driver has, from sysfs.
fn known_ids() -> io::Result<Vec<u32>> {
    let entries = match fs::read_dir("/sys/class/ublk-char") {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut ids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| id_of(entry.file_name().to_str()?))
        .collect();
    ids.sort_unstable();
    Ok(ids)
}

fn id_of(name: &str) -> Option<u32> {
    name.strip_prefix("ublkc")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_dead_device_without_a_server_counts_as_dead() {
        let info = |state: u32, pid| sys::ublksrv_ctrl_dev_info {
            state: u16::try_from(state).unwrap(),
            ublksrv_pid: pid,
            ..Default::default()
        };
        assert!(is_dead(&info(sys::UBLK_S_DEV_DEAD, -1)));
        assert!(!is_dead(&info(sys::UBLK_S_DEV_DEAD, 42)));
        for state in [
            sys::UBLK_S_DEV_LIVE,
            sys::UBLK_S_DEV_QUIESCED,
            sys::UBLK_S_DEV_FAIL_IO,
        ] {
            assert!(!is_dead(&info(state, -1)), "{state}");
        }
    }

    #[test]
    fn what_another_user_made_is_not_ours() {
        let us = rustix::process::geteuid().as_raw();
        let info = |flags: u32, owner_uid| sys::ublksrv_ctrl_dev_info {
            flags: flags.into(),
            owner_uid,
            ..Default::default()
        };
        assert!(may_be_ours(&info(0, us + 1)), "an administrator's");
        assert!(may_be_ours(&info(sys::UBLK_F_UNPRIVILEGED_DEV, us)));
        assert!(!may_be_ours(&info(sys::UBLK_F_UNPRIVILEGED_DEV, us + 1)));
    }

    #[test]
    fn ids_are_read_from_the_names_of_character_devices() {
        assert_eq!(id_of("ublkc17"), Some(17));
        for other in ["ublkb17", "ublkc", "ublkc1x", "ublkc-1"] {
            assert_eq!(id_of(other), None, "{other}");
        }
    }
}
