//! Servers that are killed, or make way for others, again and again, under clients that verify: what the
//! clients notice of it is a pause. How long it was is told, and nothing depends on it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use testkit::random::Random;
use testkit::server::{Serve, Server};
use testkit::shell::Shell;

use super::hammer::{Hammer, Hammered, prepare_image, tell_guest_to_stop};
use super::io::{open_direct, read_direct};
use crate::kernel::Kernel;
use crate::machine::{Board, Machine, Qemu};
use crate::report::line;
use crate::test;
use crate::test::{Context, Test};

/// Of the vhost door, on the host.
pub const VHOST_TESTS: &[Test] = &[
    test!(a_guest_verifies_its_disk_while_ten_servers_are_killed).limit_s(300),
    test!(a_guest_verifies_its_disk_while_servers_make_way_for_others).limit_s(300),
    test!(a_guest_verifies_its_disk_while_a_hundred_servers_are_killed)
        .limit_s(1200)
        .full(),
];

/// Of the ublk door and of both, in User Mode Linux.
pub const BLOCK_TESTS: &[Test] = &[
    test!(a_block_device_is_verified_while_ten_servers_are_killed).limit_s(200),
    test!(a_block_device_is_verified_while_a_hundred_servers_are_killed)
        .limit_s(900)
        .full(),
    test!(both_doors_are_read_while_servers_are_killed).limit_s(400),
    test!(both_doors_are_used_while_servers_make_way_for_others).limit_s(400),
];

const DISK_BYTES: u64 = 96 << 20;

/// A client's way to the disk.
fn hammer(device: impl Into<PathBuf>, read_only: bool) -> Hammer {
    Hammer {
        device: device.into(),
        size_bytes: DISK_BYTES,
        read_only,
    }
}

/// An export that is killed and served again.
struct Mortal<'a> {
    cx: &'a Context,
    image: PathBuf,
    socket: PathBuf,
    block_door: bool,
    read_only: bool,
    random: Random,
}

impl<'a> Mortal<'a> {
    fn new(cx: &'a Context) -> Result<Self> {
        let image = cx.scratch().join("disk.img");
        File::create(&image)?.set_len(DISK_BYTES)?;
        Ok(Self {
            cx,
            image,
            socket: cx.scratch().join("disk.sock"),
            block_door: false,
            read_only: false,
            random: Random(7),
        })
    }

    fn serve(&self) -> Serve {
        let serve = self
            .cx
            .serve()
            .env("UBLKUP_RUNTIME_DIR", self.cx.scratch().join("run"))
            .ublk(if self.block_door { "yes" } else { "no" })
            .args(["--reconnect-grace", "120"])
            .name("disk")
            .vhost_socket(&self.socket)
            .arg(format!("file:{}", self.image.display()));
        match self.read_only {
            true => serve.arg("--read-only"),
            false => serve,
        }
    }

    /// Kills the server so often, each at another time of its life, and starts another one each time;
    /// the last one.
    fn kill(&mut self, mut server: Server, kills: usize) -> Result<Server> {
        for kill in 1..=kills {
            let life_ms = 50 + self.random.below(300);
            thread::sleep(Duration::from_millis(life_ms));
            server.kill()?;
            // Some die before they are ready, with one door open and not the other, or while they
            // take over what the one before has left.
            if kill % 3 == 0 {
                let young = self.serve().launch()?;
                thread::sleep(Duration::from_micros(self.random.below(40_000)));
                young.kill()?;
            }
            server = self
                .serve()
                .start()
                .with_context(|| format!("after kill {kill}"))?;
        }
        // The last one is waited for, too.
        thread::sleep(Duration::from_secs(1));
        Ok(server)
    }
}

impl Mortal<'_> {
    /// Lets the server make way for another one so often; the last one. Each one serves the clients
    /// before the next one comes.
    fn replace(&self, mut server: Server, times: usize) -> Result<Server> {
        self.await_clients()?;
        for time in 1..=times {
            let next = (self.serve().arg("--take-over").start())
                .with_context(|| format!("the next server, number {time}"))?;
            let (status, log) = server.wait()?;
            ensure!(
                status.success() && log.contains("left to another server"),
                "server {time} ended with {status}:\n{log}"
            );
            server = next;
            self.await_clients()
                .with_context(|| format!("server {time} said:\n{}", server.log()))?;
        }
        Ok(server)
    }

    /// Waits until the server has done something for each of its clients, and for none in vain.
    fn await_clients(&self) -> Result<()> {
        let deadline = Instant::now() + self.cx.patience(60);
        loop {
            let stat = Shell::new(&self.cx.paths.server)
                .args(["stat", "disk", "--json"])
                .env("UBLKUP_RUNTIME_DIR", self.cx.scratch().join("run"))
                .run()?;
            let stat: serde_json::Value = serde_json::from_str(&stat)?;
            let done = |door: &str, what: &str| stat[door]["counters"][what].as_u64().unwrap_or(0);
            for door in ["ublk", "vhost"] {
                ensure!(done(door, "errors") == 0, "requests failed: {stat}");
            }
            let writes = stat["access"] == "upgraded" && done("vhost", "writes") > 10;
            if writes && (done("ublk", "reads") > 10 || !self.block_door) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "a client does nothing: {stat}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn deaths(kills: usize) -> usize {
    kills + kills / 3
}

const REPLACED: &str = "made way for others";

fn tell_killed(who: &str, kills: usize, hammered: &Hammered) -> Result<()> {
    tell(who, deaths(kills), "were killed", hammered)
}

/// Says what a client noticed of so many servers of whom something became.
fn tell(who: &str, servers: usize, became: &str, hammered: &Hammered) -> Result<()> {
    line(&hammered.tell(who, servers, became));
    ensure!(
        hammered.rounds > 0 && hammered.probes > 0,
        "too little was done: {hammered:?}"
    );
    Ok(())
}

fn stop(server: Server) -> Result<()> {
    let log = server.stop()?;
    ensure!(!log.contains("panicked"), "{log}");
    Ok(())
}

/// A client on this side of a machine, and one in it.
fn in_guest(
    guest: &mut Machine,
    cx: &Context,
    hammer: &Hammer,
    kill: impl FnOnce() -> Result<Server>,
) -> Result<(Hammered, Server)> {
    let exchange = guest.exchange();
    let group = i32::try_from(guest.pid()).ok().and_then(Pid::from_raw);
    thread::scope(|scope| {
        let running =
            scope.spawn(|| guest.run_step::<_, Hammered>(&cx.paths, "hammer_disk", hammer));
        let killed = kill();
        if let (Err(_), Some(group)) = (&killed, group) {
            // The guest would wait for its disk for ever.
            let _gone = kill_process_group(group, Signal::KILL);
        }
        tell_guest_to_stop(&exchange)?;
        let hammered = running.join().map_err(|_| anyhow!("the step panicked"))?;
        let killed = killed?;
        Ok((hammered?, killed))
    })
}

/// A guest with two processors and nobody else has the disk while something happens to its server.
fn guest_verifies(
    cx: &Context,
    happens: impl FnOnce(&mut Mortal<'_>, Server) -> Result<Server>,
) -> Result<Hammered> {
    let mut export = Mortal::new(cx)?;
    let server = export.serve().start()?;
    let qemu = reconnecting(cx, &export.socket, Board::Q35)?.processors(2);
    let mut guest = Machine::boot(&qemu, &cx.paths, "survive")?;
    let disk = hammer("/dev/vda", false);
    let (hammered, server) = in_guest(&mut guest, cx, &disk, || happens(&mut export, server))?;
    guest.power_off();
    stop(server)?;
    Ok(hammered)
}

fn guest_survives(cx: &Context, kills: usize) -> Result<()> {
    let hammered = guest_verifies(cx, |export, server| export.kill(server, kills))?;
    tell_killed("vhost door", kills, &hammered)
}

fn a_guest_verifies_its_disk_while_ten_servers_are_killed(cx: &Context) -> Result<()> {
    guest_survives(cx, 10)
}

fn a_guest_verifies_its_disk_while_a_hundred_servers_are_killed(cx: &Context) -> Result<()> {
    guest_survives(cx, 100)
}

fn a_guest_verifies_its_disk_while_servers_make_way_for_others(cx: &Context) -> Result<()> {
    let times = 10;
    let hammered = guest_verifies(cx, |export, server| export.replace(server, times))?;
    tell("vhost door", times, REPLACED, &hammered)
}

/// A guest that connects again at once.
fn reconnecting(cx: &Context, socket: &Path, board: Board) -> Result<Qemu> {
    let device = match board {
        Board::Q35 => "vhost-user-blk-pci,chardev=disk",
        Board::Microvm => "vhost-user-blk,chardev=disk",
    };
    Ok(Qemu::new(cx.paths.kernel(Kernel::X86)?)
        .board(board)
        .memory_mib(512)
        .argument("-chardev")
        .argument(format!(
            "socket,id=disk,path={},reconnect-ms=100",
            socket.display()
        ))
        .argument("-device")
        .argument(device))
}

fn block_device_survives(cx: &Context, kills: usize) -> Result<()> {
    let mut export = Mortal::new(cx)?;
    export.block_door = true;
    let server = export.serve().start()?;
    let device = server.block_device()?;
    let disk = hammer(&device, false);
    let over = AtomicBool::new(false);
    let (hammered, server) = beside(cx, &disk, &over, || export.kill(server, kills))?;
    tell_killed("ublk door", kills, &hammered)?;
    ensure!(
        server.block_device()? == device,
        "{} was not taken over",
        device.display()
    );
    stop(server)
}

/// A client in this process, while something happens.
fn beside<T>(
    cx: &Context,
    hammer: &Hammer,
    over: &AtomicBool,
    happens: impl FnOnce() -> Result<T>,
) -> Result<(Hammered, T)> {
    thread::scope(|scope| {
        let running = scope.spawn(|| hammer.run(cx, over));
        let happened = happens();
        over.store(true, Ordering::Relaxed);
        // If there is no server, fio ends by its limit.
        let hammered = running.join().map_err(|_| anyhow!("the client panicked"))?;
        let happened = happened?;
        Ok((hammered?, happened))
    })
}

fn a_block_device_is_verified_while_ten_servers_are_killed(cx: &Context) -> Result<()> {
    block_device_survives(cx, 10)
}

fn a_block_device_is_verified_while_a_hundred_servers_are_killed(cx: &Context) -> Result<()> {
    block_device_survives(cx, 100)
}

/// A read-only export serves both at once: a program at the block device and a guest.
fn both_doors_are_read_while_servers_are_killed(cx: &Context) -> Result<()> {
    let kills = 6;
    let mut export = Mortal::new(cx)?;
    (export.block_door, export.read_only) = (true, true);
    prepare_image(&export.image, DISK_BYTES)?;
    let server = export.serve().start()?;
    let device = server.block_device()?;
    let qemu = reconnecting(cx, &export.socket, Board::Microvm)?.processors(1);
    let mut guest = Machine::boot(&qemu, &cx.paths, "survive-both")?;
    let over = AtomicBool::new(false);
    let (beside, (inside, server)) = beside(cx, &hammer(&device, true), &over, || {
        in_guest(&mut guest, cx, &hammer("/dev/vda", true), || {
            // The guest's fio has started by then.
            thread::sleep(Duration::from_secs(3));
            export.kill(server, kills)
        })
    })?;
    tell_killed("both, at the block device", kills, &beside)?;
    tell_killed("both, in the guest", kills, &inside)?;
    guest.power_off();
    ensure!(
        server.block_device()? == device,
        "{} was not taken over",
        device.display()
    );
    stop(server)
}

/// Where nobody writes while the disk is hammered, and what is there.
const KNOWN_AT: u64 = DISK_BYTES - (2 << 20);

fn known() -> Vec<u8> {
    Random(9).bytes(64 << 10)
}

/// Reads what is known from the block device, all the time; how often.
fn read_known(device: &Path, over: &AtomicBool) -> Result<u64> {
    let (disk, known) = (open_direct(device)?, known());
    let mut reads = 0;
    while !over.load(Ordering::Relaxed) {
        let got = read_direct(&disk, KNOWN_AT, known.len())
            .with_context(|| format!("at the block device, after {reads} reads"))?;
        ensure!(got == known, "read {reads} at the block device is wrong");
        reads += 1;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(reads)
}

/// A guest has the disk and writes, a program reads the block device; neither meets an error.
fn both_doors_are_used_while_servers_make_way_for_others(cx: &Context) -> Result<()> {
    let times = 5;
    let mut export = Mortal::new(cx)?;
    export.block_door = true;
    let image = File::options().write(true).open(&export.image)?;
    image.write_all_at(&known(), KNOWN_AT)?;
    let server = export.serve().start()?;
    let device = server.block_device()?;
    let qemu = reconnecting(cx, &export.socket, Board::Microvm)?.processors(1);
    let mut guest = Machine::boot(&qemu, &cx.paths, "make-way-both")?;
    let disk = hammer("/dev/vda", false);
    let over = AtomicBool::new(false);
    let (reads, (hammered, server)) = thread::scope(|scope| {
        let reader = scope.spawn(|| read_known(&device, &over));
        let replaced = in_guest(&mut guest, cx, &disk, || export.replace(server, times));
        over.store(true, Ordering::Relaxed);
        let reads = reader.join().map_err(|_| anyhow!("the reader panicked"))?;
        let replaced = replaced?;
        anyhow::Ok((reads?, replaced))
    })?;
    tell("both doors, in the guest", times, REPLACED, &hammered)?;
    line(&format!(
        "both doors, at the block device: {reads} reads without an error"
    ));
    guest.power_off();
    ensure!(
        server.block_device()? == device,
        "{} was not taken over",
        device.display()
    );
    stop(server)
}
