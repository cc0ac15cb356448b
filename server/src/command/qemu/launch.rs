//! A new guest. The launcher claims each block device, looks for the service behind it, and starts QEMU with the
//! claimed descriptors. It stays QEMU's parent: what other programs read of the devices meanwhile has to be dropped
//! from the page cache before the claims end. If the launcher is killed, QEMU still holds the claims.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus};

use anyhow::{Context, Result, bail};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::iterator::Signals;
use upgrade_proto::{DiskClaim, Lookup};

use super::disk::{Disk, Target, registry_entry, service_address};
use super::memory::{Board, parse_command_line};
use super::words::quote;
use crate::command::cli::{NOT_UPGRADABLE, USAGE};
use crate::command::complain;
use crate::command::output::print;
use crate::command::probe::{Found, lookup, service};
use crate::command::signals;
use crate::export::explain;

/// What `ublkup qemu` is asked for.
#[derive(Debug)]
pub struct Launch<'a> {
    /// `DEVICE[,key=value…]` each.
    pub disks: &'a [String],
    /// Print the command instead of running it.
    pub print: bool,
    /// Fail if a disk has no service.
    pub require_upgrade: bool,
    /// QEMU and its arguments.
    pub command: &'a [OsString],
    /// Where to look for services first.
    pub runtime_dir: Option<&'a Path>,
}

/// A claimed disk and where its requests will go.
struct Attached {
    disk: Disk,
    claim: DiskClaim,
    target: Target,
}

/// Runs QEMU, or prints how.
///
/// # Errors
///
/// When a device cannot be claimed, another client has a disk, or QEMU cannot be started.
pub fn launch(launch: &Launch<'_>) -> Result<ExitCode> {
    let (disks, board) = match (parse(launch.disks), read_board(launch.command)) {
        (Ok(disks), Ok(board)) => (disks, board),
        (Err(error), _) | (_, Err(error)) => {
            complain(&error.to_string());
            return Ok(USAGE.into());
        }
    };
    if let Some(twice) = given_twice(&disks, device_number) {
        complain(&format!("{}: given twice", twice.display()));
        return Ok(USAGE.into());
    }
    let lookup = lookup(launch.runtime_dir);
    let mut attached = Vec::new();
    for (index, disk) in disks.into_iter().enumerate() {
        let claim = DiskClaim::open(&disk.path).map_err(explain_device)?;
        let fd = match launch.print {
            // As the redirections will number them.
            true => FIRST_REDIRECTION + i32::try_from(index)?,
            false => claim.as_fd().as_raw_fd(),
        };
        if !launch.print {
            claim.settle()?;
        }
        let (target, why_not) = find_target(&disk, &claim, fd, &lookup)?;
        if let Some(why) = why_not {
            let path = disk.path.display();
            if launch.require_upgrade {
                complain(&format!("{path}: not upgradable: {why}"));
                return Ok(NOT_UPGRADABLE.into());
            }
            complain(&format!(
                "{path}: not upgraded ({why}): QEMU gets the block device"
            ));
        }
        attached.push(Attached {
            disk,
            claim,
            target,
        });
    }
    let is_upgraded = |one: &Attached| matches!(one.target, Target::Service { .. });
    if board.boots_by_mmio_firmware && attached.iter().any(is_upgraded) {
        complain(
            "the firmware of microvm cannot read an upgraded disk and hangs: give QEMU -kernel, or use a board with PCI",
        );
    }
    let options = options(&board, &attached);
    if launch.print {
        return print_command(launch.command, &options, &attached);
    }
    run(launch.command, options, attached)
}

fn parse(texts: &[String]) -> Result<Vec<Disk>, String> {
    let one = |text: &String| {
        text.parse()
            .map_err(|why| format!("DEVICE '{text}': {why}"))
    };
    texts.iter().map(one).collect()
}

/// A device that is named a second time, whatever its name. Its claim would be refused because of the first.
fn given_twice(disks: &[Disk], number: impl Fn(&Path) -> Option<u64>) -> Option<&Path> {
    let mut numbers = BTreeSet::new();
    let is_second = |disk: &&Disk| number(&disk.path).is_some_and(|it| !numbers.insert(it));
    disks.iter().find(is_second).map(|disk| &*disk.path)
}

fn device_number(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    (metadata.file_type().is_block_device()).then(|| metadata.rdev())
}

/// What is no block device, with what to give instead.
fn explain_device(error: upgrade_proto::Error) -> anyhow::Error {
    let is_no_device = matches!(error.errno(), Errno::NOTBLK | Errno::NOENT);
    let error = anyhow::Error::from(error);
    match is_no_device {
        true => error.context("give the block device of an export, like /dev/ublkb0 (ublkup list)"),
        false => error,
    }
}

fn read_board(command: &[OsString]) -> Result<Board, String> {
    let words = command.iter().skip(1);
    let words: Vec<_> = words.map(|word| word.to_string_lossy().into()).collect();
    parse_command_line(&words)
}

/// Where the requests of a disk will go, and why not to the service. `fd` is the descriptor as QEMU
/// will have it.
fn find_target(
    disk: &Disk,
    claim: &DiskClaim,
    fd: i32,
    lookup: &Lookup,
) -> Result<(Target, Option<String>)> {
    let path = disk.path.display();
    let why_not = match service(claim, lookup).with_context(|| path.to_string())? {
        Found::Service(connection) => match registry_entry(&connection) {
            Ok(entry) => {
                let address = service_address(entry.as_deref(), fd);
                let route = connection.route().name();
                let pid = connection.peer().pid;
                tracing::info!("{path}: upgraded by the {route} route, to server process {pid}");
                return Ok((Target::Service { address }, None));
            }
            Err(error) => explain(&error),
        },
        Found::Nothing(why) => why,
        Found::Taken => bail!("{path}: another client has the disk: stop that one first"),
    };
    let target = Target::Block {
        filename: format!("/proc/self/fd/{fd}"),
        read_only: claim.is_read_only(),
    };
    Ok((target, Some(why_not)))
}

fn options(board: &Board, attached: &[Attached]) -> Vec<String> {
    let upgraded = |one: &Attached| matches!(one.target, Target::Service { .. });
    let mut options = match attached.iter().any(upgraded) {
        true => board.shared_memory.clone(),
        false => Vec::new(),
    };
    for (index, one) in attached.iter().enumerate() {
        options.extend(one.disk.options(index, board.bus, &one.target));
    }
    options
}

/// The first descriptor of a printed command.
const FIRST_REDIRECTION: i32 = 3;

/// The last one that every shell can redirect.
const LAST_REDIRECTION: i32 = 9;

/// Prints the command that would be run. It takes no claim and leaves the page cache as it is, so
/// the line begins by writing that out.
fn print_command(command: &[OsString], options: &[String], disks: &[Attached]) -> Result<ExitCode> {
    let mut flushes = String::new();
    let mut redirections = String::new();
    for (fd, one) in (FIRST_REDIRECTION..).zip(disks) {
        if fd > LAST_REDIRECTION {
            bail!("a shell redirects seven disks at most; run QEMU without --print");
        }
        let path = one.disk.path.to_str().context("the path is not UTF-8")?;
        let (path, mode) = (
            quote(path),
            if one.claim.is_read_only() { "<" } else { "<>" },
        );
        flushes.push_str(&format!("blockdev --flushbufs {path} && "));
        redirections.push_str(&format!(" {fd}{mode}{path}"));
    }
    let mut words = Vec::new();
    for word in command {
        words.push(quote(word.to_str().context("a word is not UTF-8")?));
    }
    words.extend(options.iter().map(|word| quote(word)));
    print(&format!("{flushes}{}{redirections}\n", words.join(" ")))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs QEMU with the claims inherited; its exit code is ours.
fn run(words: &[OsString], options: Vec<String>, attached: Vec<Attached>) -> Result<ExitCode> {
    let (program, rest) = words.split_first().context("no QEMU to run")?;
    // Before there is a child: a signal must not come between.
    let signals = Signals::new(signals::that_end()).context("cannot handle signals")?;
    let mut command = Command::new(program);
    command.args(rest).args(options);
    let fd = |one: &Attached| one.claim.as_fd().as_raw_fd();
    let fds: Vec<_> = attached.iter().map(fd).collect();
    // SAFETY: runs in the forked child, where the claims' descriptors are open as they are here,
    // until QEMU takes over; makes one system call each and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            for &fd in &fds {
                let fd = BorrowedFd::borrow_raw(fd);
                rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        });
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.to_string_lossy()))?;
    let status = wait(&mut child, signals)?;
    let mut dirty = false;
    for one in attached {
        if let Err(error) = one.claim.release() {
            dirty = true;
            complain(&format!(
                "{error}: the page cache may hold outdated data of the device"
            ));
        }
    }
    Ok(match exit_code(status) {
        0 if dirty => ExitCode::FAILURE,
        code => code.into(),
    })
}

/// Waits for QEMU and passes signals on to it.
fn wait(child: &mut Child, mut signals: Signals) -> Result<ExitStatus> {
    let qemu = pidfd_open(Pid::from_child(child), PidfdFlags::empty())
        .context("cannot watch QEMU's process")?;
    let handle = signals.handle();
    std::thread::scope(|scope| {
        let forward = || {
            for number in signals.forever() {
                // Fails if QEMU has just ended, which is what the signal asked for.
                if let Some(signal) = Signal::from_named_raw(number) {
                    let _gone = pidfd_send_signal(&qemu, signal);
                }
            }
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn_scoped(scope, forward)
            .context("cannot start the signal thread")?;
        let status = child.wait().context("cannot wait for QEMU");
        handle.close();
        status
    })
}

/// As a shell tells it: 128 and the signal's number.
fn exit_code(status: ExitStatus) -> u8 {
    let signalled = || status.signal().map(|signal| 128 + signal);
    let code = status.code().or_else(signalled).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::consts::SIGUSR1;

    #[test]
    fn exit_codes_and_signals_are_told_as_a_shell_does() {
        for (script, code) in [("exit 0", 0), ("exit 33", 33), ("kill -TERM $$", 143)] {
            let status = Command::new("sh").args(["-c", script]).status().unwrap();
            assert_eq!(exit_code(status), code, "{script}");
        }
    }

    #[test]
    fn a_signal_reaches_the_child_and_its_answer_comes_back() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "trap 'exit 7' USR1; echo up; while :; do sleep 0.01; done",
        ]);
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut up = [0; 3];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
        let signals = Signals::new([SIGUSR1]).unwrap();
        signal_hook::low_level::raise(SIGUSR1).unwrap();
        assert_eq!(wait(&mut child, signals).unwrap().code(), Some(7));
    }

    #[test]
    fn a_device_that_is_given_twice_is_found_under_two_names() {
        let number = |path: &Path| match path.to_str() {
            Some("/dev/ublkb0" | "/dev/disk/by-id/a") => Some(7),
            Some("/dev/ublkb1") => Some(8),
            _ => None,
        };
        for (given, twice) in [
            (vec!["/dev/ublkb0", "/dev/ublkb1"], None),
            (vec!["/dev/none", "/dev/none"], None),
            (
                vec!["/dev/ublkb0,id=a", "/dev/ublkb1", "/dev/disk/by-id/a"],
                Some("/dev/disk/by-id/a"),
            ),
        ] {
            let disks: Vec<Disk> = given.iter().map(|text| text.parse().unwrap()).collect();
            assert_eq!(
                given_twice(&disks, number),
                twice.map(Path::new),
                "{given:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_understood_is_wrong_usage() {
        let command = ["qemu-system-x86_64", "-daemonize"].map(OsString::from);
        let disks = ["/dev/no-such-disk".to_owned()];
        let asked = Launch {
            disks: &disks,
            print: false,
            require_upgrade: false,
            command: &command,
            runtime_dir: None,
        };
        assert_eq!(launch(&asked).unwrap(), ExitCode::from(USAGE));
    }
}
