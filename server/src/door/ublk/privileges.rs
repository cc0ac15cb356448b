//! Whether the driver takes this process for an administrator.

use rustix::thread::{CapabilitySet, capabilities};

use super::error::Unavailable;

/// Whether the driver takes this process for an administrator. Ordinary users may make devices where
/// the driver offers `UBLK_F_UNPRIVILEGED_DEV`.
pub(super) fn is_administrator() -> Result<bool, Unavailable> {
    let ours = capabilities(None).map_err(|error| Unavailable::Other(error.into()))?;
    Ok(ours.effective.contains(CapabilitySet::SYS_ADMIN))
}
