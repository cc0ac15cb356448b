//! What a guest's first process is told, in a file it can read from its root.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::test::{Paths, Place};

/// The environment variable, set on the kernel's command line, with the path of
/// the setup file.
pub const SETUP_VARIABLE: &str = "LAB_SETUP";

/// Where a guest finds its exchange directory.
pub const EXCHANGE: &str = "/run/lab/exchange";

/// What the guest is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Runs tests it is told on the channel.
    Agent,
    /// Runs a command, or a shell, on the console.
    Shell(Option<Vec<String>>),
}

/// A file system to mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// The type, as for mount(8).
    pub kind: String,
    /// The source.
    pub source: String,
    /// The options.
    pub options: String,
}

/// Everything the guest's first process needs to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Where this is.
    pub place: Place,
    /// What it is for.
    pub mode: Mode,
    /// How to mount the exchange directory.
    pub exchange: Mount,
    /// The device node of the channel; a prefix if it ends in `*`.
    pub channel: String,
    /// Whether powering off works; otherwise a reboot ends the machine.
    pub powers_off: bool,
    /// Directories that must stay visible although something is mounted over
    /// the directory they are in.
    pub keep: Vec<PathBuf>,
}

impl Setup {
    /// Adds the directories that tests need.
    pub fn keeping(mut self, paths: &Paths) -> Self {
        let programs = [&paths.server]
            .into_iter()
            .chain(paths.driver_tests.values().take(1))
            .chain(paths.kernels.values());
        self.keep.extend(
            programs
                .filter_map(|program| program.parent())
                .chain([paths.repo.as_path()])
                .chain(paths.selftests.as_deref())
                .chain(paths.herd7.as_deref())
                .filter(|path| !path.as_os_str().is_empty())
                .map(Path::to_owned),
        );
        self
    }

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self).context("cannot encode a guest's setup")?;
        fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes)
            .with_context(|| format!("cannot understand {}", path.display()))
    }
}
