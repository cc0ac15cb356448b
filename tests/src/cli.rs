//! The command line.

use std::process::ExitCode;

use anyhow::Result;

use crate::{agent, guest, job};

/// Runs the command line and says what went wrong in one line.
#[must_use]
pub fn main() -> ExitCode {
    if guest::is_init() {
        return guest::init_main();
    }
    match dispatch() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<ExitCode> {
    match std::env::args().nth(1).as_deref() {
        Some(job::SUBCOMMAND) => job::child_main(),
        Some(guest::AGENT) => agent::main(),
        _ => crate::runner::quick(),
    }
}
