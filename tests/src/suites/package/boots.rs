//! A Debian with systemd boots in User Mode Linux, mounts an export from fstab, writes all the time, has its server
//! restarted, killed and stopped under the writer, and shuts down.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::shell::Shell;

use super::tree::{Kind, Tree};
use crate::kernel::Kernel;
use crate::package;
use crate::test::Context;

/// What runs in it; the lines that it prints are checked here.
const SCRIPT: &str = include_str!("boot-test.sh");

/// The units that start it.
const UNIT: &str = "[Unit]\nRequiresMountsFor=/data\n[Service]\nExecStart=/usr/bin/boot-test\n\
                    StandardOutput=journal+console\n";

/// As the operations guide has it.
const FSTAB: &str =
    "/dev/disk/by-id/ublkup-disk /data ext4 _netdev,x-systemd.after=ublkup.service 0 2\n";

const CONFIG: &str = "[[export]]\nspec = \"disk=file:/srv/disk.img\"\n";

/// What each boot has to say, once.
const SAYS: [&str; 8] = [
    "CHECK-OK",
    "LINK-OK",
    "RESTARTED 0",
    "GOES-ON after restart",
    "GOES-ON after kill",
    "GOES-ON after stop",
    "WRITTEN ",
    "Power down",
];

/// What it must not say. The kernel and systemd say these.
const NEVER: [&str; 7] = [
    "CHECK-LOST",
    "WRITER-FAILED",
    "I/O error",
    "Aborting journal",
    "timed out",
    "ordering cycle",
    "Kernel panic",
];

/// Ten times: the export has what was flushed before the last shutdown, and no shutdown hangs.
pub(super) fn ten_times(cx: &Context, suite: &str) -> Result<()> {
    let deb = package::build(&cx.paths.repo, 1)?.deb;
    let tree = Tree::new(cx, suite, Kind::Bootable)?;
    tree.install(&deb)?;
    tree.run(&["truncate", "-s", "64M", "/srv/disk.img"])?;
    tree.run(&["mkfs.ext4", "-q", "-F", "/srv/disk.img"])?;
    fs::create_dir(tree.path("data"))?;
    fs::create_dir(tree.path("manual"))?;
    fs::write(tree.path("etc/fstab"), FSTAB)?;
    fs::write(tree.path("etc/ublkup/ublkup.toml"), CONFIG)?;
    fs::write(tree.path("usr/bin/boot-test"), SCRIPT)?;
    fs::set_permissions(
        tree.path("usr/bin/boot-test"),
        fs::Permissions::from_mode(0o755),
    )?;
    let units = tree.path("etc/systemd/system");
    fs::write(units.join("boot-test.service"), UNIT)?;
    let wanted = units.join("multi-user.target.wants");
    fs::create_dir_all(&wanted)?;
    for (unit, folder) in [
        ("ublkup.service", "/usr/lib/systemd/system"),
        ("boot-test.service", "/etc/systemd/system"),
    ] {
        symlink(Path::new(folder).join(unit), wanted.join(unit))?;
    }
    let image = cx.scratch().join("root.img");
    fs::File::create(&image)?.set_len(1 << 30)?;
    Shell::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .args([&tree.path(""), &image])
        .limit(Duration::from_secs(300))
        .run()?;
    for number in 1..=10 {
        let console = boot(cx, &image)?;
        let says = |words: &&&str| console.contains(**words);
        let missing: Vec<_> = SAYS.iter().filter(|words| !says(words)).collect();
        let wrong: Vec<_> = NEVER.iter().filter(says).collect();
        ensure!(
            missing.is_empty() && wrong.is_empty(),
            "boot {number} does not say {missing:?} and says {wrong:?}:\n{console}"
        );
        for line in console.lines().filter(|line| line.contains("WRITTEN ")) {
            println!("boot {number}: {line}");
        }
    }
    Ok(())
}

/// Boots from an image until the machine switches itself off; its console.
fn boot(cx: &Context, image: &Path) -> Result<String> {
    let uml = cx.scratch().join("uml");
    fs::create_dir_all(&uml)?;
    let finished = Shell::new(cx.paths.kernel(Kernel::Uml)?)
        .arg(format!("ubd0={}", image.display()))
        .args(["root=/dev/ubda", "rw", "mem=512M", "seccomp=on", "ncpus=1"])
        .args(["con=null", "ssl=null", "con0=null,fd:2", "loglevel=4"])
        .arg(format!("uml_dir={}/", uml.display()))
        .env("TMPDIR", cx.scratch())
        .limit(Duration::from_secs(300))
        .finish()
        .context("it does not boot and shut down")?;
    Ok(finished.stdout + &finished.stderr)
}
