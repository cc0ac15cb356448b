//! The process that starts `qemu-storage-daemon`, and starts it again: a server in its sandbox starts no programs.
//!
//! It is this program with a hidden subcommand. It ends when the server's end of its socket is closed, and has ended the daemon
//! by then. A lock file, whose descriptor the daemon inherits, keeps a successor's daemon waiting until this one is gone.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
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

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, kill_process, pidfd_open,
    set_parent_process_death_signal, umask,
};
use serde_json::json;

use super::disk::{MONITOR, NODE};
use crate::engine::qmp::Qmp;
use crate::engine::wait::repeat_while;

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

/// What the keeper tells its server, a line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// The daemon serves the disk.
    Ready,
    /// It has ended, or was never there.
    Ended(String),
    /// The answer to [`Keeper::resize`].
    Resized(Result<(), String>),
}

impl Told {
    fn line(&self) -> String {
        match self {
            Self::Ready => "ready\n".into(),
            Self::Ended(why) => format!("ended {why}\n"),
            Self::Resized(Ok(())) => "resized\n".into(),
            Self::Resized(Err(why)) => format!("refused {why}\n"),
        }
    }

    /// How the daemon ended, if that is told.
    pub(super) fn end(self) -> Option<String> {
        match self {
            Self::Ended(why) => Some(why),
            _ => None,
        }
    }

    fn parse(line: &str) -> Self {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("ready", _) => Self::Ready,
            ("resized", _) => Self::Resized(Ok(())),
            ("refused", why) => Self::Resized(Err(why.into())),
            (_, why) => Self::Ended(why.into()),
        }
    }
}

/// The command of a server that resizes the disk, before the number of bytes.
const RESIZE: &str = "resize ";

/// No command is longer.
const COMMAND_BYTES: u64 = 64;

/// Starts and watches a daemon until the other end of standard input, a socket, is closed. What happens is told there, and
/// the disk resized when that is asked for: it is all that the server, which may be a guest's, can have done.
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
    let mut commands = BufReader::new(server.try_clone()?);
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        let Some(end) = run(arguments, &mut commands)? else {
            break;
        };
        // The server may have gone.
        let _ = tell(&server, &Told::Ended(end));
        if started.elapsed() >= GOOD_RUN {
            pause = FIRST_PAUSE;
        }
        let until = Instant::now() + pause;
        let mut is_over = false;
        while !is_over && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            if wait(&[server.as_fd()], left)? == Some(0) {
                is_over = !obey(&mut commands, None);
            }
        }
        if is_over {
            break;
        }
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
    for name in [DISK, LOCK] {
        let _ = fs::remove_file(folder.join(name));
    }
    Ok(())
}

fn tell(mut server: &UnixStream, told: &Told) -> io::Result<()> {
    server.write_all(told.line().as_bytes())
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

/// Runs the daemon. Returns how it ended; `None` when it was ended because the server is gone.
fn run(arguments: &[OsString], commands: &mut BufReader<UnixStream>) -> io::Result<Option<String>> {
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
        Err(error) => return Ok(Some(format!("cannot start {PROGRAM}: {error}"))),
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
                return Ok(Some(why));
            }
            None => Some(monitor),
        },
        Err(error) => {
            if wait(&[ended.as_fd()], DEATH_LIMIT)?.is_none() {
                end(&mut child, ended.as_fd())?;
                return Ok(Some(format!("{PROGRAM} was ended: {error:#}")));
            }
            None
        }
    };
    if monitor.is_some() {
        let _ = tell(commands.get_ref(), &Told::Ready);
    }
    loop {
        let server = commands.get_ref().as_fd();
        match wait(&[server, ended.as_fd()], Duration::from_secs(3600))? {
            Some(0) if !obey(commands, monitor.as_mut()) => {
                return end(&mut child, ended.as_fd()).map(|()| None);
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
    Ok(Some(format!("{PROGRAM} ended ({status}){last}")))
}

/// Does what the server has asked for. False when that has gone.
fn obey(commands: &mut BufReader<UnixStream>, mut monitor: Option<&mut Qmp>) -> bool {
    loop {
        let mut line = String::new();
        let mut bounded = commands.by_ref().take(COMMAND_BYTES);
        if bounded.read_line(&mut line).unwrap_or(0) == 0 {
            return false;
        }
        let done = resize(monitor.as_deref_mut(), &line);
        let _ = tell(commands.get_ref(), &Told::Resized(done));
        if commands.buffer().is_empty() {
            return true;
        }
    }
}

/// Why the daemon must not serve what it has opened: the format of a backing file was guessed from its first bytes, which a
/// guest may have written, and which then name any file.
fn guessed_format(monitor: &mut Qmp, arguments: &[OsString]) -> Option<String> {
    let nodes = match monitor.command("query-named-block-nodes", json!({})) {
        Ok(nodes) => nodes,
        Err(error) => return Some(format!("{error:#}")),
    };
    let nodes = nodes.as_array().map_or(&[][..], Vec::as_slice);
    let disk = nodes.iter().find(|node| node["node-name"] == NODE);
    // Those for which the options of the disk say it.
    let mut said = Vec::new();
    let (mut image, mut key) = (
        disk.map(|disk| &disk["image"]),
        String::from("backing.driver"),
    );
    while let Some(one) = image.filter(|image| image.is_object()) {
        if has_key(arguments, &key) {
            said.push(&one["filename"]);
        }
        image = Some(&one["backing-image"]);
        key.insert_str(0, "backing.");
    }
    let guessed = nodes.iter().map(|node| &node["image"]).find(|image| {
        image["backing-filename"].is_string()
            && !image["backing-filename-format"].is_string()
            && !said.contains(&&image["filename"])
    })?;
    let name = |key: &str| guessed[key].as_str().unwrap_or("an image").to_owned();
    Some(format!(
        "{} does not say what format its backing file has, and a guest may have made it look like another one: \
         qemu-img rebase -u -F FORMAT -b {} {}",
        name("filename"),
        name("backing-filename"),
        name("filename")
    ))
}

/// Whether the options of the disk have a key.
fn has_key(arguments: &[OsString], key: &str) -> bool {
    let disk = arguments.windows(2).find(|pair| pair[0] == "--blockdev");
    disk.is_some_and(|pair| {
        // Commas in values are written twice.
        let options = pair[1].to_string_lossy().replace(",,", "");
        let mut keys = options
            .split(',')
            .filter_map(|option| option.split_once('='));
        keys.any(|(known, _)| known == key)
    })
}

fn resize(monitor: Option<&mut Qmp>, line: &str) -> Result<(), String> {
    let size: Option<u64> = line
        .strip_prefix(RESIZE)
        .and_then(|size| size.trim().parse().ok());
    let size = size.ok_or("a command that is not known")?;
    let monitor = monitor.ok_or("the daemon does not answer at its monitor")?;
    let resized = monitor.command("block_resize", json!({ "node-name": NODE, "size": size }));
    resized.map(drop).map_err(|error| format!("{error:#}"))
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

/// Waits until one of these can be read or is at its end; which one. A signal may end it early.
fn wait(fds: &[BorrowedFd<'_>], limit: Duration) -> io::Result<Option<usize>> {
    let mut fds: Vec<_> = (fds.iter())
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    match poll(&mut fds, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(fds.iter().position(|fd| !fd.revents().is_empty()))
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
        Ok(lines.map(|line| Told::parse(&line)))
    }

    /// Has the daemon give the disk another size. The answer is told.
    pub(super) fn resize(&self, size_bytes: u64) -> io::Result<()> {
        (&self.socket).write_all(format!("{RESIZE}{size_bytes}\n").as_bytes())
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
