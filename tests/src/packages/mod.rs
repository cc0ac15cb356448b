//! What has to be installed, what is missing, and how it comes: through apt on Debian, by a clear
//! message elsewhere.

pub mod apt;
pub mod crates;
pub mod guest_kernel;
pub mod unpacked;

use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use testkit::shell::sh;

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
    /// Building fuzz targets, beyond what the server needs.
    Fuzz,
    /// Building packages and installing them in a fresh system.
    Package,
}

impl Purpose {
    /// All of them.
    pub const ALL: [Purpose; 6] = [KernelBuild, ServerBuild, Tests, Bench, Fuzz, Package];
}

use Purpose::{Bench, Fuzz, KernelBuild, Package, ServerBuild, Tests};

/// Each Debian package, and a shell command that succeeds where its content is there. A bare word is
/// a program to be found.
const NEEDED: [(Purpose, &str, &str); 39] = [
    (KernelBuild, "make", "make"),
    (KernelBuild, "gcc", "gcc"),
    (KernelBuild, "flex", "flex"),
    (KernelBuild, "bison", "bison"),
    (KernelBuild, "bc", "bc"),
    (KernelBuild, "cpio", "cpio"),
    (KernelBuild, "kmod", "depmod"),
    (KernelBuild, "patch", "patch"),
    (KernelBuild, "perl", "perl"),
    (KernelBuild, "python3", "python3"),
    (KernelBuild, "xz-utils", "xz"),
    (KernelBuild, "binutils", "ld"),
    (KernelBuild, "libelf-dev", "test -e /usr/include/libelf.h"),
    (
        KernelBuild,
        "libssl-dev",
        "test -e /usr/include/openssl/ssl.h",
    ),
    (KernelBuild, "libc6-dev", "test -e /usr/include/stdio.h"),
    // For the kernel's own test programs.
    (
        KernelBuild,
        "libcap-dev",
        "test -e /usr/include/sys/capability.h",
    ),
    (ServerBuild, "gcc", "cc"),
    (ServerBuild, "libclang-dev", LIBCLANG),
    (ServerBuild, "libc6-dev", "test -e /usr/include/stdio.h"),
    (Tests, "fio", "fio"),
    (Tests, "e2fsprogs", "mkfs.ext4"),
    (Tests, "xfsprogs", "mkfs.xfs"),
    (Tests, "strace", "strace"),
    (Tests, "iproute2", "ip"),
    (Tests, "udev", "udevadm"),
    // For the kernel's own ublk tests.
    (Tests, "fdisk", "sfdisk"),
    // Before version 10 they lack devices and options that the tests use.
    (
        Tests,
        "qemu-system-x86",
        "qemu-system-x86_64 --version | grep -Eq 'version [1-9][0-9]'",
    ),
    (
        Tests,
        "qemu-utils",
        "qemu-storage-daemon --version | grep -Eq 'version [1-9][0-9]'",
    ),
    (Tests, "libvirt-clients", "virt-xml-validate"),
    (Tests, "libxml2-utils", "xmllint"),
    (Tests, "systemd", "systemd-analyze"),
    (Bench, "linux-perf", "perf"),
    (Bench, "strace", "strace"),
    (Bench, "qemu-block-extra", QEMU_RBD),
    (Fuzz, "g++", "c++"),
    (Package, "binutils", "strip"),
    (Package, "dpkg-dev", "dpkg-shlibdeps"),
    (Package, "rpm", "rpmbuild"),
    (Package, "mmdebstrap", "mmdebstrap"),
];

/// QEMU's driver for images of Ceph.
const QEMU_RBD: &str = "ls /usr/lib/*/qemu/block-rbd.so";

/// The library as bindgen looks for it, and the compiler's own headers (`stddef.h` and the like), which
/// the library does not come with.
const LIBCLANG: &str = "test -n \"$LIBCLANG_PATH\" || { \
    ls /usr/lib /usr/lib64 /usr/lib/*-linux-gnu /usr/lib/llvm*/lib 2>/dev/null \
    | grep -Eq '^libclang(-1[0-9.]*)?[.]so' && \
    ls /usr/lib*/clang/*/include/stddef.h /usr/lib/llvm*/lib/clang/*/include/stddef.h 2>/dev/null \
    | grep -q . ; }";

/// Whether a shell command succeeds, with the directories in which only root looks for programs.
fn is_there(test: &str) -> bool {
    let test = match test.contains(' ') {
        true => test.to_owned(),
        false => format!("command -v {test}"),
    };
    sh(&format!("PATH=$PATH:/usr/sbin:/sbin; {test}"))
        .run()
        .is_ok()
}

/// The packages that are missing for these purposes, each once.
pub fn missing(purposes: &[Purpose]) -> Vec<&'static str> {
    let mut missing = Vec::new();
    for (purpose, package, test) in NEEDED {
        if purposes.contains(&purpose) && !missing.contains(&package) && !is_there(test) {
            missing.push(package);
        }
    }
    missing
}

/// Installs what is missing for these purposes. Says what that is, and asks if there is a terminal and
/// `yes` was not given.
pub fn ensure(purposes: &[Purpose], yes: bool) -> Result<()> {
    let missing = missing(purposes);
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    eprintln!("lab: missing on this machine: {names}");
    if apt::codename().is_none() {
        bail!("please install what these Debian packages contain, then try again: {names}");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("not root: please run `cargo lab setup` as root, or install: {names}");
    }
    if !yes && std::io::stdin().is_terminal() && !agreed()? {
        bail!("nothing was installed; needed: {names}");
    }
    apt::install(&missing)?;
    let still = self::missing(purposes);
    if !still.is_empty() {
        bail!("installed, but still missing: {}", still.join(" "));
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
    fn a_program_that_is_nowhere_is_missing() {
        assert!(is_there("sh"));
        assert!(!is_there("no-such-program-anywhere"));
        assert!(!is_there("test -e /no/such/file"));
    }

    #[test]
    fn only_the_library_itself_counts_as_libclang() {
        // In the place of what lists the directories.
        let with = |file: &str| {
            is_there(&format!(
                "ls() {{ echo {file}; }}; LIBCLANG_PATH=; {LIBCLANG}"
            ))
        };
        for file in ["libclang.so", "libclang-14.so.1", "libclang.so.19"] {
            assert!(with(file), "{file}");
        }
        assert!(!with("libclang-cpp.so.14"));
    }

    #[test]
    fn an_old_qemu_is_missing() {
        let (_, _, test) = NEEDED
            .into_iter()
            .find(|(_, package, _)| *package == "qemu-system-x86")
            .expect("the tests need it");
        let with = |says: &str| {
            is_there(&test.replace("qemu-system-x86_64 --version", &format!("echo '{says}'")))
        };
        assert!(with("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"));
        assert!(!with("QEMU emulator version 7.2.15 (Debian 1:7.2+dfsg-7)"));
        assert!(!with("not found"));
    }
}
