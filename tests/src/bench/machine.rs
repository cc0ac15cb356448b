//! What a run has to say about the machine it ran on.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use testkit::shell::Shell;

use super::usage;

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The processor's name.
    pub processor: String,
    /// How many of them this process may use.
    pub processors: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The distribution.
    pub system: String,
    /// The frequency governor of the first processor, or that there is none to see.
    pub governor: String,
}

impl Facts {
    /// Looks around.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let after = |text: &str, name: &str| {
            text.lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once([':', '=']))
                .map(|(_, value)| value.trim().trim_matches('"').to_owned())
                .unwrap_or_default()
        };
        let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
        Facts {
            processor: after(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: usage::field(&read("/proc/meminfo"), "MemTotal:").unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            system: after(&read("/etc/os-release"), "PRETTY_NAME"),
            governor: match governor.trim() {
                "" => "none to see".to_owned(),
                name => name.to_owned(),
            },
        }
    }
}

/// The checked-out revision, marked when files other than documents differ from it.
pub fn revision(repo: &Path) -> String {
    let git = |args: &[&str]| Shell::new("git").args(args.iter().copied()).dir(repo).run();
    let describe = git(&["describe", "--always", "--abbrev=12"]);
    let changes = git(&["status", "--porcelain", "-uno", "--", ".", ":!docs"]);
    match (describe, changes) {
        (Ok(name), Ok(changes)) if changes.trim().is_empty() => name.trim().to_owned(),
        (Ok(name), _) => format!("{}-dirty", name.trim()),
        (Err(_), _) => "unknown".to_owned(),
    }
}
