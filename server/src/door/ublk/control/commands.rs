//! The commands of `/dev/ublk-control` by number and name.

use libublk::sys;

/// A command by its number and the name that the driver's documentation gives it.
#[derive(Clone, Copy)]
pub(super) struct Command {
    pub(super) number: u32,
    pub(super) name: &'static str,
}

/// Declares a constant for each command, named as the driver names it.
macro_rules! commands {
    ($($name:ident = $number:ident),* $(,)?) => {
        $(pub(super) const $name: Command = Command {
            number: sys::$number,
            name: stringify!($name),
        };)*
    };
}

commands! {
    ADD_DEV = UBLK_U_CMD_ADD_DEV,
    SET_PARAMS = UBLK_U_CMD_SET_PARAMS,
    START_DEV = UBLK_U_CMD_START_DEV,
    STOP_DEV = UBLK_U_CMD_STOP_DEV,
    DEL_DEV = UBLK_U_CMD_DEL_DEV,
    GET_DEV_INFO = UBLK_U_CMD_GET_DEV_INFO,
    GET_DEV_INFO2 = UBLK_U_CMD_GET_DEV_INFO2,
    GET_PARAMS = UBLK_U_CMD_GET_PARAMS,
    START_USER_RECOVERY = UBLK_U_CMD_START_USER_RECOVERY,
    END_USER_RECOVERY = UBLK_U_CMD_END_USER_RECOVERY,
    GET_QUEUE_AFFINITY = UBLK_U_CMD_GET_QUEUE_AFFINITY,
    UPDATE_SIZE = UBLK_U_CMD_UPDATE_SIZE,
    QUIESCE_DEV = UBLK_U_CMD_QUIESCE_DEV,
    TRY_STOP_DEV = UBLK_U_CMD_TRY_STOP_DEV,
    GET_FEATURES = UBLK_U_CMD_GET_FEATURES,
}
