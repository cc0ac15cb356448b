//! The `ublkup` command.

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use ublkup::command::cli::{Cli, Command, Qemu};
use ublkup::command::{client, doctor, probe, qemu, serve};
use ublkup::export::runtime_dir::RuntimeDir;

/// Exit code for wrong usage; clap uses the same.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let Ok(filter) = EnvFilter::try_new(&cli.log) else {
        eprintln!("ublkup: --log '{}': no such filter", cli.log);
        return USAGE.into();
    };
    // The journal has clocks of its own.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    if journal {
        log.without_time().init();
    } else {
        log.init();
    }
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ublkup: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let dir = || RuntimeDir::find(cli.runtime_dir.clone());
    match cli.command {
        Command::Serve(options) => match options.exports() {
            Ok(exports) => {
                let how = serve::How {
                    keep_going: options.keep_going,
                    take_over: options.take_over,
                };
                serve::run(&dir()?, exports, how)
            }
            Err(error) => {
                eprintln!("ublkup: {error}");
                Ok(USAGE.into())
            }
        },
        Command::List { json } => client::list(&dir()?, json),
        Command::Stat { name, json, watch } => client::stat(&dir()?, &name, json, watch),
        Command::Resize {
            name,
            size,
            shrink,
            json,
        } => client::resize(&dir()?, &name, size, shrink, json),
        Command::Stop { name, force } => client::stop(&dir()?, &name, force),
        Command::Recover { name, take_over } => serve::recover(&dir()?, &name, take_over),
        Command::Probe { device, json } => probe::run(&device, cli.runtime_dir.as_deref(), json),
        Command::Qemu(asked) => run_qemu(&asked, cli.runtime_dir.as_deref()),
        Command::Doctor { json, clean } => doctor::run(&dir()?, json, clean),
        Command::DeviceOwner { kernel_name } => client::device_owner(&kernel_name),
        Command::Completions { shell } => client::completions(shell),
        Command::Man { folder } => client::man(&folder),
    }
}

fn run_qemu(asked: &Qemu, runtime_dir: Option<&Path>) -> anyhow::Result<ExitCode> {
    let Some(monitor) = &asked.live else {
        return qemu::launch(&qemu::Launch {
            disks: &asked.devices,
            print: asked.print,
            require_upgrade: asked.require_upgrade,
            command: &asked.command,
            runtime_dir,
        });
    };
    match &asked.devices[..] {
        [device] => qemu::live::run(monitor, device, runtime_dir),
        _ => {
            eprintln!("ublkup: --live moves one DEVICE at a time");
            Ok(USAGE.into())
        }
    }
}
