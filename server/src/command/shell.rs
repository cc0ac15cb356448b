//! The commands for shells and packages: `completions`, `man`, `device-owner`, `device-name`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::env::{CompleteEnv, Shells};

use super::cli::Cli;
use super::output::print;
use super::{manual, reference};
use crate::door::ublk;
use crate::export::name_lock::DeviceRecord;
use crate::export::runtime_dir::RuntimeDir;

/// `ublkup device-owner`
///
/// # Errors
///
/// When there is no such device.
pub fn device_owner(kernel_name: &str) -> Result<ExitCode> {
    let Some((user, group)) = ublk::owner(kernel_name)? else {
        return Ok(ExitCode::FAILURE);
    };
    print(&format!("{user} {group}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// `ublkup device-name`
///
/// # Errors
///
/// When there is no such device.
pub fn device_name(dir: &RuntimeDir, kernel_name: &str) -> Result<ExitCode> {
    let mark = ublk::mark(kernel_name)?;
    let has_it = |record: &DeviceRecord| record.mark == mark;
    let is_its = |name: &String| dir.devices(name).is_ok_and(|all| all.iter().any(has_it));
    // Another server's devices have no mark.
    let names = dir.names()?;
    let Some(name) = names.iter().find(|name| mark != 0 && is_its(name)) else {
        return Ok(ExitCode::FAILURE);
    };
    print(&format!("{name}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// The variable in which a completion script names its shell.
const COMPLETE: &str = "COMPLETE";

/// Answers a completion script, if one has started this program.
pub fn complete() {
    CompleteEnv::with_factory(Cli::command)
        .var(COMPLETE)
        .complete();
}

/// `ublkup completions`: a script that asks this program at each press of the key.
///
/// # Errors
///
/// When standard output cannot be written.
pub fn completions(shell: clap_complete::Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    Shells::builtins()
        .completer(&shell.to_string())
        .context("this shell cannot be completed for")?
        .write_registration(COMPLETE, "ublkup", "ublkup", "ublkup", &mut script)?;
    print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}

/// `ublkup man`
///
/// # Errors
///
/// When the pages cannot be written.
pub fn man(folder: &Path) -> Result<ExitCode> {
    std::fs::create_dir_all(folder)
        .and_then(|()| manual::write_pages(Cli::command(), folder))
        .and_then(|()| std::fs::write(folder.join("ublkup.toml.5"), reference::man_page()))
        .with_context(|| format!("cannot write man pages to {}", folder.display()))?;
    Ok(ExitCode::SUCCESS)
}
