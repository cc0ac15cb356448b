//! Machines: a kernel booted with the host's file system as its read-only root
//! and the lab itself as its first process.
//!
//! [`Machine::boot`] starts one and waits for its agent; [`Machine::run`] runs
//! tests in it. A machine never outlives its [`Machine`] value, nor the thread
//! that made it.

mod console;
mod qemu;
mod setup;
pub mod shell;
mod uml;

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use testkit::process;
use testkit::wait::wait_for;

use crate::channel::{FromGuest, Heard, ToGuest, hear, send};
use crate::job::Job;
use crate::klog;
use crate::report::{Outcome, TestResult};
use crate::suites;
use crate::test::{Paths, Place};

pub use qemu::{Board, Qemu};
pub use setup::{Mode, Mount, SETUP_VARIABLE, Setup};
pub use uml::Uml;

use console::Console;

/// A kind of machine: how its command line looks.
pub trait Hypervisor {
    /// For messages and file names.
    fn name(&self) -> &'static str;

    /// Where a test in it is said to run.
    fn place(&self) -> Place;

    /// How its guest finds its setup and its exchange directory.
    fn setup(&self, run: &RunDir, mode: Mode) -> Setup;

    /// The command that boots it, and our end of its channel.
    fn command(&self, run: &RunDir, mode: &Mode) -> Result<(Command, ChannelEnd)>;

    /// How long a boot may take.
    fn boot_limit(&self) -> Duration;
}

/// Our end of a machine's channel.
#[derive(Debug)]
pub enum ChannelEnd {
    /// Connected already; the command holds the other end.
    Connected(UnixStream),
    /// The machine will connect to this.
    Listening(std::os::unix::net::UnixListener),
}

/// The directory of one machine: setup, sockets, exchange, a copy of the lab.
#[derive(Debug)]
pub struct RunDir {
    dir: tempfile::TempDir,
}

impl RunDir {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("ublkup-lab-")
            .tempdir()
            .context("cannot make a directory for a machine")?;
        let run = RunDir { dir };
        fs::create_dir(run.exchange()).context("cannot make an exchange directory")?;
        // A copy, because the guest starts it by name: a rebuild of the lab
        // must not change a machine that is booting.
        fs::copy("/proc/self/exe", run.init()).context("cannot copy the lab's own binary")?;
        Ok(run)
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A file of this machine.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory that the guest and the host both write.
    pub fn exchange(&self) -> PathBuf {
        self.file("exchange")
    }

    /// The guest's first process.
    pub fn init(&self) -> PathBuf {
        self.file("lab")
    }

    /// What the guest's first process reads.
    pub fn setup(&self) -> PathBuf {
        self.file("setup.json")
    }
}

/// A running machine whose agent waits for work.
#[derive(Debug)]
pub struct Machine {
    place: Place,
    child: Child,
    console: Console,
    to_guest: UnixStream,
    from_guest: Receiver<Result<FromGuest>>,
    pulse: Pulse,
    silence_limit: Duration,
    run: RunDir,
    paths: Paths,
    kernel: String,
    over: bool,
}

/// Where console logs of machines go: `target/lab-logs` on the host, the
/// exchange directory in a guest, from where the host fetches them.
pub fn log_dir(paths: &Paths) -> PathBuf {
    let writable = |dir: &Path| {
        fs::create_dir_all(dir).is_ok()
            && rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
    };
    [
        paths.repo.join("target/lab-logs"),
        Path::new(setup::EXCHANGE).join(GUEST_LOGS),
    ]
    .into_iter()
    .find(|dir| writable(dir))
    .unwrap_or_else(std::env::temp_dir)
}

/// The directory in the exchange directory for logs of machines in a guest.
const GUEST_LOGS: &str = "logs";

impl Machine {
    /// Boots a machine and waits until its agent answers. Its console goes to
    /// `LOGS/NAME.log`, where the name is `log_name`.
    pub fn boot(hypervisor: &dyn Hypervisor, paths: &Paths, log_name: &str) -> Result<Self> {
        let run = RunDir::new()?;
        let mode = Mode::Agent;
        let setup = hypervisor.setup(&run, mode.clone()).keeping(paths);
        setup.write(&run.setup())?;
        let (mut command, end) = hypervisor.command(&run, &mode)?;
        command.stderr(Stdio::piped());
        let mut child = process::spawn_group(&mut command)
            .with_context(|| format!("cannot start a {} machine", hypervisor.name()))?;
        // The command may hold the guest's end of the channel: the end of the
        // machine is seen only when no copy of it is left.
        drop(command);
        let log = log_dir(paths).join(format!("{log_name}.log"));
        let console = match Console::start(&mut child, &log) {
            Ok(console) => console,
            Err(error) => {
                process::kill_group(&mut child);
                return Err(error);
            }
        };
        let deadline = Instant::now() + hypervisor.boot_limit();
        let connected = connect(end, &mut child, deadline).and_then(|stream| {
            let reader = stream.try_clone().context("cannot share the channel")?;
            let pulse = Pulse::default();
            let messages = listen(reader, console.sink(), pulse.clone());
            Ok((stream, messages, pulse))
        });
        let (to_guest, from_guest, pulse) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                process::kill_group(&mut child);
                return Err(console.explain(&error));
            }
        };
        let mut machine = Machine {
            place: hypervisor.place(),
            child,
            console,
            to_guest,
            from_guest,
            pulse,
            silence_limit: SILENCE_LIMIT,
            run,
            paths: paths.clone(),
            kernel: String::new(),
            over: false,
        };
        let came_up = match machine.next(deadline) {
            Ok(FromGuest::Hello { kernel, trouble }) if trouble.is_empty() => Ok(kernel),
            Ok(FromGuest::Hello { trouble, .. }) => Err(anyhow!(
                "trouble in the kernel's log while it booted:\n{}",
                trouble.join("\n")
            )),
            Ok(other) => Err(anyhow!("the agent did not come up: {other:?}")),
            Err(error) => {
                Err(error.context(format!("the {} machine did not boot", hypervisor.name())))
            }
        };
        match came_up {
            Ok(kernel) => {
                machine.kernel = kernel;
                Ok(machine)
            }
            Err(error) => {
                machine.end();
                Err(machine.console.explain(&error))
            }
        }
    }

    /// The release of the kernel it runs.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// The machine's process on this side.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The same; it leads its process group.
    pub fn process(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The exchange directory as this side sees it.
    pub fn exchange(&self) -> PathBuf {
        self.run.exchange()
    }

    /// The file with everything the machine printed.
    pub fn console_log(&self) -> &Path {
        self.console.path()
    }

    /// Whether it cannot run anything any more.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// A job for a test of a suite in this machine.
    pub fn job(&self, suite: &str, test: &crate::test::Test) -> Job {
        let exchange = Path::new(setup::EXCHANGE);
        Job::new(suite, test, self.place, &self.paths, exchange)
    }

    /// Runs a job. A machine that dies or falls silent fails the test and is
    /// over; so is one whose kernel complained.
    pub fn run(&mut self, job: &Job) -> TestResult {
        let started = Instant::now();
        // The agent enforces the limit; it gets some time to say so.
        let grace = Duration::from_secs(10) * self.place.slowness();
        let deadline = started + job.limit() + grace;
        let answer = send(&mut self.to_guest, &ToGuest::Run(Box::new(job.clone())))
            .and_then(|()| self.next(deadline));
        let mut result = match answer {
            Ok(FromGuest::Done(result)) if result.name == job.test => *result,
            Ok(other) => self.crashed(job, started, &anyhow!("unexpected answer {other:?}")),
            Err(error) => self.crashed(job, started, &error),
        };
        if result.machine_is_suspect {
            self.end();
            result.machine_is_suspect = false;
        }
        result
    }

    /// Runs a step (see [`suites::STEPS`]) and returns its reply.
    pub fn run_step<A: Serialize, R: DeserializeOwned>(
        &mut self,
        step: &str,
        args: &A,
    ) -> Result<R> {
        let test = suites::find(suites::STEPS, step)
            .with_context(|| format!("there is no step named {step}"))?;
        let mut job = self.job(suites::STEPS, test);
        job.args = serde_json::to_value(args).context("cannot encode a step's arguments")?;
        let result = self.run(&job);
        match result.outcome {
            Outcome::Pass => serde_json::from_value(result.reply)
                .with_context(|| format!("unexpected reply of step {step}")),
            Outcome::Fail { message } => {
                bail!("step {step} failed: {message}\n{}", result.output.trim())
            }
            Outcome::Skip { reason } => bail!("step {step} was skipped: {reason}"),
        }
    }

    /// Runs a shell script in the machine and returns its output.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        self.run_step("run_script", &script)
    }

    /// Ends the machine in an orderly way, or, if it does not obey, by force.
    pub fn power_off(mut self) {
        if !self.over && send(&mut self.to_guest, &ToGuest::PowerOff).is_ok() {
            // Whether it obeyed makes no difference: Drop ends it for certain.
            let _obeyed = process::wait_limited(&mut self.child, Duration::from_secs(10));
        }
    }

    /// Sets how long the guest may go without a heartbeat.
    pub fn set_silence_limit(&mut self, limit: Duration) {
        self.silence_limit = limit;
    }

    fn next(&mut self, deadline: Instant) -> Result<FromGuest> {
        loop {
            // Before the first beat only the deadline of the boot counts.
            let dead_at = self.pulse.last().map(|beat| beat + self.silence_limit);
            let until = dead_at.map_or(deadline, |dead_at| dead_at.min(deadline));
            let left = until.saturating_duration_since(Instant::now());
            match self.from_guest.recv_timeout(left) {
                Ok(Ok(FromGuest::Broken { why })) => bail!("the agent gave up: {why}"),
                Ok(message) => return message,
                Err(RecvTimeoutError::Disconnected) => bail!("the machine ended"),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            let beat = self.pulse.last();
            if beat.is_some_and(|beat| now.duration_since(beat) >= self.silence_limit) {
                bail!(
                    "the machine is dead: no heartbeat for {} s",
                    self.silence_limit.as_secs()
                );
            }
            if now >= deadline {
                bail!("the machine fell silent: it sends heartbeats, its agent does not answer");
            }
        }
    }

    fn crashed(&mut self, job: &Job, started: Instant, error: &anyhow::Error) -> TestResult {
        let ended = self.child.try_wait().ok().flatten();
        self.end();
        let mut message = format!("while {}: {} ran: {error:#}", job.suite, job.test);
        if let Some(status) = ended {
            message.push_str(&format!(" ({status})"));
        }
        for line in klog::trouble(self.console.text().lines()) {
            message.push_str(&format!("\n{line}"));
        }
        let explained = self.console.explain(&anyhow!(message));
        let outcome = Outcome::fail(format!("{explained:#}"));
        TestResult::new(&job.test, outcome, started.elapsed())
    }

    fn end(&mut self) {
        self.over = true;
        process::kill_group(&mut self.child);
        self.console.finish();
        self.fetch_logs();
    }

    /// Keeps the consoles of machines that ran inside this one, next to its own.
    fn fetch_logs(&self) {
        let Ok(logs) = fs::read_dir(self.run.exchange().join(GUEST_LOGS)) else {
            return;
        };
        for log in logs.flatten() {
            let kept = self.console.path().with_file_name(log.file_name());
            if let Err(error) = fs::copy(log.path(), &kept) {
                eprintln!("lab: cannot keep {}: {error}", kept.display());
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// How long a guest may go without a heartbeat before it is given up. One that is merely slow still
/// beats, once a second by its own clock.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// The time of the last message from the guest; none until its agent is up.
#[derive(Clone, Debug, Default)]
struct Pulse(Arc<Mutex<Option<Instant>>>);

impl Pulse {
    fn last(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn felt(&self, heard: &Result<Heard<FromGuest>>) {
        if matches!(heard, Ok(Heard::Message(_))) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }
}

/// Waits for the machine to connect, if it has to.
fn connect(end: ChannelEnd, child: &mut Child, deadline: Instant) -> Result<UnixStream> {
    let listener = match end {
        ChannelEnd::Connected(stream) => return Ok(stream),
        ChannelEnd::Listening(listener) => listener,
    };
    listener
        .set_nonblocking(true)
        .context("cannot wait for the machine")?;
    let limit = deadline.saturating_duration_since(Instant::now());
    let stream = wait_for("the machine opens its channel", limit, || {
        match listener.accept() {
            Ok((stream, _)) => return Ok(Some(stream)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("cannot accept the machine's channel"),
        }
        match child.try_wait().context("cannot look at the machine")? {
            Some(status) => bail!("the machine ended with {status} before it started"),
            None => Ok(None),
        }
    })?;
    let blocking = stream.set_nonblocking(false);
    blocking.context("cannot use the channel")?;
    Ok(stream)
}

/// Reads messages in a thread, which ends with the machine.
fn listen(
    stream: UnixStream,
    mut noise: impl Write + Send + 'static,
    pulse: Pulse,
) -> Receiver<Result<FromGuest>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        loop {
            let heard = hear::<FromGuest>(&mut reader);
            pulse.felt(&heard);
            let goes_on = match heard {
                Ok(Heard::Message(FromGuest::Beat)) => true,
                Ok(Heard::Message(message)) => sender.send(Ok(message)).is_ok(),
                // Noise belongs with the console; a full disk loses it.
                Ok(Heard::Noise(text)) => writeln!(noise, "{text}").is_ok(),
                Ok(Heard::End) => false,
                Err(error) => {
                    // The receiver may be gone; then the error is of no use.
                    let _gone = sender.send(Err(error));
                    false
                }
            };
            if !goes_on {
                return;
            }
        }
    });
    receiver
}
