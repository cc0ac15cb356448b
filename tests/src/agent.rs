//! The agent in a guest: takes jobs from the channel, runs each in a process of
//! its own, looks at the kernel afterwards, answers.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};
use testkit::wait::{PATIENCE, wait_for};

use crate::channel::{FromGuest, Heard, ToGuest, hear, send};
use crate::guest::kernel_log;
use crate::job::{self, Job};
use crate::klog;
use crate::machine::{SETUP_VARIABLE, Setup};
use crate::report::TestResult;

/// The interval of heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Serves the channel until it is told to end the machine, or the channel ends.
pub fn main() -> Result<ExitCode> {
    let path = std::env::var_os(SETUP_VARIABLE).context("no setup is named")?;
    let setup = Setup::read(Path::new(&path))?;
    let channel = Arc::new(Mutex::new(open_channel(&setup)?));
    match serve(&channel) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            let why = format!("{error:#}");
            kernel_log(&format!("agent: {why}"));
            say(&channel, &FromGuest::Broken { why })?;
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Sends one message; the lock keeps heartbeats out of it.
fn say(channel: &Mutex<File>, message: &FromGuest) -> Result<()> {
    let mut channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
    send(&mut *channel, message)
}

/// Sends heartbeats as long as this process runs and the channel is open.
fn start_heartbeat(channel: &Arc<Mutex<File>>) -> Result<()> {
    let channel = Arc::clone(channel);
    let beat = move || {
        while say(&channel, &FromGuest::Beat).is_ok() {
            thread::sleep(HEARTBEAT);
        }
    };
    thread::Builder::new()
        .name("heartbeat".to_owned())
        .spawn(beat)
        .context("cannot start the heartbeat")?;
    Ok(())
}

/// Reports the exit code of a shell machine's command.
pub fn report_exit(setup: &Setup, code: i32) -> Result<()> {
    send(&mut open_channel(setup)?, &FromGuest::Exit { code })
}

fn serve(channel: &Arc<Mutex<File>>) -> Result<()> {
    let mut log = KernelLog::open()?;
    let trouble = klog::trouble(log.new_messages()?.iter().map(String::as_str));
    let kernel = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    say(channel, &FromGuest::Hello { kernel, trouble })?;
    start_heartbeat(channel)?;
    let orders = {
        let channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.try_clone().context("cannot share the channel")?
    };
    let mut orders = BufReader::new(orders);
    loop {
        match hear::<ToGuest>(&mut orders)? {
            Heard::Message(ToGuest::Run(job)) => {
                let result = run(&job, &mut log)?;
                say(channel, &FromGuest::Done(Box::new(result)))?;
            }
            Heard::Message(ToGuest::PowerOff) | Heard::End => return Ok(()),
            Heard::Noise(text) => kernel_log(&format!("agent: not an order: {text}")),
        }
    }
}

/// Runs one job and looks at what it left behind.
fn run(job: &Job, log: &mut KernelLog) -> Result<TestResult> {
    kernel_log(&format!("begin {}: {}", job.suite, job.test));
    let before = Leftovers::look()?;
    let mut result = job::run(job);
    let left = before.new_ones_after(Duration::from_secs(2))?;
    if !left.is_empty() {
        result.spoil(&format!("it left behind: {}", left.join(", ")));
        result.machine_is_suspect = true;
    }
    kernel_log(&format!("end {}: {}", job.suite, job.test));
    let trouble = klog::trouble(log.new_messages()?.iter().map(String::as_str));
    if !trouble.is_empty() {
        result.spoil(&format!("the kernel complained:\n{}", trouble.join("\n")));
        result.machine_is_suspect = true;
    }
    Ok(result)
}

/// Things that a test must take away again: mounts and ublk devices.
struct Leftovers(BTreeSet<String>);

impl Leftovers {
    fn look() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("cannot list mounts")?;
        let mut found: BTreeSet<String> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .map(|dir| format!("a mount on {dir}"))
            .collect();
        // No such directory: a kernel without ublk has no ublk devices.
        if let Ok(entries) = fs::read_dir("/sys/class/ublk-char") {
            for entry in entries {
                let entry = entry.context("cannot list ublk devices")?;
                found.insert(format!("/dev/{}", entry.file_name().to_string_lossy()));
            }
        }
        Ok(Leftovers(found))
    }

    /// What is there now and was not before; devices get some time to go.
    fn new_ones_after(&self, patience: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + patience;
        loop {
            let now = Leftovers::look()?;
            let new: Vec<String> = now.0.difference(&self.0).cloned().collect();
            if new.is_empty() || Instant::now() > deadline {
                return Ok(new);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The kernel's log, read once from its beginning.
struct KernelLog {
    file: File,
}

impl KernelLog {
    fn open() -> Result<Self> {
        let file = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open("/dev/kmsg")
            .context("cannot read the kernel's log")?;
        Ok(KernelLog { file })
    }

    /// The kernel's own messages since the last look.
    fn new_messages(&mut self) -> Result<Vec<String>> {
        let mut messages = Vec::new();
        // One read gives one record, of at most this size.
        let mut buffer = [0; 8192];
        loop {
            match self.file.read(&mut buffer) {
                Ok(count) => {
                    let record = String::from_utf8_lossy(&buffer[..count]);
                    messages.extend(klog::kernel_message(&record).map(str::to_owned));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Ok(messages);
                }
                // Records were overwritten before we read them; the next read
                // goes on with the oldest there is.
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
                Err(error) => return Err(error).context("cannot read the kernel's log"),
            }
        }
    }
}

/// Opens the channel's device, which may take a moment to appear.
fn open_channel(setup: &Setup) -> Result<File> {
    let what = format!("there is a channel {}", setup.channel);
    let path = wait_for(&what, PATIENCE, || find_device(&setup.channel))?;
    let channel = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open the channel {}", path.display()))?;
    if isatty(&channel) {
        let mut modes = tcgetattr(&channel).context("cannot read the channel's modes")?;
        modes.make_raw();
        tcsetattr(&channel, OptionalActions::Now, &modes)
            .context("cannot set the channel's modes")?;
    }
    Ok(channel)
}

fn find_device(name: &str) -> Result<Option<PathBuf>> {
    let Some(prefix) = name.strip_suffix('*') else {
        let path = PathBuf::from(name);
        return Ok(path.exists().then_some(path));
    };
    for entry in fs::read_dir("/dev").context("cannot list /dev")? {
        let path = entry.context("cannot list /dev")?.path();
        if path.to_string_lossy().starts_with(prefix) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}
