//! The lab's kernels: Linux source plus our patch series plus a config
//! fragment, built once and cached by content.

pub mod build;
pub mod config;
pub mod find;
pub mod mutants;
pub mod selftests;
pub mod source;
pub mod tree;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The kernels there are.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize,
)]
pub enum Kernel {
    /// User Mode Linux.
    #[value(name = "uml")]
    Uml,
    /// For emulated PCs.
    #[value(name = "x86_64")]
    X86,
    /// User Mode Linux with everything that finds mistakes.
    #[value(name = "uml-debug")]
    UmlDebug,
    /// For emulated PCs, with everything that finds mistakes.
    #[value(name = "x86_64-debug")]
    X86Debug,
    /// For emulated PCs, looking for data races.
    #[value(name = "x86_64-kcsan")]
    X86Kcsan,
    /// User Mode Linux without the series, to compare with.
    #[value(name = "uml-base")]
    UmlBase,
}

impl Kernel {
    /// The ones that everything but `--full` runs on.
    pub const USUAL: [Kernel; 2] = [Kernel::Uml, Kernel::X86];

    /// The name on the command line and of the cached build.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Uml => "uml",
            Kernel::X86 => "x86_64",
            Kernel::UmlDebug => "uml-debug",
            Kernel::X86Debug => "x86_64-debug",
            Kernel::X86Kcsan => "x86_64-kcsan",
            Kernel::UmlBase => "uml-base",
        }
    }

    /// Whether it is User Mode Linux, a program of the host.
    pub fn is_uml(self) -> bool {
        self.arch() == "um"
    }

    /// Whether our series is in it.
    fn has_series(self) -> bool {
        self != Kernel::UmlBase
    }

    /// The config fragments, in `kernel-patch/config`, put on top of each other.
    fn fragments(self) -> &'static [&'static str] {
        match self {
            Kernel::Uml => &["uml", "series"],
            Kernel::X86 => &["x86_64", "series"],
            Kernel::UmlDebug => &["uml", "series", "debug"],
            Kernel::X86Debug => &["x86_64", "series", "debug"],
            Kernel::X86Kcsan => &["x86_64", "series", "kcsan"],
            Kernel::UmlBase => &["uml"],
        }
    }

    /// The kernel's name of the architecture.
    fn arch(self) -> &'static str {
        match self {
            Kernel::Uml | Kernel::UmlDebug | Kernel::UmlBase => "um",
            Kernel::X86 | Kernel::X86Debug | Kernel::X86Kcsan => "x86_64",
        }
    }

    /// The configuration the fragments are put on.
    fn base_config(self) -> &'static str {
        if self.is_uml() {
            "defconfig"
        } else {
            "tinyconfig"
        }
    }

    /// What to make, and where it appears.
    fn image(self) -> (&'static str, &'static str) {
        if self.is_uml() {
            ("linux", "linux")
        } else {
            ("bzImage", "arch/x86/boot/bzImage")
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The patch series there are. Each applies without the others; a kernel has all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// AF_UNIX addresses in an open file.
    FdAddress,
    /// Rings in place of read and write.
    Ring,
}

impl Series {
    /// In the order they apply.
    pub const ALL: [Series; 2] = [Series::FdAddress, Series::Ring];

    /// Its directory in `kernel-patch`.
    pub fn directory(self) -> &'static str {
        match self {
            Series::FdAddress => "series",
            Series::Ring => "ring",
        }
    }

    /// The branch of the editable tree whose last commits it is.
    pub fn branch(self) -> &'static str {
        match self {
            Series::FdAddress => "fd-address",
            Series::Ring => "ring",
        }
    }
}

/// The directory of our kernel work: patches, fragments, base version.
#[derive(Clone, Debug)]
pub struct KernelPatch {
    dir: PathBuf,
}

impl KernelPatch {
    /// The one in a checkout.
    pub fn of(repo: &Path) -> Self {
        KernelPatch {
            dir: repo.join("kernel-patch"),
        }
    }

    /// The version the series is made for, such as `7.3`.
    pub fn base(&self) -> Result<String> {
        let path = self.dir.join("base");
        std::fs::read_to_string(&path)
            .map(|text| text.trim().to_owned())
            .with_context(|| format!("cannot read {}", path.display()))
    }

    /// Where the patches of a series are.
    pub fn dir_of(&self, series: Series) -> PathBuf {
        self.dir.join(series.directory())
    }

    /// Where the patches are that break the series.
    pub fn mutants_dir(&self) -> PathBuf {
        self.dir.join("mutants")
    }

    /// The patches of all series, in the order they apply, without the cover letters. There may
    /// be none.
    pub fn series(&self) -> Result<Vec<PathBuf>> {
        let mut patches = Vec::new();
        for series in Series::ALL {
            patches.extend(self.patches(series)?);
        }
        Ok(patches)
    }

    /// The patches of one series.
    pub fn patches(&self, series: Series) -> Result<Vec<PathBuf>> {
        let dir = self.dir_of(series);
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

    /// A kernel's config fragments, as one.
    pub fn fragment(&self, kernel: Kernel) -> Result<String> {
        let dir = self.dir.join("config");
        let mut all = String::new();
        for name in kernel.fragments() {
            let path = dir.join(format!("{name}.config"));
            all += &std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
        }
        Ok(all)
    }

    /// The patches that go into a kernel.
    pub fn series_of(&self, kernel: Kernel) -> Result<Vec<PathBuf>> {
        if kernel.has_series() {
            self.series()
        } else {
            Ok(Vec::new())
        }
    }
}

/// Whether a file is a patch, and not the cover letter that `git format-patch` numbers 0.
fn is_patch(path: &Path) -> bool {
    let cover = path
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"0000-"));
    path.extension().is_some_and(|ending| ending == "patch") && !cover
}
