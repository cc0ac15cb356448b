//! The process that starts `qemu-storage-daemon`, and starts it again: a server in its sandbox starts no programs.
//!
//! It is this program with a hidden subcommand. It ends when the server's end of its socket is closed, and has ended the daemon
//! by then. A lock file, whose descriptor the daemon inherits, keeps a successor's daemon waiting until this one is gone.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, kill_process, pidfd_open,
    set_parent_process_death_signal, umask,
};
use serde_json::json;

use super::disk::{HELD_LIMIT, MONITOR, NODE};
use super::format::guessed_format;
use super::messages::{Heard, ORDER_LIMIT, Order, Told, hear, tell, wait};
use super::snapshot::{Done, Snapshot};
use crate::engine::qmp::Qmp;
use crate::engine::wait::repeat_while;
use crate::engine::{SnapshotProgress, SnapshotStep};

/// The program.
pub(super) const PROGRAM: &str = "qemu-storage-daemon";

/// What its errors begin with.
const PREFIX: &str = "qemu-storage-daemon: ";

/// How long the daemon of an earlier server may take to end.
const LOCK_LIMIT: Duration = Duration::from_secs(20);
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// How long the daemon may take to end after SIGTERM, at which it flushes what it has.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How long the keeper may take to end: its daemon may be opening an image, or giving it another size.
const STOP_LIMIT: Duration = Duration::from_secs(75);
const STOP_INTERVAL: Duration = Duration::from_millis(2);

/// How long one may take to end that has closed its monitor.
const DEATH_LIMIT: Duration = Duration::from_secs(1);

/// Pauses before the daemon is started again: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A daemon that ran so long is started again without a longer pause than the first.
const GOOD_RUN: Duration = Duration::from_secs(10);

/// What servers are told by service managers to hand over, or to read their configuration again: the daemon, which knows neither,
/// would end without a flush.
const HAND_OVER: [i32; 2] = [libc::SIGUSR1, libc::SIGUSR2];

/// Names in the folder of an export.
pub(super) const DISK: &str = "qemu-disk";
const LOCK: &str = "qemu.lock";

/// What the keeper does when a daemon has ended.
enum Then {
    /// It is started again after a pause: how it ended.
    Restart(String),
    /// It has not served the image. It is started again after a pause, if it was not started to end a snapshot.
    NotStarted(String),
    /// It was ended for a snapshot, with all flushed: it is started again when that is said, or after a while.
    Hold,
    /// The server is gone.
    End,
}

/// Starts and watches a daemon until the other end of standard input, a socket, is closed. What happens is told there, and
/// an order done when it comes: it is all that the server, which may be a guest's, can have done.
///
/// # Errors
///
/// When the process cannot be set up.
pub fn keep(folder: &Path, arguments: &[OsString]) -> io::Result<()> {
    // A terminal's and a service manager's signals go to all processes; this one ends with its server.
    let others = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
    for signal in others.into_iter().chain(HAND_OVER) {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    // The sockets are for this user alone.
    umask(Mode::from_raw_mode(0o077));
    let server = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let path = folder.join(LOCK);
    let _lock = match lock(&path, &server) {
        Ok(Some(lock)) => lock,
        Ok(None) => {
            let why = "the qemu-storage-daemon of an earlier server still runs and does not end";
            return tell(&server, &Told::Ended(why.into()));
        }
        Err(error) => {
            let why = format!("cannot lock {}: {error}", path.display());
            return tell(&server, &Told::Ended(why));
        }
    };
    let daemon = Daemon {
        arguments,
        server: &server,
    };
    let mut pause = FIRST_PAUSE;
    // Whether the server waits for the daemon to serve what was exchanged.
    let mut is_asked = false;
    loop {
        let started = Instant::now();
        let why = match daemon.run(is_asked)? {
            Then::End => break,
            Then::Restart(why) => Some(why),
            Then::NotStarted(why) if !is_asked => Some(why),
            Then::NotStarted(why) => {
                let failed = SnapshotProgress {
                    failed: Some(why),
                    ..SnapshotProgress::default()
                };
                // The server may have gone.
                let _ = tell(&server, &Told::Answer(Ok(failed)));
                None
            }
            Then::Hold => None,
        };
        match why {
            None => match hold(&server)? {
                Resumed::Gone => break,
                resumed => is_asked = resumed == Resumed::Asked,
            },
            Some(why) => {
                is_asked = false;
                let _ = tell(&server, &Told::Ended(why));
                if started.elapsed() >= GOOD_RUN {
                    pause = FIRST_PAUSE;
                }
                if !refuse_all(&server, pause)? {
                    break;
                }
                pause = (2 * pause).min(LONGEST_PAUSE);
            }
        }
    }
    for name in [DISK, LOCK] {
        let _ = fs::remove_file(folder.join(name));
    }
    Ok(())
}

/// How a pause for a snapshot ended.
#[derive(PartialEq, Eq)]
enum Resumed {
    Asked,
    /// It lasted too long.
    Late,
    /// The server is gone.
    Gone,
}

/// Waits until the daemon is to be started again.
fn hold(server: &UnixStream) -> io::Result<Resumed> {
    let until = Instant::now() + HELD_LIMIT;
    loop {
        match hear(server, until)? {
            Heard::Gone => return Ok(Resumed::Gone),
            Heard::Nothing => return Ok(Resumed::Late),
            Heard::Order(Order::Snapshot(SnapshotStep::Resume)) => return Ok(Resumed::Asked),
            Heard::Order(_) => refuse(server),
        }
    }
}

/// Waits so long, and refuses what is asked meanwhile. False when the server has gone.
fn refuse_all(server: &UnixStream, pause: Duration) -> io::Result<bool> {
    let until = Instant::now() + pause;
    loop {
        match hear(server, until)? {
            Heard::Gone => return Ok(false),
            Heard::Nothing => return Ok(true),
            Heard::Order(_) => refuse(server),
        }
    }
}

fn refuse(server: &UnixStream) {
    let why = format!("there is no {PROGRAM} at present");
    let _ = tell(server, &Told::Answer(Err(why)));
}

/// Takes the lock, which is inherited by the daemon. `None`: another one has it for too long, or the server is gone.
fn lock(path: &Path, server: &UnixStream) -> io::Result<Option<File>> {
    let deadline = Instant::now() + LOCK_LIMIT;
    while Instant::now() < deadline {
        let mut options = File::options();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        // What a guest has put there that had taken a server over holds nothing up.
        let file = options
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        let is_locked = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        // Its holder before has removed it.
        let is_there = fs::metadata(path).is_ok_and(|there| {
            file.metadata()
                .is_ok_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()))
        });
        if is_locked && is_there {
            fcntl_setfd(&file, FdFlags::empty())?;
            return Ok(Some(file));
        }
        if wait(&[server.as_fd()], LOCK_INTERVAL)?.is_some() {
            break;
        }
    }
    Ok(None)
}

/// What a daemon is run with.
struct Daemon<'a> {
    arguments: &'a [OsString],
    server: &'a UnixStream,
}

impl Daemon<'_> {
    /// Runs a daemon until it ends, or has to. Its start is an answer to the server if that has asked for it.
    fn run(&self, is_asked: bool) -> io::Result<Then> {
        let arguments = self.arguments;
        let (monitor, theirs) = UnixStream::pair()?;
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let own = getpid();
        let monitors = theirs.as_raw_fd();
        let bind = move || {
            set_parent_process_death_signal(Some(Signal::TERM))?;
            // SAFETY: nothing else has this number: the process has a handful of descriptors.
            if unsafe { libc::dup2(monitors, MONITOR) } < 0 {
                return Err(io::Error::last_os_error());
            }
            for signal in HAND_OVER {
                // SAFETY: no handler is involved. It stays so in the daemon.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
            // It may have died before.
            match getppid() == Some(own) {
                true => Ok(()),
                false => Err(io::ErrorKind::BrokenPipe.into()),
            }
        };
        // SAFETY: between fork and exec it makes a few system calls and allocates nothing.
        unsafe { command.pre_exec(bind) };
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return Ok(Then::NotStarted(format!("cannot start {PROGRAM}: {error}"))),
        };
        // The other end is the daemon's alone.
        drop(theirs);
        let words = child.stderr.take().map(|words| {
            thread::spawn(move || {
                let lines = BufReader::new(words).lines().map_while(Result::ok);
                let lines = lines.filter(|line| !line.trim().is_empty());
                // Hints come after an error, without its prefix.
                lines.reduce(|last, line| match is_error(&last) && !is_error(&line) {
                    true => last,
                    false => line,
                })
            })
        });
        let pid = Pid::from_child(&child);
        let ended = pidfd_open(pid, PidfdFlags::empty())?;
        // It answers when it has done all that its arguments say. If it does not it has ended, as a rule.
        let mut monitor = match Qmp::over(monitor) {
            Ok(mut monitor) => match guessed_format(&mut monitor, arguments) {
                Some(why) => {
                    end(&mut child, ended.as_fd())?;
                    return Ok(Then::NotStarted(why));
                }
                None => Some(monitor),
            },
            Err(error) => {
                if wait(&[ended.as_fd()], DEATH_LIMIT)?.is_none() {
                    end(&mut child, ended.as_fd())?;
                    return Ok(Then::NotStarted(format!("{PROGRAM} was ended: {error:#}")));
                }
                None
            }
        };
        if monitor.is_some() {
            let _ = tell(self.server, &Told::Ready);
            if is_asked {
                let _ = tell(self.server, &Told::Answer(Ok(SnapshotProgress::default())));
            }
        }
        loop {
            match wait(
                &[self.server.as_fd(), ended.as_fd()],
                Duration::from_secs(3600),
            )? {
                Some(0) => {
                    let order = match hear(self.server, Instant::now() + ORDER_LIMIT)? {
                        Heard::Nothing => continue,
                        Heard::Gone => {
                            end(&mut child, ended.as_fd())?;
                            return Ok(Then::End);
                        }
                        Heard::Order(order) => order,
                    };
                    let done = match &mut monitor {
                        Some(monitor) => obey(monitor, arguments, order),
                        None => Done::Answer(Err("it does not answer at its monitor".into())),
                    };
                    match done {
                        Done::Answer(answer) => {
                            let _ = tell(self.server, &Told::Answer(answer));
                        }
                        Done::Flushed => {
                            end(&mut child, ended.as_fd())?;
                            let _ =
                                tell(self.server, &Told::Answer(Ok(SnapshotProgress::default())));
                            return Ok(Then::Hold);
                        }
                        Done::Failed(why) => {
                            let _ = tell(self.server, &Told::Answer(Err(why.clone())));
                            end(&mut child, ended.as_fd())?;
                            return Ok(Then::Restart(format!("{PROGRAM} was ended: {why}")));
                        }
                    }
                }
                Some(1) => break,
                _ => {}
            }
        }
        let status = child.wait()?;
        let last = words.and_then(|words| words.join().ok()).flatten();
        let last = last.map_or(String::new(), |last| {
            format!(": {}", last.strip_prefix(PREFIX).unwrap_or(&last))
        });
        let why = format!("{PROGRAM} ended ({status}){last}");
        Ok(match monitor {
            Some(_) => Then::Restart(why),
            None => Then::NotStarted(why),
        })
    }
}

/// Does what the server has asked for.
fn obey(monitor: &mut Qmp, arguments: &[OsString], order: Order) -> Done {
    match order {
        Order::Resize(size_bytes) => {
            let resize = json!({ "node-name": NODE, "size": size_bytes });
            let resized = monitor.command("block_resize", resize);
            Done::Answer(
                resized
                    .map(|_| SnapshotProgress::default())
                    .map_err(|error| format!("{error:#}")),
            )
        }
        Order::Snapshot(step) => Snapshot { monitor, arguments }.step(step),
    }
}

fn is_error(line: &str) -> bool {
    line.starts_with(PREFIX)
}

fn end(child: &mut Child, ended: BorrowedFd<'_>) -> io::Result<()> {
    // It was not waited for: the number is its own.
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
    let deadline = Instant::now() + END_LIMIT;
    while Instant::now() < deadline {
        let left = deadline.saturating_duration_since(Instant::now());
        if wait(&[ended], left)?.is_some() {
            break;
        }
    }
    let _ = child.kill();
    child.wait().map(drop)
}

/// The keeper as its server has it.
pub(super) struct Keeper {
    child: Option<Child>,
    /// Closed, it ends the keeper.
    socket: UnixStream,
    /// Whether its end is expected.
    stopped: Arc<AtomicBool>,
}

impl Keeper {
    /// Starts a keeper, whose daemon has these arguments.
    pub(super) fn start(folder: &Path, arguments: &[OsString]) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .arg("qemu-keeper")
            .arg(folder)
            .arg("--")
            .args(arguments)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let child = Some(child);
        Ok(Self {
            child,
            socket,
            stopped: Arc::default(),
        })
    }

    /// Whether it was told to end.
    pub(super) fn is_stopped(&self) -> impl Fn() -> bool + use<> {
        let stopped = Arc::clone(&self.stopped);
        move || stopped.load(Ordering::Acquire)
    }

    /// What it tells.
    pub(super) fn told(&self) -> io::Result<impl Iterator<Item = Told> + use<>> {
        let socket = BufReader::new(self.socket.try_clone()?);
        let lines = socket.lines().map_while(Result::ok);
        Ok(lines.map_while(|line| serde_json::from_str(&line).ok()))
    }

    /// Asks for something. The answer is told.
    pub(super) fn ask(&self, order: Order) -> io::Result<()> {
        let line = serde_json::to_string(&order)?;
        (&self.socket).write_all(format!("{line}\n").as_bytes())
    }

    /// Ends keeper and daemon, and waits for that. Without effect when that was done.
    pub(super) fn stop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        self.stopped.store(true, Ordering::Release);
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        // It limits how long the daemon may take. In the sandbox it cannot be killed.
        let ended = || child.try_wait();
        let waited = repeat_while(STOP_LIMIT, STOP_INTERVAL, ended, |one| {
            matches!(one, Ok(None))
        });
        if let Ok(None) = waited {
            tracing::error!(
                "{PROGRAM} and its keeper (process {}) do not end",
                child.id()
            );
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}
