//! `ublkup serve`: starts the exports, waits, takes them down.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread::Scope;

use anyhow::{Context, Result, anyhow};
use signal_hook::iterator::Signals;

use super::signals;
use crate::config::{ExportConfig, ServedAs, check_name};
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{Event, Export};

/// How a server begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// Serve what can be served when some of several exports cannot start.
    pub keep_going: bool,
    /// Go on with what living servers of the same names have.
    pub take_over: bool,
}

/// Serves what was last served under a name.
///
/// # Errors
///
/// When nothing is known of it, or it cannot be served.
pub fn recover(dir: &RuntimeDir, name: &str, take_over: bool) -> Result<ExitCode> {
    check_name(name)?;
    let text = dir.served(name).with_context(|| {
        format!(
            "nothing is known of an export called '{name}' under {}",
            dir.path().display()
        )
    })?;
    let served: ServedAs = serde_json::from_str(&text)
        .with_context(|| format!("{name}: the note of what was served makes no sense"))?;
    let how = How {
        take_over,
        ..How::default()
    };
    run(dir, vec![served.export()?], how)
}

/// Serves `configs` until a signal, or until the last export was stopped.
///
/// # Errors
///
/// When an export cannot be started (unless told to keep going, and another can).
pub fn run(dir: &RuntimeDir, configs: Vec<ExportConfig>, how: How) -> Result<ExitCode> {
    let How {
        keep_going,
        take_over,
    } = how;
    let (events, inbox) = mpsc::channel();
    forward_signals(events.clone())?;
    let mut exports = BTreeMap::new();
    let mut code = ExitCode::SUCCESS;
    for config in configs {
        let name = config.name.clone();
        match Export::start(dir, config, take_over, events.clone()) {
            Ok(export) => {
                exports.insert(name, export);
            }
            Err(error) if keep_going => {
                tracing::error!("{name}: {error:#}");
                code = ExitCode::FAILURE;
            }
            Err(error) => {
                end_all(exports, Export::give_up);
                return Err(error.context(name));
            }
        }
    }
    if exports.is_empty() {
        return Err(anyhow!("none of the exports could be started"));
    }
    if let Err(error) = announce(&exports) {
        end_all(exports, Export::give_up);
        return Err(error.context("cannot write to standard output"));
    }
    if !await_the_end(exports, &inbox)? {
        code = ExitCode::FAILURE;
    }
    Ok(code)
}

/// Serves until the last export has ended; whether none lost a door before that. An export drains on
/// its own: as long as that takes, all that happens to the others happens.
fn await_the_end(
    mut exports: BTreeMap<String, Export>,
    inbox: &mpsc::Receiver<Event>,
) -> Result<bool> {
    let mut well = true;
    std::thread::scope(|scope| {
        while !exports.is_empty() {
            match inbox.recv().context("nobody is left who could stop us")? {
                Event::Signal(signal) => {
                    tracing::info!(exports = exports.len(), signal, "draining");
                    tell_manager(&[sd_notify::NotifyState::Stopping]);
                    let leaves = signal == signals::LEAVE;
                    let end = if leaves { Export::leave } else { Export::stop };
                    for export in std::mem::take(&mut exports).into_values() {
                        end_in(scope, export, end);
                    }
                }
                Event::Leave { name } => {
                    if let Some(export) = exports.remove(&name) {
                        end_in(scope, export, Export::leave);
                    }
                }
                Event::Stop { name } => {
                    if let Some(export) = exports.remove(&name) {
                        end_in(scope, export, Export::stop);
                    }
                }
                Event::Closed { name, door, why } => {
                    let Some(export) = exports.get_mut(&name) else {
                        continue;
                    };
                    tracing::error!("{name}: the {door} door closed: {why}");
                    well = false;
                    if !export.close(door)
                        && let Some(export) = exports.remove(&name)
                    {
                        tracing::error!("{name}: no door is left; the export ends");
                        end_in(scope, export, Export::stop);
                    }
                }
            }
        }
        Ok(well)
    })
}

/// Signals become events; from here on they no longer end the process by themselves.
fn forward_signals(events: mpsc::Sender<Event>) -> Result<()> {
    let mut signals = Signals::new(signals::that_end()).context("cannot handle signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if events.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}

/// Ends all exports at once: each drains by itself.
fn end_all(exports: BTreeMap<String, Export>, end: fn(Export)) {
    std::thread::scope(|scope| {
        for export in exports.into_values() {
            end_in(scope, export, end);
        }
    });
}

/// Ends an export in a thread of its own, or here if there can be none.
fn end_in<'scope>(scope: &'scope Scope<'scope, '_>, export: Export, end: fn(Export)) {
    let (hand, given) = mpsc::channel();
    let thread = std::thread::Builder::new().name("end".into());
    let spawned = thread.spawn_scoped(scope, move || given.into_iter().for_each(end));
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot start a thread: all else waits for an export to end");
    }
    // Where no thread is, nobody takes it.
    if let Err(mpsc::SendError(export)) = hand.send(export) {
        end(export);
    }
}

/// Prints where each door is, then `ready`, and tells the service manager.
fn announce(exports: &BTreeMap<String, Export>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for (name, export) in exports {
        for (door, path) in export.doors() {
            writeln!(out, "{name} {door} {}", path.display())?;
        }
    }
    writeln!(out, "ready")?;
    out.flush()?;
    let status = format!("serving {} exports", exports.len());
    tell_manager(&[
        sd_notify::NotifyState::Ready,
        sd_notify::NotifyState::Status(&status),
    ]);
    Ok(())
}

fn tell_manager(state: &[sd_notify::NotifyState]) {
    // Does nothing where there is no manager to tell.
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}
