//! The lab's kernels: Linux source plus our patch series plus a config
//! fragment, built once and cached by content.

pub mod build;
pub mod config;
pub mod source;
pub mod tree;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The kernels there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kernel {
    /// User Mode Linux.
    #[value(name = "uml")]
    Uml,
    /// For emulated PCs.
    #[value(name = "x86_64")]
    X86,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Kernel; 2] = [Kernel::Uml, Kernel::X86];

    /// The name of the config fragment and of the cached build.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Uml => "uml",
            Kernel::X86 => "x86_64",
        }
    }

    /// The kernel's name of the architecture.
    fn arch(self) -> &'static str {
        match self {
            Kernel::Uml => "um",
            Kernel::X86 => "x86_64",
        }
    }

    /// The configuration the fragment is put on.
    fn base_config(self) -> &'static str {
        match self {
            Kernel::Uml => "defconfig",
            Kernel::X86 => "tinyconfig",
        }
    }

    /// What to make, and where it appears.
    fn image(self) -> (&'static str, &'static str) {
        match self {
            Kernel::Uml => ("linux", "linux"),
            Kernel::X86 => ("bzImage", "arch/x86/boot/bzImage"),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The directory of our kernel work: patches, fragments, base version.
#[derive(Clone, Debug)]
pub struct KernelPatch {
    dir: PathBuf,
}

impl KernelPatch {
    /// The one in a checkout.
    #[must_use]
    pub fn of(repo: &Path) -> Self {
        KernelPatch {
            dir: repo.join("kernel-patch"),
        }
    }

    /// The version the series is made for, such as `7.3`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn base(&self) -> Result<String> {
        let path = self.dir.join("base");
        std::fs::read_to_string(&path)
            .map(|text| text.trim().to_owned())
            .with_context(|| format!("cannot read {}", path.display()))
    }

    /// Where the patches are.
    #[must_use]
    pub fn series_dir(&self) -> PathBuf {
        self.dir.join("series")
    }

    /// The patches, in the order they apply, without the cover letter. There may be none.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn series(&self) -> Result<Vec<PathBuf>> {
        let dir = self.series_dir();
        if !dir.exists() {
            return Ok(Vec::new());
        }
        let mut patches = Vec::new();
        for entry in
            std::fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))?
        {
            let path = entry.context("cannot list the series")?.path();
            if is_patch(&path) {
                patches.push(path);
            }
        }
        patches.sort();
        Ok(patches)
    }

    /// A kernel's config fragment.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn fragment(&self, kernel: Kernel) -> Result<String> {
        let path = self.dir.join("config").join(format!("{kernel}.config"));
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// Whether a file is a patch, and not the cover letter that `git format-patch` numbers 0.
fn is_patch(path: &Path) -> bool {
    let cover = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"0000-"));
    path.extension().is_some_and(|ending| ending == "patch") && !cover
}
