//! Programs of crates.io, built once into the cache.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cache;
use crate::progress;

/// A file system exerciser that also works on block devices.
pub const FSX: Crate = Crate {
    name: "fsx",
    version: "0.3.2",
};

/// Another ublk server, to be measured against.
pub const RUBLK: Crate = Crate {
    name: "rublk",
    version: "0.2.15",
};

/// Breaks code in one place at a time and runs tests.
pub const CARGO_MUTANTS: Crate = Crate {
    name: "cargo-mutants",
    version: "27.1.0",
};

/// A program of crates.io; another version is another build.
#[derive(Clone, Copy, Debug)]
pub struct Crate {
    /// Of the crate and of its program.
    pub name: &'static str,
    /// The release.
    pub version: &'static str,
}

impl Crate {
    /// Where the program is, built if need be.
    pub fn program(self) -> Result<PathBuf> {
        let Crate { name, version } = self;
        let cache = cache::dir()?;
        let root = cache.join(format!("{name}-{version}"));
        let program = root.join("bin").join(name);
        if program.exists() {
            return Ok(program);
        }
        let _one_at_a_time = cache::lock(name)?;
        if program.exists() {
            return Ok(program);
        }
        let mut install = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        install
            .args(["install", "--locked", "--version", version])
            .arg("--root")
            .arg(&root)
            .arg("--target-dir")
            .arg(root.join("target"))
            .arg(name)
            // Settings of an outer cargo are not meant for this one.
            .env_remove("CARGO_MANIFEST_DIR");
        let log = cache.join(format!("{name}.log"));
        let hour = Duration::from_secs(3600);
        progress::run(&format!("building {name}"), install, &log, hour)?;
        std::fs::remove_dir_all(root.join("target"))
            .with_context(|| format!("cannot remove the objects of {name}"))?;
        ensure!(program.exists(), "cargo built no {}", program.display());
        Ok(program)
    }
}
