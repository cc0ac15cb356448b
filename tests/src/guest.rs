//! The lab as the first process of a guest: makes the file system usable,
//! starts the agent (or a shell), collects orphans, ends the machine.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount, mount_bind};
use rustix::process::{Pid, WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use crate::agent;
use crate::machine::{Mode, SETUP_VARIABLE, Setup};

/// The hidden subcommand that makes the lab an agent.
pub const AGENT: &str = "guest-agent";

/// Directories that get a tmpfs: the host's files there are hidden, writes
/// there stay in the guest.
const MASKED: [&str; 3] = ["/run", "/tmp", "/var/tmp"];

/// Whether this process is the first of a guest.
pub fn is_init() -> bool {
    std::process::id() == 1 && std::env::var_os(SETUP_VARIABLE).is_some()
}

/// The life of the first process. Does not return while the machine is up.
pub fn init_main() -> ExitCode {
    let powers_off = match live() {
        Ok(setup) => setup.powers_off,
        Err(error) => {
            // On the kernel's console, which the host quotes when a boot fails.
            // The end of the first process is the end of the machine.
            kernel_log(&format!("init failed: {error:#}"));
            return ExitCode::FAILURE;
        }
    };
    rustix::fs::sync();
    let ended = reboot(if powers_off {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    });
    kernel_log(&format!("cannot end the machine: {ended:?}"));
    ExitCode::FAILURE
}

fn live() -> Result<Setup> {
    mount_kernel_file_systems()?;
    use_console()?;
    rustix::system::sethostname(b"lab").context("cannot set the host name")?;
    let path = std::env::var_os(SETUP_VARIABLE).context("no setup is named")?;
    let setup = Setup::read(Path::new(&path))?;
    mask_and_keep(&setup.keep)?;
    let exchange = Path::new("/run/lab/exchange");
    fs::create_dir_all(exchange).context("cannot make the exchange directory")?;
    let options = std::ffi::CString::new(setup.exchange.options.as_str())
        .context("the exchange directory's options have a zero byte")?;
    mount(
        setup.exchange.source.as_str(),
        exchange,
        setup.exchange.kind.as_str(),
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .context("cannot mount the exchange directory")?;
    let copy = Path::new("/run/lab/setup.json");
    setup.write(copy)?;

    let mut command = match &setup.mode {
        Mode::Agent => {
            let mut agent = Command::new("/proc/self/exe");
            agent.arg(AGENT).stdin(Stdio::null());
            agent
        }
        Mode::Shell(words) => shell(words.as_deref()),
    };
    command
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", "/tmp")
        .env("TERM", "linux")
        .env("TMPDIR", "/tmp")
        .env("RUST_BACKTRACE", "1")
        .env(SETUP_VARIABLE, copy)
        .current_dir("/tmp");
    let child = command.spawn().context("cannot start the agent")?;
    let child = Pid::from_child(&child);
    let code = collect_until(child)?;
    if matches!(setup.mode, Mode::Shell(_)) {
        agent::report_exit(&setup, code)?;
    }
    Ok(setup)
}

/// A shell on the console, or a command.
fn shell(words: Option<&[String]>) -> Command {
    let mut command = match words {
        Some([program, rest @ ..]) => {
            let mut command = Command::new(program);
            command.args(rest);
            command
        }
        _ => {
            let mut command = Command::new("/bin/bash");
            command.args(["--norc", "-i"]);
            command
        }
    };
    // SAFETY: between fork and exec, two system calls on descriptors the child
    // owns; nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
    command
}

/// Collects every process that ends, until this one does.
fn collect_until(child: Pid) -> Result<i32> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == child => {
                return Ok(status
                    .exit_status()
                    .or_else(|| status.terminating_signal().map(|signal| 128 + signal))
                    .unwrap_or(-1));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for processes"),
        }
    }
}

fn mount_kernel_file_systems() -> Result<()> {
    let flags = MountFlags::empty();
    for (kind, dir) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        match mount(kind, dir, kind, flags, None) {
            // Some kernels mount /dev by themselves.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot mount {dir}")),
        }
    }
    for (kind, dir) in [("devpts", "/dev/pts"), ("tmpfs", "/dev/shm")] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {dir}"))?;
        mount(kind, dir, kind, flags, None).with_context(|| format!("cannot mount {dir}"))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        std::os::unix::fs::symlink(target, link).with_context(|| format!("cannot make {link}"))?;
    }
    for (kind, dir) in [
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
        ("securityfs", "/sys/kernel/security"),
    ] {
        // The directory exists exactly if the kernel has the file system.
        if Path::new(dir).exists() {
            mount(kind, dir, kind, flags, None).with_context(|| format!("cannot mount {dir}"))?;
        }
    }
    Ok(())
}

/// The kernel could not open a console before `/dev` was there.
fn use_console() -> Result<()> {
    let console = File::options()
        .read(true)
        .write(true)
        .open("/dev/console")
        .context("cannot open the console")?;
    rustix::stdio::dup2_stdin(&console).context("cannot use the console")?;
    rustix::stdio::dup2_stdout(&console).context("cannot use the console")?;
    rustix::stdio::dup2_stderr(&console).context("cannot use the console")?;
    Ok(())
}

/// Mounts tmpfs over the masked directories, and puts back what must stay
/// visible below them, at the same path.
fn mask_and_keep(keep: &[PathBuf]) -> Result<()> {
    let flags = MountFlags::empty();
    let staging = Path::new("/dev/shm/keep");
    let hidden: Vec<&PathBuf> = keep
        .iter()
        .filter(|path| MASKED.iter().any(|masked| path.starts_with(masked)) && path.is_dir())
        .collect();
    for (index, path) in hidden.iter().enumerate() {
        let place = staging.join(index.to_string());
        fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        mount_bind(*path, &place).with_context(|| format!("cannot keep {}", path.display()))?;
    }
    for masked in MASKED {
        if Path::new(masked).is_dir() {
            mount("tmpfs", masked, "tmpfs", flags, None)
                .with_context(|| format!("cannot mount a tmpfs on {masked}"))?;
        }
    }
    for (index, path) in hidden.iter().enumerate() {
        let place = staging.join(index.to_string());
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        mount_bind(&place, *path).with_context(|| format!("cannot restore {}", path.display()))?;
    }
    Ok(())
}

/// Writes a line into the kernel's log, if there is one.
pub fn kernel_log(text: &str) {
    use std::io::Write;
    let written = File::options()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(format!("lab: {text}").as_bytes()));
    if written.is_err() {
        eprintln!("lab: {text}");
    }
}
