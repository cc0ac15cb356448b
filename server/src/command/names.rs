//! The names that a completion script offers.

use std::path::PathBuf;

use clap_complete::CompletionCandidate;

use crate::export::runtime_dir::RuntimeDir;

/// The exports that are served, and those of dead servers.
pub(super) fn export_names() -> Vec<CompletionCandidate> {
    candidates(RuntimeDir::names)
}

/// The servers that run.
pub(super) fn server_names() -> Vec<CompletionCandidate> {
    candidates(RuntimeDir::server_names)
}

fn candidates(
    names: fn(&RuntimeDir) -> Result<Vec<String>, upgrade_proto::Error>,
) -> Vec<CompletionCandidate> {
    let asked_for = std::env::var_os("UBLKUP_RUNTIME_DIR").map(PathBuf::from);
    let names = RuntimeDir::find(asked_for).map(|dir| names(&dir));
    let Ok(Ok(names)) = names else {
        return Vec::new();
    };
    names.into_iter().map(CompletionCandidate::new).collect()
}
