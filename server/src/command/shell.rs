//! The commands for shells and packages: `completions`, `man`, `device-owner`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};

use super::cli::Cli;
use super::output::print;
use super::reference;
use crate::door::ublk;

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

/// `ublkup completions`
///
/// # Errors
///
/// When standard output cannot be written.
pub fn completions(shell: clap_complete::Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(&Cli::command()), "ublkup", &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}

/// The command line without hidden commands, which completion scripts would offer.
fn visible(cli: &Command) -> Command {
    Command::new("ublkup")
        .args(cli.get_arguments().cloned())
        .subcommands(
            cli.get_subcommands()
                .filter(|one| !one.is_hide_set())
                .cloned(),
        )
}

/// `ublkup man`
///
/// # Errors
///
/// When the pages cannot be written.
pub fn man(folder: &Path) -> Result<ExitCode> {
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .and_then(|()| std::fs::write(folder.join("ublkup.toml.5"), reference::man_page()))
        .with_context(|| format!("cannot write man pages to {}", folder.display()))?;
    Ok(ExitCode::SUCCESS)
}
