//! The `ublkup` command.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::builder::Resettable;
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use ublkup::command::cli::{Cli, Command, Qemu, USAGE};
use ublkup::command::{
    add, client, complain, doctor, metrics, probe, qemu, reload, serve, shell, snapshot, top, watch,
};
use ublkup::engine::log;
use ublkup::export::explain;
use ublkup::export::runtime_dir::RuntimeDir;
use ublkup::storage::keep_qemu;

fn main() -> ExitCode {
    shell::complete();
    let cli = command_line();
    let result = log::start(&cli.log, cli.log_format)
        .context("cannot start a thread for the log")
        .and_then(|log| {
            let result = run(cli);
            // Its last lines come before the error.
            drop(log);
            result
        });
    result.unwrap_or_else(|error| {
        complain(&explain(&error));
        ExitCode::FAILURE
    })
}

/// The command line. A program that udev runs has udev's environment: a wrong log filter there is no reason to leave a
/// device to root.
fn command_line() -> Cli {
    let command = Cli::command();
    let command = match std::env::args_os().nth(1) {
        Some(word) if word == "device-owner" || word == "device-name" => {
            command.mut_arg("log", |log| log.env(Resettable::Reset))
        }
        _ => command,
    };
    let matches = command.try_get_matches();
    let parsed = matches.and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.unwrap_or_else(|error| {
        // clap's own answer lists hidden commands.
        if error.kind() == ErrorKind::MissingSubcommand {
            eprint!("{}", Cli::command().render_help());
            std::process::exit(USAGE.into());
        }
        error.exit()
    })
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let dir = || RuntimeDir::find(cli.runtime_dir.clone());
    match cli.command {
        Command::Serve(options) => match options.exports() {
            Ok(exports) => {
                let configuration = options.configuration();
                let start = serve::StartOptions {
                    keep_going: options.keep_going,
                    predecessor: options.predecessor.into(),
                    sandbox: options.sandbox.is_on(),
                    server_name: options.server_name,
                    configuration,
                    run: options.run,
                    metrics: options.metrics,
                    room: options.room.unwrap_or(serve::DEFAULT_ROOM),
                };
                serve::run(&dir()?, exports, start)
            }
            Err(error) => {
                complain(&error.to_string());
                Ok(USAGE.into())
            }
        },
        Command::Add(options) => match options.exports() {
            Ok(exports) => add::run(&dir()?, exports, options.server.as_deref(), options.json),
            Err(error) => {
                complain(&error.to_string());
                Ok(USAGE.into())
            }
        },
        Command::List { json } => client::list(&dir()?, json),
        Command::Top => top::run(&dir()?),
        Command::Metrics => metrics::run(&dir()?),
        Command::Stat { name, json, watch } => client::stat(&dir()?, &name, json, watch),
        Command::Events {
            export,
            server,
            json,
        } => watch::events(&dir()?, export.as_deref(), server.as_deref(), json),
        Command::Resize {
            name,
            size,
            shrink,
            json,
        } => client::resize(&dir()?, &name, size, shrink, json),
        Command::Snapshot(asked) => snapshot::run(&dir()?, &asked),
        Command::Set { name, options } => client::set(&dir()?, &name, &options),
        Command::Reload {
            server,
            dry_run,
            json,
        } => reload::run(&dir()?, server.as_deref(), dry_run, json),
        Command::Stop { name, force } => client::stop(&dir()?, &name, force),
        Command::Recover {
            name,
            predecessor,
            sandbox,
        } => serve::recover(&dir()?, &name, predecessor.into(), sandbox.is_on()),
        Command::Probe { device, json } => probe::run(&device, cli.runtime_dir.as_deref(), json),
        Command::Qemu(asked) => run_qemu(&asked, cli.runtime_dir.as_deref()),
        Command::Doctor {
            remove: Some(id),
            yes,
            ..
        } => doctor::remove(&dir()?, id, yes),
        Command::Doctor { json, clean, .. } => doctor::run(&dir()?, json, clean),
        Command::QemuKeeper { folder, arguments } => {
            keep_qemu(&folder, &arguments)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::DeviceOwner { kernel_name } => shell::device_owner(&kernel_name),
        Command::DeviceName { kernel_name } => shell::device_name(&dir()?, &kernel_name),
        Command::Completions { shell: wanted } => shell::completions(wanted),
        Command::Man { folder } => shell::man(&folder),
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
    let usage = match &asked.devices[..] {
        [_] if !asked.unmounted => {
            "--live takes the disk from the guest, and a file system that is mounted there is lost with it: say \
             --unmounted when the guest has unmounted it and uses it no more; that cannot be seen from outside"
        }
        [disk] => {
            return qemu::move_disk(&qemu::Move {
                monitor,
                disk,
                back: asked.back,
                quiet: Duration::from_secs(asked.quiet.into()),
                runtime_dir,
            });
        }
        _ => "--live moves one DEVICE at a time",
    };
    complain(usage);
    Ok(USAGE.into())
}
