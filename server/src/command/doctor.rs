//! `ublkup doctor`: what this machine can and cannot do, and what servers that died left behind.

mod images;
mod open_files;

use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use rustix::fs::{Access, access};
use serde::Serialize;
use upgrade_proto::{printable, remove_stale_entries, stale_entries};

use super::left;
use super::output::{print, print_json};
use super::serve_args::CONFIG_FOLDER;
use crate::door::ublk::{self, DeviceState};
use crate::engine::{io_flusher, sandbox};
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{explain, recorded_devices};
use crate::io::Ring;

/// How one check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// All is well.
    Ok,
    /// Something will not be offered, or is in the way.
    Warning,
    /// Nothing can be served.
    Problem,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    what: &'static str,
    verdict: Verdict,
    finding: String,
}

/// The verdict, and what was found; where something is amiss, also what to do.
type Finding = (Verdict, String);

/// Checks the machine; with `clean`, removes what servers that died left behind.
///
/// # Errors
///
/// When the findings cannot be printed.
pub fn run(dir: &RuntimeDir, json: bool, clean: bool) -> Result<ExitCode> {
    let machine = [
        ("kernel", kernel()),
        ("io_uring", io_uring()),
        ("ublk", ublk()),
        ("memory pressure", memory_pressure()),
        ("swap", swap()),
        ("mounts", mounts()),
        ("sandbox", sandbox()),
        ("runtime directory", runtime_directory(dir)),
    ];
    let files = open_files::findings(dir).into_iter();
    let images = images::findings(dir, CONFIG_FOLDER.as_ref()).into_iter();
    let exports = dead_exports(dir, clean).into_iter();
    let entries = stale_services(dir, clean).into_iter();
    let dead = dead_devices(clean).into_iter();
    let waiting = waiting_devices(dir).into_iter();
    let checks: Vec<_> = machine
        .into_iter()
        .chain(files.map(|finding| ("open files", finding)))
        .chain(images.map(|finding| ("image", finding)))
        .chain(exports.map(|finding| ("left by dead servers", finding)))
        .chain(entries.map(|finding| ("registry of services", finding)))
        .chain(dead.map(|finding| ("dead block devices", finding)))
        .chain(waiting.map(|finding| ("waiting block devices", finding)))
        .map(|(what, (verdict, finding))| Check {
            what,
            verdict,
            finding,
        })
        .collect();
    if json {
        print_json(&checks)?;
    } else {
        let colour = std::io::stdout().is_terminal();
        for check in &checks {
            let (word, code) = match check.verdict {
                Verdict::Ok => ("ok", 32),
                Verdict::Warning => ("warning", 33),
                Verdict::Problem => ("problem", 31),
            };
            let word = match colour {
                true => format!("\x1b[{code}m{word:8}\x1b[0m"),
                false => format!("{word:8}"),
            };
            print(&format!(
                "{word} {}: {}\n",
                check.what,
                printable(&check.finding)
            ))?;
        }
    }
    Ok(
        match checks.iter().any(|check| check.verdict == Verdict::Problem) {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        },
    )
}

fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let words = [uname.sysname(), uname.release(), uname.machine()];
    let words = words.map(|word| word.to_string_lossy());
    (Verdict::Ok, words.join(" "))
}

fn io_uring() -> Finding {
    match Ring::new(8) {
        Ok(ring) => (Verdict::Ok, format!("{} ring", ring.flavour())),
        Err(error) => {
            let remedy = "Linux 5.19 or later; see sysctl kernel.io_uring_disabled";
            (
                Verdict::Problem,
                format!("{error}: nothing works without it ({remedy})"),
            )
        }
    }
}

fn ublk() -> Finding {
    match ublk::available() {
        Ok(features) => {
            let for_users = match rustix::process::geteuid().is_root() {
                true => "",
                false => {
                    "devices of ordinary users (data is copied, no recovery), and to administrators "
                }
            };
            let features = features.names().join(", ");
            (
                Verdict::Ok,
                format!("the driver offers {for_users}{features}"),
            )
        }
        Err(why) => (
            Verdict::Warning,
            format!("{why} (vhost-user works without it)"),
        ),
    }
}

fn memory_pressure() -> Finding {
    match io_flusher::declare() {
        Ok(()) => (Verdict::Ok, "servers may be I/O flushers".into()),
        Err(error) => (
            Verdict::Warning,
            format!(
                "servers cannot be I/O flushers: {error}: with cache=buffered, writes may hang when memory is \
                 short (CAP_SYS_RESOURCE)"
            ),
        ),
    }
}

/// Whether the machine swaps to a disk of a ublk server.
fn swap() -> Finding {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    match ublk_swaps(&swaps).as_slice() {
        [] => (Verdict::Ok, "none on a disk of a ublk server".into()),
        disks => (
            Verdict::Warning,
            format!(
                "on {}: when memory is short its server may need memory to write it out, and the machine may stop: \
                 use a disk of the kernel's",
                disks.join(", ")
            ),
        ),
    }
}

/// The disks of ublk servers, and their partitions, in the text of /proc/swaps.
fn ublk_swaps(swaps: &str) -> Vec<String> {
    let paths = swaps
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let disks = paths.filter(|path| path.starts_with("/dev/ublkb"));
    disks.map(str::to_owned).collect()
}

fn mounts() -> Finding {
    if ublk::available().is_err() {
        return (
            Verdict::Ok,
            "no block device can be served and mounted".into(),
        );
    }
    match sandbox::probe_mounts() {
        Ok(()) => (
            Verdict::Ok,
            "servers of block devices have a mount namespace of their own".into(),
        ),
        Err(error) => (
            Verdict::Warning,
            format!(
                "servers cannot have a mount namespace of their own: {error}: one that is the last process where its \
                 disk is mounted, as in a container, cannot be killed (CAP_SYS_ADMIN, CAP_SYS_CHROOT)"
            ),
        ),
    }
}

fn sandbox() -> Finding {
    let status = sandbox::probe();
    let verdict = match status.missing.is_empty() {
        true => Verdict::Ok,
        false => Verdict::Warning,
    };
    (verdict, status.to_string())
}

fn runtime_directory(dir: &RuntimeDir) -> Finding {
    if let Err(error @ upgrade_proto::Error::Untrusted { .. }) = dir.names() {
        return (Verdict::Problem, format!("{error}, or give --runtime-dir"));
    }
    let path = dir.path();
    // The directory may not exist yet; then its nearest ancestor decides.
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(path);
    let path = path.display();
    match access(there, Access::WRITE_OK) {
        Ok(()) => (Verdict::Ok, path.to_string()),
        Err(error) => (
            Verdict::Problem,
            format!("{path}: {error}: run as root or give --runtime-dir"),
        ),
    }
}

fn dead_exports(dir: &RuntimeDir, clean: bool) -> Vec<Finding> {
    let names = match dir.names() {
        // Also of those whose folders are lost.
        Ok(names) => {
            let with_devices = recorded_devices(dir).into_iter().map(|(name, _)| name);
            names
                .into_iter()
                .chain(with_devices)
                .collect::<BTreeSet<_>>()
        }
        Err(error) => {
            let path = dir.path().display();
            return vec![(
                Verdict::Warning,
                format!("cannot look into {path}: {error}"),
            )];
        }
    };
    let examine = |name: &String| {
        let (verdict, finding) = match dir.is_alive(name) {
            Ok(true) => return None,
            Err(error) => (
                Verdict::Warning,
                format!("cannot know whether it has a server: {error}"),
            ),
            Ok(false) if clean => match left::remove(dir, name) {
                Ok(removed) => (Verdict::Ok, removed),
                Err(error) => (Verdict::Problem, explain(&error)),
            },
            Ok(false) => (
                Verdict::Problem,
                format!("its server has died; {}", left::advice(dir, name)),
            ),
        };
        Some((verdict, format!("{name}: {finding}")))
    };
    let mut findings: Vec<_> = names.iter().filter_map(examine).collect();
    if findings.is_empty() {
        findings.push((Verdict::Ok, "nothing".into()));
    }
    findings
}

/// Entries of the registry that killed servers could not remove. Clients ignore them.
fn stale_services(dir: &RuntimeDir, clean: bool) -> Vec<Finding> {
    let found = match clean {
        true => remove_stale_entries(dir.path()),
        false => stale_entries(dir.path()),
    };
    let tell = |entry: PathBuf| match (entry.display(), clean) {
        (entry, true) => (Verdict::Ok, format!("{entry}: removed")),
        (entry, false) => (
            Verdict::Warning,
            format!("{entry}: its server was killed; 'ublkup doctor --clean' removes it"),
        ),
    };
    match found {
        Ok(entries) => entries.into_iter().map(tell).collect(),
        Err(error) => vec![(Verdict::Warning, error.to_string())],
    }
}

/// Dead devices that no export has a note of.
fn dead_devices(clean: bool) -> Vec<Finding> {
    // Without a driver, or rights, none can be seen; another check says so.
    let dead = ublk::stale_devices().unwrap_or_default();
    let examine = |id| match clean.then(|| ublk::remove(id, false)) {
        Some(Ok(())) => (Verdict::Ok, format!("/dev/ublkc{id}: removed")),
        Some(Err(error)) => (Verdict::Problem, error.to_string()),
        None => (
            Verdict::Problem,
            format!("/dev/ublkc{id} has no server; 'ublkup doctor --clean' removes it"),
        ),
    };
    dead.into_iter().map(examine).collect()
}

/// Devices that wait for a server, and that no export has a note of. They may be another program's: they are
/// removed by name only.
fn waiting_devices(dir: &RuntimeDir) -> Vec<Finding> {
    let recorded = recorded_devices(dir);
    let is_recorded = |id| recorded.iter().any(|(_, recorded)| *recorded == id);
    let waiting = ublk::waiting_devices().unwrap_or_default();
    let others = waiting.into_iter().filter(|id| !is_recorded(*id));
    let tell = |id| {
        let path = dir.path().display();
        let finding = format!(
            "/dev/ublkb{id} waits for a server, and {path} has no record of it: it is another program's, or its \
             record was lost; 'ublkup doctor --remove /dev/ublkb{id}' removes it"
        );
        (Verdict::Problem, finding)
    };
    others.map(tell).collect()
}

/// Removes a device without a server.
///
/// # Errors
///
/// When it has one, or the removal is not confirmed.
pub fn remove(dir: &RuntimeDir, id: u32, yes: bool) -> Result<ExitCode> {
    let state = ublk::device_state(id)?;
    ensure!(state != DeviceState::Gone, "there is no /dev/ublkc{id}");
    let owners = recorded_devices(dir).into_iter();
    let owners: Vec<_> = owners
        .filter(|(_, recorded)| *recorded == id)
        .map(|(name, _)| name)
        .collect();
    let whose = match owners.is_empty() {
        true => String::new(),
        false => format!(", which was made for the export '{}'", owners.join("', '")),
    };
    if !yes {
        ensure!(
            std::io::stdin().is_terminal(),
            "standard input is no terminal, so the question cannot be asked: say --yes to remove /dev/ublkb{id}{whose}"
        );
        let question = format!(
            "Requests to /dev/ublkb{id}{whose}, that wait will fail, and a file system on it loses what it had not \
             written. Remove it? [y/N] "
        );
        let _unseen = std::io::stderr().write_all(question.as_bytes());
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        ensure!(
            matches!(answer.trim(), "y" | "Y" | "yes"),
            "/dev/ublkb{id} is left as it is"
        );
    }
    ublk::remove(id, true)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_on_disks_of_ublk_servers_is_found() {
        let swaps = "Filename Type Size Used Priority\n/dev/vda2 partition 1 0 -2\n/dev/ublkb3p1 partition 1 0 -3\n";
        assert_eq!(ublk_swaps(swaps), ["/dev/ublkb3p1"]);
    }
}
