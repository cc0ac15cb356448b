//! Reasons not to begin.

use anyhow::{Result, bail};

/// Why a guest's disk cannot be moved, found out before anything was changed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotUpgradable(pub String);

/// Refuses the move.
pub fn refuse<T>(why: impl Into<String>) -> Result<T> {
    bail!(NotUpgradable(why.into()))
}
