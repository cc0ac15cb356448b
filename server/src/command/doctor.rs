//! `ublkup doctor`: what this machine can and cannot do, and what servers that died left behind.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Result;
use rustix::fs::{Access, access};
use serde::Serialize;

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
    /// What was found and, where something is amiss, what to do.
    finding: String,
}

/// Checks the machine; with `clean`, removes what servers that died left behind.
///
/// # Errors
///
/// When the findings cannot be printed.
pub fn run(dir: &RuntimeDir, json: bool, clean: bool) -> Result<ExitCode> {
    let mut checks = vec![kernel(), io_uring(), ublk(), runtime_directory(dir)];
    checks.extend(dead_exports(dir, clean));
    checks.extend(dead_devices(clean));
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&checks)?)?;
    } else {
        let colour = std::io::stdout().is_terminal();
        for check in &checks {
            let (word, code) = match check.verdict {
                Verdict::Ok => ("ok", 32),
                Verdict::Warning => ("warning", 33),
                Verdict::Problem => ("problem", 31),
            };
            let Check { what, finding, .. } = check;
            if colour {
                writeln!(out, "\x1b[{code}m{word:8}\x1b[0m {what}: {finding}")?;
            } else {
                writeln!(out, "{word:8} {what}: {finding}")?;
            }
        }
    }
    let bad = checks.iter().any(|check| check.verdict == Verdict::Problem);
    Ok(if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    Check {
        what: "kernel",
        verdict: Verdict::Ok,
        finding: format!(
            "{} {} {}",
            text(uname.sysname()),
            text(uname.release()),
            text(uname.machine())
        ),
    }
}

fn io_uring() -> Check {
    let (verdict, finding) = match Ring::new(8) {
        Ok(ring) => (Verdict::Ok, format!("{} ring", ring.flavour())),
        Err(error) => (
            Verdict::Problem,
            format!(
                "{error}: nothing works without it (Linux 5.19 or later; see sysctl kernel.io_uring_disabled)"
            ),
        ),
    };
    Check {
        what: "io_uring",
        verdict,
        finding,
    }
}

fn ublk() -> Check {
    let (verdict, finding) = match ublk::available() {
        Ok(features) => (
            Verdict::Ok,
            format!(
                "the driver offers {}{}",
                if rustix::process::geteuid().is_root() {
                    ""
                } else {
                    "devices of ordinary users (data is copied, no recovery), and to administrators "
                },
                features.names().join(", ")
            ),
        ),
        Err(why) => (
            Verdict::Warning,
            format!("{why} (vhost-user works without it)"),
        ),
    };
    Check {
        what: "ublk",
        verdict,
        finding,
    }
}

fn runtime_directory(dir: &RuntimeDir) -> Check {
    let path = dir.path();
    // The directory may not exist yet; then its nearest ancestor decides.
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(path);
    let (verdict, finding) = match access(there, Access::WRITE_OK) {
        Ok(()) => (Verdict::Ok, path.display().to_string()),
        Err(error) => (
            Verdict::Problem,
            format!(
                "{}: {error}: run as root or give --runtime-dir",
                path.display()
            ),
        ),
    };
    Check {
        what: "runtime directory",
        verdict,
        finding,
    }
}

fn dead_exports(dir: &RuntimeDir, clean: bool) -> Vec<Check> {
    let what = "left by dead servers";
    let names = match dir.names() {
        Ok(names) => names,
        Err(error) => {
            return vec![Check {
                what,
                verdict: Verdict::Warning,
                finding: format!("cannot look into {}: {error}", dir.path().display()),
            }];
        }
    };
    let dead: Vec<_> = names
        .into_iter()
        .filter(|name| !dir.is_alive(name))
        .collect();
    if dead.is_empty() {
        return vec![Check {
            what,
            verdict: Verdict::Ok,
            finding: "nothing".into(),
        }];
    }
    dead.into_iter()
        .map(|name| {
            let (verdict, finding) = if clean {
                match remove_export(dir, &name) {
                    Ok(()) => (Verdict::Ok, format!("{name}: cleared away")),
                    Err(error) => (Verdict::Problem, format!("{name}: {}", explain(&error))),
                }
            } else {
                (
                    Verdict::Warning,
                    format!("{name}: 'ublkup doctor --clean' removes it, as does serving that name again"),
                )
            };
            Check { what, verdict, finding }
        })
        .collect()
}

/// Stale devices that no export has a note of.
fn dead_devices(clean: bool) -> Vec<Check> {
    let what = "dead block devices";
    // Without a driver, or rights, there is nothing to be seen; another check says so.
    let Ok(dead) = ublk::stale_devices() else {
        return Vec::new();
    };
    dead.into_iter()
        .map(|device| {
            let id = device.id;
            let (verdict, finding) = match clean.then(|| ublk::remove(id, false)) {
                Some(Ok(())) => (Verdict::Ok, format!("/dev/ublkc{id}: removed")),
                Some(Err(error)) => (Verdict::Problem, error.to_string()),
                None => (
                    Verdict::Warning,
                    format!("/dev/ublkc{id} has no server; 'ublkup doctor --clean' removes it"),
                ),
            };
            Check {
                what,
                verdict,
                finding,
            }
        })
        .collect()
}

fn remove_export(dir: &RuntimeDir, name: &str) -> Result<()> {
    // Locking the name removes the sockets; dropping the lock removes the folder.
    let lock = dir.claim(name)?;
    remove_stale_device(&lock)
}
