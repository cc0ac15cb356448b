//! `ublkup doctor`: what this machine can and cannot do, and what servers that died left behind.

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use rustix::fs::{Access, access};
use serde::Serialize;

use super::output::{print, print_json};
use crate::door::ublk;
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{explain, remove_stale_device};
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
        ("runtime directory", runtime_directory(dir)),
    ];
    let exports = dead_exports(dir, clean).into_iter();
    let devices = dead_devices(clean).into_iter();
    let checks: Vec<_> = machine
        .into_iter()
        .chain(exports.map(|finding| ("left by dead servers", finding)))
        .chain(devices.map(|finding| ("dead block devices", finding)))
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
            print(&format!("{word} {}: {}\n", check.what, check.finding))?;
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

fn runtime_directory(dir: &RuntimeDir) -> Finding {
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
        Ok(names) => names,
        Err(error) => {
            let path = dir.path().display();
            return vec![(
                Verdict::Warning,
                format!("cannot look into {path}: {error}"),
            )];
        }
    };
    let dead: Vec<_> = names.iter().filter(|name| !dir.is_alive(name)).collect();
    if dead.is_empty() {
        return vec![(Verdict::Ok, "nothing".into())];
    }
    let examine = |name: &String| match clean.then(|| remove_export(dir, name)) {
        Some(Ok(())) => (Verdict::Ok, format!("{name}: cleared away")),
        Some(Err(error)) => (Verdict::Problem, format!("{name}: {}", explain(&error))),
        None => {
            let remedy = "'ublkup doctor --clean' removes it, as does serving that name again";
            (Verdict::Warning, format!("{name}: {remedy}"))
        }
    };
    dead.into_iter().map(examine).collect()
}

/// Stale devices that no export has a note of.
fn dead_devices(clean: bool) -> Vec<Finding> {
    // Without a driver, or rights, none can be seen; another check says so.
    let dead = ublk::stale_devices().unwrap_or_default();
    let examine = |id| match clean.then(|| ublk::remove(id, false)) {
        Some(Ok(())) => (Verdict::Ok, format!("/dev/ublkc{id}: removed")),
        Some(Err(error)) => (Verdict::Problem, error.to_string()),
        None => {
            let remedy = "'ublkup doctor --clean' removes it";
            (
                Verdict::Warning,
                format!("/dev/ublkc{id} has no server; {remedy}"),
            )
        }
    };
    dead.into_iter().map(|device| examine(device.id)).collect()
}

fn remove_export(dir: &RuntimeDir, name: &str) -> Result<()> {
    // Locking the name removes the sockets; dropping the lock removes the folder.
    let lock = dir.claim(name)?;
    remove_stale_device(&lock)
}
