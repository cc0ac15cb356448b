//! A kernel of this Debian release for emulated PCs, so that a guest needs none that was built here, and an initial RAM
//! file system that loads its modules and then mounts the host's files.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use testkit::shell::{Shell, sh};

use super::apt::Apt;
use crate::cache;

/// The package that depends on the newest kernel. The one for virtual machines, `linux-image-cloud-amd64`, has no 9p.
const NEWEST: &str = "linux-image-amd64";

/// What a guest of the lab needs that a kernel may have as modules.
const MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "virtio_blk",
    "ext4",
];

/// The first process: what the lab's own kernels do without one.
const INIT: &str = "\
#!/bin/sh
mount -t proc proc /proc
for word in $(cat /proc/cmdline); do
    case $word in
    init=*) init=${word#init=} ;;
    rootflags=*) flags=${word#rootflags=} ;;
    esac
done
for module in /modules/*; do
    insmod \"$module\" || echo \"init: cannot load $module\"
done
mount -t 9p -o \"ro,$flags\" root /root
umount /proc
exec switch_root /root \"$init\"
";

/// A kernel and what it starts with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestKernel {
    /// The image.
    pub image: PathBuf,
    /// The initial RAM file system.
    pub initramfs: PathBuf,
}

impl GuestKernel {
    /// The one in the cache, which is filled if need be.
    pub fn get() -> Result<Self> {
        // One of another recipe is another one.
        let mut recipe = DefaultHasher::new();
        (NEWEST, MODULES, INIT).hash(&mut recipe);
        let home = cache::dir()?.join(format!("guest-kernel-{:016x}", recipe.finish()));
        let _one_at_a_time = cache::lock("guest-kernel")?;
        if !home.exists() {
            make(&home).context("cannot get a kernel for guests from Debian's packages")?;
        }
        Ok(Self {
            image: home.join("vmlinuz"),
            initramfs: home.join("initramfs.cpio"),
        })
    }
}

fn make(home: &Path) -> Result<()> {
    let apt = Apt::prepare("guest-kernel", &[])?;
    let work = tempfile::tempdir_in(cache::dir()?).context("cannot make a directory")?;
    let (all, kept) = (work.path().join("all"), work.path().join("kept"));
    for package in [&apt.dependency_of(NEWEST)?, "busybox-static"] {
        let file = apt.download(package, work.path())?;
        Shell::new("dpkg-deb").arg("-x").args([&file, &all]).run()?;
    }
    let image = only(&all.join("boot"), "vmlinuz-")?;
    let modules = ["lib/modules", "usr/lib/modules"].map(|dir| all.join(dir));
    let modules = modules.into_iter().find(|dir| dir.is_dir());
    let version = only(&modules.context("the kernel's package has no modules")?, "")?;
    let root = initramfs(&all, &version)?;
    fs::create_dir(&kept)?;
    // Uncompressed, because an emulated processor would take longer than the copy.
    sh("cd \"$0\"; find . | cpio -o -H newc --quiet >\"$1\"")
        .args([&root, &kept.join("initramfs.cpio")])
        .run()?;
    fs::copy(image, kept.join("vmlinuz"))?;
    fs::rename(&kept, home).with_context(|| format!("cannot create {}", home.display()))
}

/// The only entry of a directory whose name begins so.
fn only(dir: &Path, start: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut entries = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    let entry = entries.next();
    Ok(entry
        .with_context(|| format!("no {start}* in {}", dir.display()))?
        .path())
}

/// A directory with what the guest starts with: modules in the order of their loading, programs, the first process.
fn initramfs(all: &Path, modules: &Path) -> Result<PathBuf> {
    // kmod looks for modules below lib of a directory.
    let base = modules
        .ancestors()
        .nth(3)
        .context("no directory of modules")?;
    let version = modules.file_name().context("modules without a version")?;
    // Their directory is not in the path of ordinary users.
    let admin = |script: &str| sh(&format!("PATH=$PATH:/usr/sbin:/sbin; {script}"));
    let depmod = admin("depmod -b \"$0\" \"$1\"").arg(base).arg(version);
    depmod.run()?;
    let root = all.join("initramfs");
    for dir in ["bin", "dev", "modules", "proc", "root"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let order = admin("d=$0 v=$1; shift; modprobe -d \"$d\" -S \"$v\" --show-depends --all \"$@\"")
        .arg(base)
        .arg(version)
        .args(MODULES)
        .run()?;
    for (number, module) in in_order(&order).into_iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        let name = name.trim_end_matches(".xz");
        let to = root.join(format!("modules/{number:02}-{name}"));
        match module.extension() == Some("xz".as_ref()) {
            true => drop(
                sh("xz -dc \"$0\" >\"$1\"")
                    .args([module, to.as_path()])
                    .run()?,
            ),
            false => drop(fs::copy(module, to)?),
        }
    }
    let busybox = root.join("bin/busybox");
    let found = ["bin", "usr/bin"].map(|dir| all.join(dir).join("busybox"));
    let found = found.iter().find(|file| file.exists());
    fs::copy(found.context("the package has no busybox")?, busybox)?;
    for program in [
        "sh",
        "mount",
        "umount",
        "cat",
        "echo",
        "insmod",
        "switch_root",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(program))?;
    }
    let init = root.join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    Ok(root)
}

/// The files of modules in what modprobe says is to be loaded, each once.
fn in_order(told: &str) -> Vec<&Path> {
    let mut files: Vec<&Path> = Vec::new();
    for line in told.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some("insmod")
            && let Some(file) = words.next().map(Path::new)
            && !files.contains(&file)
        {
            files.push(file);
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_once_and_after_what_they_need() {
        let told = "insmod /m/a.ko \ninsmod /m/b.ko option=1 \nbuiltin c\ninsmod /m/a.ko \n";
        assert_eq!(in_order(told), ["/m/a.ko", "/m/b.ko"].map(Path::new));
    }
}
