//! `cargo lab doctor`: what this machine can and cannot run.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cache;
use crate::packages::{self, Purpose, apt};
use crate::report::line;

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    /// Whether it is as wished.
    good: bool,
    /// Whether the lab's tests need it.
    required: bool,
    /// What was found, or what to do.
    says: String,
}

/// Looks, prints, and says whether every test can run.
pub fn run(json: bool) -> Result<bool> {
    let findings = look();
    let good = findings.iter().all(|one| one.good || !one.required);
    if json {
        line(&serde_json::to_string_pretty(&findings).context("cannot encode the findings")?);
    } else {
        for one in &findings {
            let mark = match (one.good, one.required) {
                (true, _) => "ok  ",
                (false, true) => "MISS",
                (false, false) => "no  ",
            };
            line(&format!("{mark} {:<16} {}", one.what, one.says));
        }
        line(if good {
            "every test can run here"
        } else {
            "something is missing: `cargo lab setup` installs it, or says what to install"
        });
    }
    Ok(good)
}

fn look() -> Vec<Finding> {
    let required = |what, problem: Option<String>, fine: &str| Finding {
        what,
        good: problem.is_none(),
        required: true,
        says: problem.unwrap_or_else(|| fine.to_owned()),
    };
    let optional = |what, good, yes: &str, no: &str| Finding {
        what,
        good,
        required: false,
        says: if good { yes } else { no }.to_owned(),
    };
    let readable = |path: &str| {
        let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
        rustix::fs::access(path, access).is_ok()
    };
    vec![
        required(
            "architecture",
            (!cfg!(target_arch = "x86_64"))
                .then(|| "the kernels and machines are x86-64 only".to_owned()),
            "x86-64",
        ),
        required(
            "kernel build",
            lacking(Purpose::KernelBuild),
            "all tools are here",
        ),
        required(
            "server build",
            lacking(Purpose::ServerBuild),
            "all tools are here",
        ),
        required("test tools", lacking(Purpose::Tests), "all tools are here"),
        required("io_uring", io_uring(), "allowed"),
        required("cache", cache_problem(), &cache_place()),
        optional(
            "packages",
            apt::codename().is_some() && rustix::process::geteuid().is_root(),
            "the lab can install what is missing",
            "not Debian, or not root: what is missing has to be installed by hand",
        ),
        optional(
            "kvm",
            readable("/dev/kvm"),
            "/dev/kvm can be opened; tests do not need it",
            "/dev/kvm cannot be opened: guests are emulated, which every test allows for",
        ),
        optional(
            "ublk",
            readable("/dev/ublk-control"),
            "this kernel has ublk; tests boot their own kernels anyway",
            "this kernel has no usable ublk: it is tested in the lab's own kernels",
        ),
    ]
}

fn lacking(purpose: Purpose) -> Option<String> {
    let missing = packages::missing(&[purpose]);
    if missing.is_empty() {
        return None;
    }
    Some(format!("install {}", missing.join(" ")))
}

fn io_uring() -> Option<String> {
    let path = Path::new("/proc/sys/kernel/io_uring_disabled");
    // Kernels before 6.6 have no such file and always allow it.
    let value = std::fs::read_to_string(path).unwrap_or_default();
    match value.trim() {
        "" | "0" => None,
        "1" if rustix::process::geteuid().is_root() => None,
        other => Some(format!(
            "the kernel refuses it: set {} to 0 (it is {other})",
            path.display()
        )),
    }
}

fn cache_problem() -> Option<String> {
    let dir = match cache::dir() {
        Ok(dir) => dir,
        Err(error) => return Some(format!("{error:#}")),
    };
    let facts = rustix::fs::statvfs(&dir).ok()?;
    let free_gib = facts.f_bavail.saturating_mul(facts.f_frsize) >> 30;
    // Source and objects of one kernel at a time, and what is kept.
    (free_gib < 6).then(|| {
        format!(
            "{} has only {free_gib} GiB left, a kernel build takes 5; \
             set UBLKUP_LAB_CACHE to another place",
            dir.display()
        )
    })
}

fn cache_place() -> String {
    cache::dir().map_or_else(
        |error| format!("{error:#}"),
        |dir| dir.display().to_string(),
    )
}
