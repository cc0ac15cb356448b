//! What tests of the launcher and of recipes need: servers of disks that boot, commands, guests.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Pid;
use testkit::server::Server;
use testkit::shell::Finished;

use crate::kernel::Kernel;
use crate::kit::boot_sector::{self, Guest, OPTIONS, SECTOR_BYTES};
use crate::machine::Qemu;
use crate::test::Context;

/// Serves `names` as memory disks of 8 MiB with ublk doors, each with a boot sector on it.
pub(in crate::suites) fn serve(cx: &Context, names: &[&str], more: &[&str]) -> Result<Server> {
    let disks = names.iter().map(|name| format!("{name}=mem:8M"));
    let serve = cx.serve().ublk("yes").args(["--queues", "1"]).args(more);
    let server = serve.args(disks).start()?;
    for device in server.block_devices() {
        write_sector(&device)?;
    }
    Ok(server)
}

pub(in crate::suites) fn write_sector(device: &Path) -> Result<()> {
    let disk = OpenOptions::new().write(true).open(device)?;
    disk.write_all_at(&boot_sector::sector(), 0)
        .and_then(|()| disk.sync_all())
        .with_context(|| format!("cannot write {}", device.display()))
}

/// Sector 1 through the page cache: what a program on the host sees.
pub(super) fn second_sector(device: &Path) -> Result<Vec<u8>> {
    let mut sector = vec![0; SECTOR_BYTES];
    File::open(device)
        .and_then(|disk| disk.read_exact_at(&mut sector, SECTOR_BYTES as u64))
        .with_context(|| format!("cannot read {}", device.display()))?;
    Ok(sector)
}

pub(in crate::suites) fn expect_written(device: &Path) -> Result<()> {
    ensure!(
        second_sector(device)? == boot_sector::sector(),
        "what the guest wrote is not on {}",
        device.display()
    );
    Ok(())
}

/// A command that finds `ublkup` and the test's runtime directory.
pub(super) fn command(cx: &Context, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut path = OsString::from(cx.paths.server.parent().unwrap_or(Path::new(".")));
    path.push(":/usr/sbin:/sbin:");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command
        .env("PATH", path)
        .env("UBLKUP_RUNTIME_DIR", cx.run_dir())
        .env("MEMORY", "64M");
    command
}

pub(in crate::suites) fn recipe(cx: &Context, name: &str) -> Command {
    command(cx, cx.paths.repo.join("qemu-config").join(name))
}

/// `ublkup qemu`, on a PC without much.
pub(in crate::suites) fn launcher(cx: &Context, args: &[&str]) -> Command {
    let mut launcher = command(cx, &cx.paths.server);
    launcher
        .arg("qemu")
        .args(args)
        .args(["--", "qemu-system-x86_64", "-m", "64"])
        .args(OPTIONS);
    launcher
}

pub(in crate::suites) fn boot(cx: &Context, command: &mut Command) -> Result<Guest> {
    Guest::boot(command, cx.patience(45))
}

/// The command fails with this exit code and says why.
pub(super) fn expect_refusal(command: &mut Command, code: i32, says: &str) -> Result<()> {
    let refused = command.output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    let is_right = refused.status.code() == Some(code) && said.contains(says);
    ensure!(is_right, "{refused:?}");
    Ok(())
}

pub(in crate::suites) fn expect(finished: &Finished, code: i32, says: &str) -> Result<()> {
    let said = finished.tail();
    ensure!(
        finished.code() == code && said.contains(says),
        "code {} and {said:?} instead of {code} and {says:?}",
        finished.code()
    );
    Ok(())
}

/// The only child of a process.
pub(in crate::suites) fn child_of(parent: u32) -> Result<Pid> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name();
        // Others come and go meanwhile.
        let (Some(Ok(pid)), Ok(status)) = (
            name.to_str().map(str::parse::<i32>),
            fs::read_to_string(entry.path().join("status")),
        ) else {
            continue;
        };
        let mut lines = status.lines();
        if lines.any(|line| line.strip_prefix("PPid:").map(str::trim) == Some(&parent.to_string()))
        {
            children.push(pid);
        }
    }
    let [child] = children[..] else {
        bail!("process {parent} has the children {children:?}");
    };
    Pid::from_raw(child).context("no process id")
}

/// Linux in QEMU, started by a recipe.
pub(in crate::suites) fn linux(cx: &Context, name: &str, device: &Path) -> Result<Qemu> {
    let kernel = cx.paths.kernel(Kernel::X86)?;
    let script = cx.paths.repo.join("qemu-config").join(name);
    let settings = recipe(cx, name);
    let mut guest = Qemu::new(kernel)
        .processors(1)
        .memory_mib(384)
        .recipe(&script)
        .env("DEVICE", device);
    for (variable, value) in settings.get_envs() {
        if let Some(value) = value.filter(|_| variable != "MEMORY") {
            guest = guest.env(variable, value);
        }
    }
    Ok(guest)
}

/// Serves a file as the export `disk` with a block device, which outlives its server.
pub(in crate::suites) fn serve_file(cx: &Context, image: &Path) -> Result<Server> {
    let args = ["--queues", "1", "--reconnect-grace", "120"];
    let disk = format!("disk=file:{}", image.display());
    cx.serve().ublk("yes").args(args).arg(disk).start()
}
