//! Which programs and libraries are needed, which are missing, and how they
//! come: through apt on Debian, by a clear message elsewhere.

pub mod apt;
pub mod crates;
pub mod herd7;
pub mod liburing;
pub mod sources;

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::kit::shell::Shell;

/// What packages are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Building kernels.
    KernelBuild,
    /// Building the server.
    ServerBuild,
    /// Running tests.
    Tests,
    /// Measuring, beyond what tests need.
    Bench,
}

/// How to see that something is there.
#[derive(Clone, Copy, Debug)]
enum Sign {
    /// A program in the search path (or root's).
    Program(&'static str),
    /// A file, or one of several.
    File(&'static [&'static str]),
    /// A shared library below a library directory, whatever its version.
    Libclang,
    /// QEMU, and not an old one.
    Qemu(&'static str),
}

/// One thing that is needed.
#[derive(Debug)]
struct Needed {
    purpose: Purpose,
    package: &'static str,
    sign: Sign,
}

/// Older ones lack devices and options that the tests use.
const QEMU_MAJOR: u32 = 10;

const NEEDED: &[Needed] = &[
    needed(Purpose::KernelBuild, "make", Sign::Program("make")),
    needed(Purpose::KernelBuild, "gcc", Sign::Program("gcc")),
    needed(Purpose::KernelBuild, "flex", Sign::Program("flex")),
    needed(Purpose::KernelBuild, "bison", Sign::Program("bison")),
    needed(Purpose::KernelBuild, "bc", Sign::Program("bc")),
    needed(Purpose::KernelBuild, "cpio", Sign::Program("cpio")),
    needed(Purpose::KernelBuild, "kmod", Sign::Program("depmod")),
    needed(Purpose::KernelBuild, "patch", Sign::Program("patch")),
    needed(Purpose::KernelBuild, "perl", Sign::Program("perl")),
    needed(Purpose::KernelBuild, "python3", Sign::Program("python3")),
    needed(Purpose::KernelBuild, "xz-utils", Sign::Program("xz")),
    needed(Purpose::KernelBuild, "binutils", Sign::Program("ld")),
    needed(
        Purpose::KernelBuild,
        "libelf-dev",
        Sign::File(&["/usr/include/libelf.h"]),
    ),
    needed(
        Purpose::KernelBuild,
        "libssl-dev",
        Sign::File(&["/usr/include/openssl/ssl.h"]),
    ),
    needed(
        Purpose::KernelBuild,
        "libc6-dev",
        Sign::File(&["/usr/include/stdio.h"]),
    ),
    // For the kernel's own test programs.
    needed(
        Purpose::KernelBuild,
        "libcap-dev",
        Sign::File(&["/usr/include/sys/capability.h"]),
    ),
    needed(Purpose::ServerBuild, "gcc", Sign::Program("cc")),
    needed(Purpose::ServerBuild, "libclang-dev", Sign::Libclang),
    needed(
        Purpose::ServerBuild,
        "libc6-dev",
        Sign::File(&["/usr/include/stdio.h"]),
    ),
    needed(Purpose::Tests, "fio", Sign::Program("fio")),
    needed(Purpose::Tests, "e2fsprogs", Sign::Program("mkfs.ext4")),
    needed(Purpose::Tests, "strace", Sign::Program("strace")),
    needed(Purpose::Tests, "iproute2", Sign::Program("ip")),
    needed(Purpose::Tests, "udev", Sign::Program("udevadm")),
    // For the kernel's own ublk tests.
    needed(Purpose::Tests, "fdisk", Sign::Program("sfdisk")),
    needed(
        Purpose::Tests,
        "qemu-system-x86",
        Sign::Qemu("qemu-system-x86_64"),
    ),
    needed(
        Purpose::Tests,
        "qemu-utils",
        Sign::Qemu("qemu-storage-daemon"),
    ),
    needed(
        Purpose::Tests,
        "libvirt-clients",
        Sign::Program("virt-xml-validate"),
    ),
    needed(Purpose::Tests, "libxml2-utils", Sign::Program("xmllint")),
    needed(Purpose::Bench, "linux-perf", Sign::Program("perf")),
];

const fn needed(purpose: Purpose, package: &'static str, sign: Sign) -> Needed {
    Needed {
        purpose,
        package,
        sign,
    }
}

/// Something that is not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// What it is for.
    pub purpose: Purpose,
    /// The Debian package that has it.
    pub package: &'static str,
    /// What was looked for.
    pub sought: String,
}

/// What is missing for these purposes; each package once.
#[must_use]
pub fn missing(purposes: &[Purpose]) -> Vec<Missing> {
    let mut missing: Vec<Missing> = Vec::new();
    for needed in NEEDED.iter().filter(|n| purposes.contains(&n.purpose)) {
        let Some(sought) = needed.sign.lacking() else {
            continue;
        };
        if !missing.iter().any(|known| known.package == needed.package) {
            missing.push(Missing {
                purpose: needed.purpose,
                package: needed.package,
                sought,
            });
        }
    }
    missing
}

impl Sign {
    /// What is lacking, or `None` if all is well.
    fn lacking(self) -> Option<String> {
        match self {
            Sign::Program(name) => match find_program(name) {
                Some(_) => None,
                None => Some(format!("program {name}")),
            },
            Sign::File(files) => {
                let there = files.iter().any(|file| Path::new(file).exists());
                (!there).then(|| format!("file {}", files.join(" or ")))
            }
            Sign::Libclang => {
                let there = std::env::var_os("LIBCLANG_PATH").is_some()
                    || has_libclang() && has_clang_headers();
                (!there).then(|| "library libclang with its headers".to_owned())
            }
            Sign::Qemu(name) => match qemu_major(name) {
                Some(major) if major >= QEMU_MAJOR => None,
                Some(major) => Some(format!("{name} {QEMU_MAJOR} (there is {major})")),
                None => Some(format!("program {name}")),
            },
        }
    }
}

/// A program in the search path, or where only root's search path looks.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|dir| dir.join(name))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
}

/// The major version of a QEMU program.
#[must_use]
pub fn qemu_major(program: &str) -> Option<u32> {
    let text = Shell::new(program).arg("--version").run().ok()?;
    parse_qemu_major(&text)
}

fn parse_qemu_major(text: &str) -> Option<u32> {
    let version = text.split("version ").nth(1)?;
    version.split('.').next()?.trim().parse().ok()
}

fn has_libclang() -> bool {
    let mut dirs = vec![PathBuf::from("/usr/lib64"), PathBuf::from("/usr/lib")];
    for dir in entries(Path::new("/usr/lib")) {
        dirs.push(dir.join("lib"));
        dirs.push(dir);
    }
    dirs.iter()
        .flat_map(|dir| entries(dir))
        .filter_map(|path| {
            path.file_name()
                .map(|name| name.to_string_lossy().into_owned())
        })
        .any(|name| is_libclang(&name))
}

/// The compiler's own headers (`stddef.h` and the like), which the library
/// does not come with.
fn has_clang_headers() -> bool {
    entries(Path::new("/usr/lib"))
        .into_iter()
        .map(|dir| dir.join("lib/clang"))
        .chain([
            PathBuf::from("/usr/lib/clang"),
            PathBuf::from("/usr/lib64/clang"),
        ])
        .flat_map(|dir| entries(&dir))
        .any(|version| version.join("include/stddef.h").exists())
}

/// What is in a directory; nothing, if it is not there.
fn entries(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default()
}

/// The names under which bindgen looks for the library.
fn is_libclang(name: &str) -> bool {
    name == "libclang.so"
        || name.starts_with("libclang.so.")
        || name.starts_with("libclang-1") && name.contains(".so")
}

/// Sees to it that everything for these purposes is there: says what is
/// missing, asks if there is a terminal and `yes` was not given, installs.
///
/// # Errors
/// It was refused or failed, or this system is not one the lab can install on;
/// the message says what to install.
pub fn ensure(purposes: &[Purpose], yes: bool) -> Result<()> {
    let missing = missing(purposes);
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|one| one.package).collect();
    eprintln!("lab: missing on this machine:");
    for one in &missing {
        eprintln!(
            "lab:   {} ({}, for {:?})",
            one.package, one.sought, one.purpose
        );
    }
    let release = apt::Release::of_this_system();
    let Some(release) = release else {
        bail!(
            "please install what these Debian packages contain, then try again: {}",
            names.join(" ")
        );
    };
    if !rustix::process::geteuid().is_root() {
        bail!(
            "not root: please run `cargo lab setup` as root, or install: {}",
            names.join(" ")
        );
    }
    if !yes && std::io::stdin().is_terminal() && !agreed()? {
        bail!("nothing was installed; needed: {}", names.join(" "));
    }
    apt::install(&release, &names)?;
    let still: Vec<String> = self::missing(purposes)
        .into_iter()
        .map(|one| format!("{} ({})", one.package, one.sought))
        .collect();
    if !still.is_empty() {
        bail!("installed, but still missing: {}", still.join(", "));
    }
    Ok(())
}

fn agreed() -> Result<bool> {
    eprint!("lab: install them now? [Y/n] ");
    std::io::stderr().flush().context("cannot ask")?;
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .context("cannot read the answer")?;
    Ok(matches!(answer.trim(), "" | "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu_are_understood() {
        let debian = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright\n";
        assert_eq!(parse_qemu_major(debian), Some(10));
        assert_eq!(
            parse_qemu_major("qemu-storage-daemon version 7.2.15\n"),
            Some(7)
        );
        assert_eq!(parse_qemu_major("sh: not found"), None);
    }

    #[test]
    fn a_program_that_is_nowhere_is_missing() {
        assert!(Sign::Program("sh").lacking().is_none());
        let sought = Sign::Program("no-such-program-anywhere").lacking();
        assert!(sought.expect("it is nowhere").contains("no-such-program"));
    }

    #[test]
    fn only_the_library_itself_counts_as_libclang() {
        assert!(is_libclang("libclang.so"));
        assert!(is_libclang("libclang-14.so.1"));
        assert!(is_libclang("libclang.so.19"));
        assert!(!is_libclang("libclang-cpp.so.14"));
    }
}
