//! Measurements for monitoring systems, in the text format of Prometheus: `ublkup metrics` and `serve --metrics`.
//!
//! | file      | tells                                              |
//! |-----------|----------------------------------------------------|
//! | `text.rs` | what is measured, and how it is written            |
//! | `http.rs` | the listener from which Prometheus collects it     |

mod http;
mod text;

use std::process::ExitCode;

use anyhow::Result;

pub use http::{Address, MetricsServer};

use super::client::{Found, Silent, statuses};
use super::output::{complain, print};
use crate::export::runtime_dir::RuntimeDir;

/// `ublkup metrics`: of all exports of this machine.
///
/// # Errors
///
/// When the runtime directory cannot be read.
pub fn run(dir: &RuntimeDir) -> Result<ExitCode> {
    let Found { exports, silent } = statuses(dir)?;
    for Silent { name, why, .. } in &silent {
        complain(&format!("{name}: {why}"));
    }
    let silent: Vec<_> = silent.iter().map(|silent| silent.name.as_str()).collect();
    print(&text::render(&exports, &silent))?;
    // The text says which exports have no server; a collector keeps what a failed command printed for itself.
    Ok(ExitCode::SUCCESS)
}
