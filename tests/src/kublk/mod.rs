//! ublkup behind the command line of kublk, the kernel's own ublk server, so that the kernel's ublk
//! tests (`tools/testing/selftests/ublk`) can be run against it.
//!
//! Those tests know of a device nothing but its number. Each device here is an export of a server
//! of its own, with a runtime directory of its own; a file named by the number says which.

mod options;

use std::fmt;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde::{Deserialize, Serialize};

use options::{Command, Data, Options, Recovery, Type};
use testkit::process;
use testkit::shell::{Shell, last_lines};
use testkit::ublk_control::{Control, Info};
use testkit::wait::wait_for;

/// The hidden subcommand that makes the lab a kublk.
pub const SUBCOMMAND: &str = "kublk";

/// Environment: the server's program.
pub const SERVER: &str = "KUBLK_SERVER";

/// Environment: the directory where the devices are remembered.
pub const STATE: &str = "KUBLK_STATE";

/// Environment: how to be broken, see [`Sabotage`].
pub const SABOTAGE: &str = "KUBLK_SABOTAGE";

/// Ways in which the server is broken on purpose, to see who notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Files are written and read as if there were none.
    ForgetsData,
    /// Another size is agreed to, and nothing done.
    KeepsSize,
    /// Partitions are looked for in any case.
    LooksForPartitions,
    /// A device in use is stopped.
    StopsInUse,
    /// No server takes over.
    DoesNotRecover,
}

impl Sabotage {
    /// Each way and its word in the environment.
    const WORDS: [(Sabotage, &'static str); 5] = [
        (Sabotage::ForgetsData, "forgets-data"),
        (Sabotage::KeepsSize, "keeps-size"),
        (Sabotage::LooksForPartitions, "looks-for-partitions"),
        (Sabotage::StopsInUse, "stops-in-use"),
        (Sabotage::DoesNotRecover, "does-not-recover"),
    ];

    /// Its word.
    pub fn word(self) -> &'static str {
        let found = Self::WORDS.iter().find(|(way, _)| *way == self);
        found.map_or("", |(_, word)| word)
    }

    /// Whether this process is to be broken in this way.
    fn is_on(self) -> bool {
        std::env::var(SABOTAGE).is_ok_and(|word| word == self.word())
    }
}

/// Each export's name; its runtime directory tells it from others.
const NAME: &str = "disk";

/// How long a server may take to be ready, and a command to end.
const LIMIT: Duration = Duration::from_secs(60);

/// The size of kublk's null disks.
const NULL_BYTES: u64 = 250 << 30;

/// The features that ublkup uses when the driver has them, or that are the same to the users of a
/// disk. The tests ask for some of them and end as skipped when they are not there.
const FEATURES: [&str; 10] = [
    "SUPPORT_ZERO_COPY",
    "USER_RECOVERY",
    "USER_RECOVERY_REISSUE",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "UPDATE_SIZE",
    "AUTO_BUF_REG",
    "QUIESCE",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
];

/// Runs one command line of kublk.
pub fn main(words: &[String]) -> ExitCode {
    let done = Options::parse(words).and_then(|options| run(&options));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Scripts that tidy up what they have removed before. kublk says nothing then.
        Err(error) if error.is::<NoDevice>() => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kublk {}: {error:#}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    match options.command {
        Command::Add => add(options),
        Command::Recover => recover(options),
        Command::Del => delete(options.device()?),
        Command::Stop => stop(options.device()?, options.safe),
        Command::List => list(options.device()?),
        Command::Features => features(),
        Command::UpdateSize => update_size(options.device()?, options.size_bytes),
        Command::Quiesce => quiesce(options.device()?),
    }
}

fn variable(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os(name);
    path.map(PathBuf::from)
        .with_context(|| format!("{name} is not set"))
}

/// What is remembered of a device.
#[derive(Serialize, Deserialize)]
struct Device {
    runtime_dir: PathBuf,
}

/// No such device was made, or it was removed.
#[derive(Debug)]
struct NoDevice(u32);

impl fmt::Display for NoDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no device {}", self.0)
    }
}

impl std::error::Error for NoDevice {}

impl Device {
    fn note(&self, id: u32) -> Result<()> {
        let path = variable(STATE)?.join(id.to_string());
        let text = serde_json::to_vec(self)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn of(id: u32) -> Result<Self> {
        let path = variable(STATE)?.join(id.to_string());
        let text = fs::read(&path).map_err(|_| NoDevice(id))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is broken", path.display()))
    }

    fn forget(self, id: u32) -> Result<()> {
        fs::remove_file(variable(STATE)?.join(id.to_string()))?;
        fs::remove_dir_all(&self.runtime_dir)?;
        Ok(())
    }

    fn ublkup(&self, words: &[&str]) -> Result<Shell> {
        Ok(Shell::new(variable(SERVER)?)
            .args(words)
            .env("UBLKUP_RUNTIME_DIR", &self.runtime_dir)
            .limit(LIMIT))
    }
}

/// What the server is told about the disk.
fn arguments(options: &Options) -> Result<Vec<String>> {
    let data = match options.data() {
        Data::Copy => "copy",
        Data::ZeroCopy => "zero-copy",
        Data::UserCopy => "user-copy",
    };
    let mut words = vec![
        "--ublk=yes".to_owned(),
        format!("--name={NAME}"),
        format!("--queues={}", options.queues),
        format!("--depth={}", options.depth),
        format!("--ublk-data={data}"),
    ];
    words.extend(options.wanted_id().map(|id| format!("--ublk-id={id}")));
    words.extend(recovery(options).map(|mode| format!("--ublk-recovery={mode}")));
    if options.no_scan && !Sabotage::LooksForPartitions.is_on() {
        words.push("--no-partition-scan".to_owned());
    }
    let kind = options.kind.context("no target (-t)")?;
    words.push(match (kind, &options.files[..]) {
        (Type::FaultInject, _) if options.delay_us > 0 => {
            let delay_ms = options.delay_us.div_ceil(1000);
            format!("fault:any=delay{delay_ms};null:{NULL_BYTES}")
        }
        (Type::Loop, [file, ..]) if Sabotage::ForgetsData.is_on() => {
            format!("null:{}", fs::metadata(file)?.len())
        }
        (Type::Loop, [file, ..]) => format!("file:{}", file.display()),
        (Type::Stripe, files) => format!("file:{}", stripe(files)?.display()),
        _ => format!("null:{NULL_BYTES}"),
    });
    Ok(words)
}

/// `--ublk-recovery`, where it is not what the server does by itself. There is no recovery in which
/// requests that were under way fail and later ones wait.
fn recovery(options: &Options) -> Option<&'static str> {
    let file = matches!(options.kind, Some(Type::Loop | Type::Stripe));
    match options.recovery() {
        Recovery::FailIo => Some("fail-io"),
        Recovery::No if file => Some("off"),
        Recovery::Plain | Recovery::Reissue if !file => Some("reissue"),
        Recovery::No | Recovery::Plain | Recovery::Reissue => None,
    }
}

/// The last file, as large as all of them: tests serve the first one at the same time, and ublkup does
/// not let two servers write to one file.
fn stripe(files: &[PathBuf]) -> Result<&Path> {
    let (last, others) = files.split_last().context("no file")?;
    let mut wanted = fs::metadata(last)?.len();
    for other in others {
        wanted += fs::metadata(other)?.len();
    }
    File::options().write(true).open(last)?.set_len(wanted)?;
    Ok(last)
}

fn add(options: &Options) -> Result<()> {
    let runtime_dir = tempfile::Builder::new()
        .prefix("run-")
        .tempdir_in(variable(STATE)?)
        .context("cannot make a runtime directory")?
        .keep();
    let device = Device { runtime_dir };
    let id = start(&device, options)?;
    device.note(id)?;
    list(id)
}

fn recover(options: &Options) -> Result<()> {
    if Sabotage::DoesNotRecover.is_on() {
        return Ok(());
    }
    let wanted = options.device()?;
    let device = Device::of(wanted)?;
    let id = start(&device, options)?;
    ensure!(id == wanted, "device {id} was made instead of {wanted}");
    list(id)
}

/// Starts a server that outlives this process; the number of its device once it serves.
fn start(device: &Device, options: &Options) -> Result<u32> {
    let log_path = device.runtime_dir.join("log");
    let log = File::create(&log_path).context("cannot create a log")?;
    let mut command = Process::new(variable(SERVER)?);
    command
        .arg("serve")
        .args(arguments(options)?)
        .env("UBLKUP_RUNTIME_DIR", &device.runtime_dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0);
    let mut child = command.spawn().context("cannot start the server")?;
    wait_for("the server is ready", LIMIT, || {
        let text = fs::read_to_string(&log_path)?;
        if text.lines().any(|line| line == "ready") {
            let id = text.split("/dev/ublkb").nth(1).context("no block device")?;
            let digits = id.split(|c: char| !c.is_ascii_digit()).next();
            return Ok(Some(digits.unwrap_or_default().parse()?));
        }
        match child.try_wait()? {
            Some(status) => bail!("the server ended with {status}: {}", last_lines(&text, 5)),
            None => Ok(None),
        }
    })
}

/// As kublk does: stops and removes the device, whether it has a server or not.
fn delete(id: u32) -> Result<()> {
    let device = Device::of(id)?;
    let stopped = device.ublkup(&["stop", "--force", NAME])?.finish()?;
    if stopped.status.success() {
        return device.forget(id);
    }
    // Its server was killed. 'ublkup doctor --clean' would also remove what other tests have killed.
    let control = Control::open()?;
    // One that waits for a server stops by being deleted.
    let _is_stopped = control.stop(id);
    let deleted = control.delete(id);
    deleted.with_context(|| format!("DEL_DEV, after: {}", stopped.tail()))?;
    device.forget(id)
}

/// A device that ublkup stops is removed.
fn stop(id: u32, safe: bool) -> Result<()> {
    let device = Device::of(id)?;
    let words: &[&str] = match safe && !Sabotage::StopsInUse.is_on() {
        true => &["stop", NAME],
        false => &["stop", "--force", NAME],
    };
    device.ublkup(words)?.run()?;
    device.forget(id)
}

/// The server is told to leave the device to another one.
fn quiesce(id: u32) -> Result<()> {
    let info = Control::open()?.info(id)?;
    let pid = Pid::from_raw(info.server_pid).context("it has no server")?;
    let server = pidfd_open(pid, PidfdFlags::empty()).context("its server is gone")?;
    kill_process(pid, Signal::USR2)?;
    let ended = poll(
        &mut [PollFd::new(&server, PollFlags::IN)],
        Some(&process::timespec(LIMIT)),
    )?;
    ensure!(ended > 0, "the server does not leave");
    Ok(())
}

fn list(id: u32) -> Result<()> {
    let info = Control::open()?.info(id);
    let info = info.with_context(|| format!("GET_DEV_INFO of {id}"))?;
    print!("{}", describe(&info));
    Ok(())
}

/// In kublk's words, at kublk's places: the tests count columns.
fn describe(info: &Info) -> String {
    format!(
        "dev id {}: nr_hw_queues {} queue_depth {}\n\
         \tmax rq size {} daemon pid {} flags {:#x} state {}\n",
        info.id,
        info.queues,
        info.depth,
        info.buffer_bytes,
        info.server_pid,
        info.flags,
        info.state.name()
    )
}

/// Those of the driver that this server uses.
fn features() -> Result<()> {
    let doctor = Shell::new(variable(SERVER)?)
        .args(["doctor", "--json"])
        .finish()?;
    let checks: serde_json::Value = serde_json::from_str(&doctor.stdout)?;
    let finding = checks
        .as_array()
        .and_then(|checks| checks.iter().find(|check| check["what"] == "ublk"))
        .and_then(|check| check["finding"].as_str())
        .context("doctor says nothing of the ublk door")?;
    let offered = finding
        .strip_prefix("the driver offers ")
        .with_context(|| format!("there is no driver: {finding}"))?;
    for name in offered.split(", ") {
        if name.starts_with("BIT_") {
            println!("unknown: {name}");
        } else if FEATURES.contains(&name) {
            println!("UBLK_F_{name}");
        }
    }
    Ok(())
}

fn update_size(id: u32, size_bytes: u64) -> Result<()> {
    if Sabotage::KeepsSize.is_on() {
        return Ok(());
    }
    let size = size_bytes.to_string();
    Device::of(id)?
        .ublkup(&["resize", NAME, &size, "--shrink"])?
        .run()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::ublk_control::State;

    #[test]
    fn the_tests_find_their_columns() {
        let info = Info {
            queues: 2,
            depth: 128,
            state: State::Quiesced,
            buffer_bytes: 1 << 20,
            id: 5,
            server_pid: 77,
            flags: 0x48,
        };
        let text = describe(&info);
        // awk -F '[ :]' '{print $3}' of the line with "dev id"
        let first = text.lines().next().expect("a line");
        assert_eq!(first.split([' ', ':']).nth(2), Some("5"));
        let second: Vec<&str> = text
            .lines()
            .nth(1)
            .expect("a line")
            .split_whitespace()
            .collect();
        // awk '{print $7}' and '{print $11}'
        assert_eq!((second[6], second[10]), ("77", "QUIESCED"));
    }
}
