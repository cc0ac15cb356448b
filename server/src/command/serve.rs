//! `ublkup serve`: starts the exports, waits, takes them down.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow};
use sd_notify::NotifyState;
use signal_hook::iterator::Signals;
use upgrade_proto::printable;

use super::left;
use super::manager::Manager;
use super::metrics::{Address, MetricsServer};
use super::output::count;
use super::program::Program;
use super::service::{Service, end_all};
use super::signals;
use crate::config::{ExportConfig, check_name};
use crate::engine::sandbox::{self, Access, Reach};
use crate::engine::socket::SocketAccess;
use crate::engine::{activation, io_flusher, log, open_files};
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{
    Configuration, Event, Export, Predecessor, Server, ServerOptions, ServerSocket, explain,
};
use crate::io::Ring;

/// How exports are started.
#[derive(Debug)]
pub struct StartOptions {
    /// If some of several exports cannot start, serve the others.
    pub keep_going: bool,
    /// What is done about earlier servers of the same names.
    pub predecessor: Predecessor,
    /// Whether this process gives up what it does not need once the exports are open.
    pub sandbox: bool,
    /// What the server is called, if it was given a name.
    pub server_name: Option<String>,
    /// The shell command for as long as which it serves.
    pub run: Option<OsString>,
    /// Where measurements are collected, if anywhere.
    pub metrics: Option<Address>,
    /// How many exports can be added later.
    pub room: u32,
    /// Where the exports come from.
    pub configuration: Option<Configuration>,
}

/// How many exports can be added to a server where nothing else is asked for.
pub const DEFAULT_ROOM: u32 = 64;

/// `ublkup recover`: serves an export as it was last served.
///
/// # Errors
///
/// When there is no note of it, or it cannot be served.
pub fn recover(
    dir: &RuntimeDir,
    name: &str,
    predecessor: Predecessor,
    sandbox: bool,
) -> Result<ExitCode> {
    check_name(name)?;
    let start = StartOptions {
        keep_going: false,
        predecessor,
        sandbox,
        server_name: None,
        run: None,
        metrics: None,
        room: DEFAULT_ROOM,
        configuration: None,
    };
    run(dir, vec![left::saved(dir, name)?], start)
}

/// Serves `configs` until a signal or until the last export has been stopped.
///
/// # Errors
///
/// When an export cannot be started (unless told to keep going, and another can).
pub fn run(dir: &RuntimeDir, configs: Vec<ExportConfig>, start: StartOptions) -> Result<ExitCode> {
    // Before anything else opens descriptors.
    let sockets = activation::sockets().context(
        "the sockets of the service manager cannot be used (LISTEN_FDS and LISTEN_FDNAMES)",
    )?;
    open_files::raise_limit();
    // Before any thread of a queue is started. Without the right it works well enough; `doctor` tells.
    if let Err(error) = io_flusher::declare() {
        tracing::debug!(%error, "not declared an I/O flusher");
    }
    if !start.sandbox {
        sandbox::stay_outside();
    }
    // A client would be the first to notice otherwise.
    drop(Ring::new(1).context(
        "io_uring cannot be used, and nothing is served without it (sysctl kernel.io_uring_disabled, \
         the seccomp profile of a container)",
    )?);
    let (events, inbox) = mpsc::channel();
    forward_signals(events.clone())?;
    let mut code = ExitCode::SUCCESS;
    let StartOptions {
        keep_going,
        predecessor,
        sandbox,
        server_name,
        run,
        metrics,
        room,
        configuration,
    } = start;
    let access = admin_access(&configs);
    let own_name = server_name.clone();
    let options = ServerOptions {
        name: server_name,
        sockets,
        access,
        configuration,
    };
    let server = Server::new(dir, options, events.clone());
    // First, so that who watches it sees the exports start.
    let mut socket = listen(&server, room, own_name.is_some())?;
    // Before the exports: an address that cannot be had shall not stop them again.
    let collectors = (metrics.as_ref())
        .map(|address| MetricsServer::start(address, &server))
        .transpose()?;
    let start = |config| Export::start(dir, config, predecessor, &server);
    let named = |config: ExportConfig| (config.name.clone(), config);
    let configs = configs.into_iter().map(named).collect();
    let (mut exports, failures) = start_all(configs, keep_going, start);
    for (name, error) in failures {
        let error = open_files::name_limit(error);
        if !keep_going {
            end_all(exports, Export::tear_down);
            return Err(error.context(name));
        }
        tracing::error!("{name}: {}", explain(&error));
        code = ExitCode::FAILURE;
    }
    if let Some(name) = &own_name {
        let added = left::added_to(dir, name).into_iter().map(named).collect();
        // What was asked for on the command line is about the exports there.
        let start = |config| Export::start(dir, config, Predecessor::Dead, &server);
        let (added, failures) = start_all(added, true, start);
        exports.extend(added);
        for (name, error) in failures {
            tracing::error!("{name}: {}", explain(&error));
        }
    }
    for name in server.sockets_left() {
        let error = anyhow!(
            "the service manager has a socket for an export called '{name}', and there is none: its clients would wait \
             for ever (FileDescriptorName= of a socket unit is the name of an export with a vhost-user door)"
        );
        if !keep_going {
            end_all(exports, Export::tear_down);
            return Err(error);
        }
        tracing::error!("{error}");
        code = ExitCode::FAILURE;
    }
    if exports.is_empty() {
        return Err(anyhow!("none of the exports could be started"));
    }
    let manager = Manager::connect();
    let program = match run.map(|command| Program::start(&command, dir, &exports, &events)) {
        Some(Err(error)) => {
            end_all(exports, Export::tear_down);
            return Err(error);
        }
        other => other.transpose()?,
    };
    give_up_the_rest(
        exports.values(),
        (socket.as_mut(), collectors.as_ref()),
        sandbox,
    );
    // The program has standard output for itself.
    if program.is_none()
        && let Err(error) = announce(&exports)
    {
        end_all(exports, Export::tear_down);
        return Err(error.context("cannot write to standard output"));
    }
    let status = format!("serving {}", count(exports.len(), "export"));
    manager.tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
    let service = Service {
        dir,
        server: &server,
        inbox: &inbox,
        manager: &manager,
    };
    if !service.until_the_end(exports)? {
        code = ExitCode::FAILURE;
    }
    Ok(program.and_then(|program| program.code()).unwrap_or(code))
}

/// Who may connect to the admin socket of the server, and there do to all exports what the admin socket of one lets do
/// to that: those who may connect to each of these, if the exports agree, else this user.
fn admin_access(configs: &[ExportConfig]) -> SocketAccess {
    let mut all = configs.iter().map(|config| &config.admin_access);
    let first = all.next();
    let common = first.filter(|first| all.all(|other| other == *first));
    common.cloned().unwrap_or_default()
}

/// Opens the admin socket of the server. One that was given no name does without, if need be: each export has one.
fn listen(server: &Arc<Server>, room: u32, must_be_there: bool) -> Result<Option<ServerSocket>> {
    match server.listen(room) {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if must_be_there => Err(error),
        Err(error) => {
            tracing::warn!("no admin socket of the server: {}", explain(&error));
            Ok(None)
        }
    }
}

/// Exports that are started at once. Most of that time is spent in the driver and the storage.
const STARTERS: usize = 8;

/// Starts all exports, or none more after the first failure unless told to keep going. Returns those
/// that were started, and why others were not, in their order.
fn start_all<C: Send, E: Send>(
    configs: Vec<(String, C)>,
    keep_going: bool,
    start: impl Fn(C) -> Result<E> + Sync,
) -> (BTreeMap<String, E>, Vec<(String, anyhow::Error)>) {
    let starters = STARTERS.min(configs.len());
    let waiting = Mutex::new(configs.into_iter().enumerate());
    let results = Mutex::new((BTreeMap::new(), BTreeMap::new()));
    let next = || {
        let may_start = keep_going || lock(&results).1.is_empty();
        lock(&waiting).next().filter(|_| may_start)
    };
    let start_waiting = || {
        while let Some((number, (name, config))) = next() {
            match start(config) {
                Ok(export) => drop(lock(&results).0.insert(name, export)),
                Err(error) => drop(lock(&results).1.insert(number, (name, error))),
            }
        }
    };
    std::thread::scope(|scope| {
        // Not by this thread: a worker of the kernel that did something for a ring of a thread may stay as long as the thread
        // (older kernels keep the last one), and has what the sandbox takes away from all others.
        let spawn = || {
            let starter = std::thread::Builder::new().name("start".into());
            starter.spawn_scoped(scope, start_waiting).is_ok()
        };
        // Without one of them the others do its work.
        let spawned = (0..starters).take_while(|_| spawn()).count();
        if spawned == 0 {
            start_waiting();
        }
    });
    let (started, failures) = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    (started, failures.into_values().collect())
}

/// Locks a table that a thread that panicked has left whole.
fn lock<T>(table: &Mutex<T>) -> MutexGuard<'_, T> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Turns signals into events; from here on they no longer end the process by themselves.
fn forward_signals(events: mpsc::Sender<Event>) -> Result<()> {
    let mut signals = Signals::new(signals::that_end()).context("cannot handle signals")?;
    let hangup_ends = signals::hangup_ends();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut was_told = false;
            for signal in signals.forever() {
                if signal == signals::SIGHUP && !hangup_ends {
                    tracing::warn!(
                        "SIGHUP: nothing is read again: a confined server cannot open what is new; 'ublkup reload' does \
                         it (systemctl reload)"
                    );
                    continue;
                }
                if was_told && signals::insists(signal) {
                    tracing::error!(signal, "a second signal: ending at once, requests are lost");
                    log::wait_until_written();
                    std::process::exit(1);
                }
                was_told = true;
                if events.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}

/// Prints where each door is, then `ready`.
fn announce(exports: &BTreeMap<String, Export>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for (name, export) in exports {
        for (door, path) in export.doors() {
            let path = printable(&path.display().to_string());
            writeln!(out, "{name} {door} {path}")?;
        }
    }
    writeln!(out, "ready")?;
    out.flush()?;
    Ok(())
}

/// Gives up what the exports do not need now that they are open, and says in the log how far that went.
fn give_up_the_rest<'a>(
    exports: impl Iterator<Item = &'a Export>,
    (socket, collectors): (Option<&mut ServerSocket>, Option<&MetricsServer>),
    sandbox: bool,
) {
    // What a client is; what uses a disk; what is read beyond the end of a file that was cut short. Not all of /sys: below
    // it are the file systems of debugging and tracing.
    let system = [
        "/proc",
        "/sys/block",
        "/sys/class/ublk-char",
        "/sys/dev",
        "/sys/devices",
        "/sys/fs",
        "/dev/zero",
    ]
    .map(|path| (path.into(), Access::Read));
    let mut reach = Reach {
        paths: system.into(),
        ..Reach::default()
    };
    for export in exports {
        export.add_reach(&mut reach);
    }
    if let Some(socket) = socket {
        socket.add_reach(&mut reach);
        if sandbox
            && reach.administers_devices
            && let Err(error) = socket.keep_making_devices(&mut reach)
        {
            let why = explain(&error);
            tracing::info!("exports that are added later will have no block devices: {why}");
        }
    }
    if let Some(collectors) = collectors {
        collectors.add_reach(&mut reach);
    }
    if reach.has_block_devices
        && let Err(error) = sandbox::leave_mounts(&reach)
    {
        tracing::info!(
            "no mount namespace of its own: {error}: if this server is the last process where its disk is mounted, as \
             in a container, it cannot be killed"
        );
    }
    if sandbox {
        let status = sandbox::enter(&reach);
        tracing::info!("sandbox: {status}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn numbers(count: usize) -> Vec<(String, usize)> {
        (0..count)
            .map(|number| (format!("e{number}"), number))
            .collect()
    }

    #[test]
    fn exports_are_started_side_by_side_and_all_of_them() {
        // Each waits until as many are being started.
        let together = Barrier::new(STARTERS);
        let start = |number| {
            together.wait();
            Ok(number)
        };
        let (started, failures) = start_all(numbers(3 * STARTERS), false, start);
        assert!(failures.is_empty());
        assert_eq!(started.len(), 3 * STARTERS);
        assert!(
            started
                .iter()
                .all(|(name, number)| *name == format!("e{number}"))
        );
    }

    #[test]
    fn after_a_failure_no_more_are_begun_unless_told_to_keep_going() {
        let start = |number| match number {
            3 | 1 => Err(anyhow!("no {number}")),
            number => Ok(number),
        };
        let (started, failures) = start_all(numbers(1000), true, start);
        assert_eq!(started.len(), 998);
        let names: Vec<_> = failures.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["e1", "e3"], "in their order");

        let all_fail = |number: usize| Err::<(), _>(anyhow!("no {number}"));
        let (started, failures) = start_all(numbers(1000), false, all_fail);
        assert!(started.is_empty());
        assert!(
            (1..=STARTERS).contains(&failures.len()),
            "{}",
            failures.len()
        );
    }
}
