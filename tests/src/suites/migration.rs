//! A guest that moves from one QEMU to another while it writes to its disk, by the recipes of
//! `qemu-config/`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use testkit::process;
use testkit::qmp::Qmp;
use testkit::server::{Serve, Server};
use testkit::shell::last_lines;
use testkit::wait::{until, wait_for};

use crate::kernel::Kernel;
use crate::kit::load;
use crate::test;
use crate::test::{Context, Test};

/// On the host.
pub const TESTS: &[Test] = &[
    test!(a_guest_moves_to_another_qemu_of_the_same_server).limit_s(400),
    test!(a_guest_moves_to_another_server_of_the_same_file).limit_s(400),
];

/// A server on the host.
struct Host {
    server: Server,
    socket: PathBuf,
    run: PathBuf,
}

impl Host {
    fn start(cx: &Context, name: &str, image: &Path, option: &str) -> Result<Self> {
        let storage = format!("file:{}", image.display());
        Self::with(cx, (name, cx.serve()), &storage, option)
    }

    /// With another storage than a file, and what its server needs for it.
    fn with(
        cx: &Context,
        (name, serve): (&str, Serve),
        storage: &str,
        option: &str,
    ) -> Result<Self> {
        let socket = cx.scratch().join(format!("{name}.sock"));
        let run = cx.scratch().join(format!("{name}.run"));
        let server = serve
            .env("UBLKUP_RUNTIME_DIR", &run)
            .ublk("no")
            .name("disk")
            .vhost_socket(&socket)
            .arg(option)
            .arg(storage)
            .start()?;
        Ok(Self {
            server,
            socket,
            run,
        })
    }

    fn access(&self, cx: &Context) -> Result<String> {
        let stat = cx.ublkup(&["stat", "disk", "--json"]);
        let stat = stat.env("UBLKUP_RUNTIME_DIR", &self.run).run()?;
        let stat: serde_json::Value = serde_json::from_str(&stat)?;
        let errors = &stat["vhost"]["counters"]["errors"];
        ensure!(errors == 0, "requests failed: {stat}");
        Ok(stat["access"].as_str().unwrap_or_default().to_owned())
    }
}

/// A QEMU with the guest of [`load`], or one that waits for it.
struct Guest {
    qemu: Child,
    monitor: Qmp,
    console: PathBuf,
}

impl Guest {
    /// Runs a recipe with the guest of [`load`]; `root` is a disk besides the recipe's.
    fn start(cx: &Context, name: &str, recipe: &str, disk: &Path, root: &Path) -> Result<Self> {
        let file = |kind: &str| cx.scratch().join(format!("{name}.{kind}"));
        let (console, socket, log) = (file("console"), file("qmp"), file("log"));
        let mut command = Command::new(cx.paths.repo.join("qemu-config").join(recipe));
        command
            .env("SOCKET", disk)
            .env("QMP", &socket)
            .env("FROM", moving(cx))
            .env("MEMORY", "192M")
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-accel", "tcg", "-cpu", "max", "-smp", "2"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args([
                "-chardev",
                &format!("socket,id=root,path={}", root.display()),
            ])
            .args(["-device", "vhost-user-blk-pci,chardev=root,num-queues=2"])
            .arg("-kernel")
            .arg(cx.paths.kernel(Kernel::X86)?)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 panic=-1 tsc=unstable {}",
                load::kernel_arguments().join(" ")
            ));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let mut qemu = process::spawn_bound(&mut command)?;
        let connect = || Ok(Qmp::connect(&socket).ok());
        let monitor = wait_for("QEMU's monitor answers", cx.patience(60), connect);
        let monitor = monitor.map_err(|error| {
            // Dies with us anyway.
            let _ = qemu.kill();
            error.context(fs::read_to_string(&log).unwrap_or_default())
        })?;
        Ok(Self {
            qemu,
            monitor,
            console,
        })
    }

    fn said(&self) -> Result<String> {
        let said = fs::read(&self.console)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .context("no console")?;
        ensure!(
            !said.contains(load::FAILED),
            "the guest found its disk or its memory changed:\n{}",
            last_lines(&said, 10)
        );
        Ok(said)
    }

    /// Rounds that the guest has finished here, in all threads.
    fn rounds(&self) -> Result<usize> {
        Ok(self.said()?.matches(load::ROUND).count())
    }

    fn wait_rounds(&self, cx: &Context, more: usize) -> Result<()> {
        let wanted = self.rounds()? + more;
        until("the guest goes on", cx.patience(120), || {
            Ok(self.rounds()? >= wanted)
        })
        .with_context(|| last_lines(&self.said().unwrap_or_default(), 20))
    }

    /// Ends QEMU as a manager does after a migration.
    fn quit(mut self, cx: &Context) -> Result<()> {
        self.monitor.command("quit", json!({}))?;
        let ended = process::wait_limited(&mut self.qemu, cx.patience(30))?;
        ensure!(ended.is_some_and(|status| status.success()), "{ended:?}");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _gone = self.qemu.kill();
        let _stuck = process::wait_limited(&mut self.qemu, Duration::from_secs(5));
    }
}

/// Where the target waits.
fn moving(cx: &Context) -> String {
    format!("unix:{}", cx.scratch().join("moving").display())
}

/// How fast memory is sent, and how long the guest may stand still in the end.
fn pace(from: &mut Guest, bytes_per_second: u64, milliseconds: u64) -> Result<()> {
    let parameters = json!({
        "max-bandwidth": bytes_per_second,
        "downtime-limit": milliseconds,
    });
    from.monitor.command("migrate-set-parameters", parameters)?;
    Ok(())
}

/// Moves the guest of `from` to `to`, under way all the time. Returns whether it took as long as it was
/// meant to: all that the guest's disk writes has to be sent again and again.
fn migrate(cx: &Context, from: &mut Guest, to: &mut Guest) -> Result<bool> {
    // A first pass over all memory, then so slowly that the second does not end before the guest has read
    // into every page again, then as fast as it goes.
    pace(from, 32 << 20, 1)?;
    from.monitor
        .command("migrate", json!({ "uri": moving(cx) }))?;
    let (mut slow_since, mut ending) = (None, false);
    until("the migration ends", cx.patience(120), || {
        let state = from.monitor.command("query-migrate", json!({}))?;
        let passes = state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        let rounds = from.rounds()?;
        match (state["status"].as_str(), slow_since) {
            (Some("completed"), _) => {
                println!("migrated: {}", state["ram"]);
                return Ok(true);
            }
            (Some("failed" | "cancelled"), _) => bail!("the migration failed: {state}"),
            (_, None) if passes >= 2 => {
                pace(from, 2 << 20, 1)?;
                slow_since = Some(rounds);
            }
            (_, Some(since)) if !ending && rounds >= since + 8 => {
                pace(from, 1 << 30, 10_000)?;
                ending = true;
            }
            _ => {}
        }
        Ok(false)
    })?;
    until("the guest goes on", cx.patience(120), || {
        let state = to.monitor.command("query-status", json!({}))?;
        Ok(state["running"] == true)
    })?;
    Ok(ending)
}

/// The images: the guest's root, and the disk that it loads.
fn images(cx: &Context) -> Result<[PathBuf; 2]> {
    let (root, disk) = (cx.scratch().join("root.img"), cx.scratch().join("disk.img"));
    load::make_root(&root, cx.scratch())?;
    File::create(&disk)?.set_len(load::DISK_BYTES)?;
    Ok([root, disk])
}

fn moves(cx: &Context, root: &Host, from: &Host, to: &Host) -> Result<()> {
    let (recipes, root) = (["migration-source.sh", "migration-target.sh"], &root.socket);
    let mut source = Guest::start(cx, "source", recipes[0], &from.socket, root)?;
    // Two rounds of all threads: every page of their memory has been read into before.
    source.wait_rounds(cx, 8)?;
    ensure!(from.access(cx)? == "upgraded");
    let mut target = Guest::start(cx, "target", recipes[1], &to.socket, root)?;
    source.wait_rounds(cx, 1)?;
    let long = migrate(cx, &mut source, &mut target)?;
    ensure!(to.access(cx)? == "upgraded", "{}", to.access(cx)?);
    target.wait_rounds(cx, 8)?;
    ensure!(long, "it ended too soon to prove anything");
    source.said()?;
    source.quit(cx)?;
    ensure!(to.access(cx)? == "upgraded", "{}", to.access(cx)?);
    target.wait_rounds(cx, 8)?;
    target.quit(cx)
}

fn a_guest_moves_to_another_qemu_of_the_same_server(cx: &Context) -> Result<()> {
    let [root, disk] = images(cx)?;
    let root = Host::start(cx, "root", &root, "--read-only")?;
    let host = Host::start(cx, "disk", &disk, "--migration")?;
    moves(cx, &root, &host, &host)?;
    host.server.stop()?;
    root.server.stop().map(drop)
}

fn a_guest_moves_to_another_server_of_the_same_file(cx: &Context) -> Result<()> {
    let [root, disk] = images(cx)?;
    let root = Host::start(cx, "root", &root, "--read-only")?;
    let [from, to] = ["from", "to"].map(|name| Host::start(cx, name, &disk, "--migration"));
    moves_between(cx, root, (from?, to?))
}

/// Moves a guest between servers of one storage, each of which is started by what it is given.
pub fn a_guest_moves_between_servers(
    cx: &Context,
    storage: &str,
    serve: impl Fn() -> Serve,
) -> Result<()> {
    let [root, _] = images(cx)?;
    let root = Host::start(cx, "root", &root, "--read-only")?;
    let [from, to] =
        ["from", "to"].map(|name| Host::with(cx, (name, serve()), storage, "--migration"));
    moves_between(cx, root, (from?, to?))
}

fn moves_between(cx: &Context, root: Host, (from, to): (Host, Host)) -> Result<()> {
    moves(cx, &root, &from, &to)?;
    // It went away from there and did not come back. That server does not know where to, and keeps the disk for a while for
    // a target of its own.
    until("the disk is free there", cx.patience(60), || {
        Ok(from.access(cx)? == "free")
    })?;
    for host in [from, to, root] {
        host.server.stop()?;
    }
    Ok(())
}
