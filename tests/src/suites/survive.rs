//! Servers that are killed, or make way for others, again and again, under clients that verify: what the
//! clients notice of it is a pause. How long it was is told, and nothing depends on it.
//!
//! When servers end, and how others come, is random. A failure names the seed, which `LAB_SEED` gives to the next run.

mod client;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Signal, kill_process_group};
use testkit::random::Random;
use testkit::server::{Serve, Server};
use testkit::wait::until;

use client::Client;

use super::hammer::{Hammer, Hammered, prepare_image, tell_guest_to_stop};
use super::io::{open_direct, read_direct};
use crate::kernel::Kernel;
use crate::kit::beside::beside;
use crate::machine::{Board, Machine, Qemu};
use crate::report::line;
use crate::test;
use crate::test::{Context, Test};

/// Of the vhost door, on the host.
pub const VHOST_TESTS: &[Test] = &[
    test!(
        a_client_verifies_its_disk_while_twenty_servers_are_killed,
        |cx| client_survives(cx, 20)
    )
    .limit_s(120),
    test!(
        a_client_verifies_its_disk_while_a_thousand_servers_are_killed,
        |cx| client_survives(cx, 1000)
    )
    .limit_s(1800)
    .full(),
    test!(
        a_guest_verifies_its_disk_while_ten_servers_are_killed,
        |cx| guest_survives(cx, 10)
    )
    .limit_s(300),
    test!(a_guest_verifies_its_disk_while_servers_make_way_for_others).limit_s(300),
    test!(
        a_guest_verifies_its_disk_while_a_hundred_servers_are_killed,
        |cx| guest_survives(cx, 100)
    )
    .limit_s(1200)
    .full(),
];

/// Of the ublk door and of both, in User Mode Linux.
pub const BLOCK_TESTS: &[Test] = &[
    test!(
        a_block_device_is_verified_while_ten_servers_are_killed,
        |cx| block_device_survives(cx, 10)
    )
    .limit_s(200),
    test!(
        a_block_device_is_verified_while_a_thousand_servers_are_killed,
        |cx| block_device_survives(cx, 1000)
    )
    .limit_s(3600)
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
    seed: u64,
    random: Random,
}

impl<'a> Mortal<'a> {
    fn new(cx: &'a Context) -> Result<Self> {
        let seed = seed()?;
        Ok(Self {
            cx,
            image: cx.image(DISK_BYTES)?,
            socket: cx.scratch().join("disk.sock"),
            block_door: false,
            read_only: false,
            seed,
            random: Random(seed),
        })
    }

    fn serve(&self) -> Serve {
        let serve = self
            .cx
            .serve()
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

    /// The next server, by one command or the other.
    fn next(&mut self) -> Serve {
        match self.random.below(2) {
            0 => self.serve(),
            _ => self.cx.serve().command("recover").arg("disk"),
        }
    }

    /// Kills the server so often, each at another time of its life, and starts another one each time;
    /// the last one.
    fn kill(&mut self, mut server: Server, kills: usize) -> Result<Server> {
        for kill in 1..=kills {
            server = self
                .kill_one(server)
                .with_context(|| format!("kill {kill}, LAB_SEED={}", self.seed))?;
        }
        // The last one is waited for, too.
        thread::sleep(Duration::from_secs(1));
        Ok(server)
    }

    fn kill_one(&mut self, mut server: Server) -> Result<Server> {
        thread::sleep(Duration::from_millis(self.random.below(300)));
        // Some die while another one takes over from them, or right after that.
        if self.random.below(3) == 0 {
            let next = self.next().arg("--take-over").launch()?;
            if self.random.below(2) == 0 {
                thread::sleep(Duration::from_micros(self.random.below(80_000)));
                server.kill()?;
                server = next
                    .ready()
                    .context("a take-over from a server that died")?;
            } else {
                let next = next.ready().context("a take-over")?;
                let (status, log) = server.wait()?;
                ensure!(status.success(), "it ended with {status}:\n{log}");
                server = next;
            }
        }
        server.kill()?;
        // Some die before they are ready, with one door open and not the other, or while they
        // recover what the one before has left.
        if self.random.below(3) == 0 {
            let young = self.next().launch()?;
            thread::sleep(Duration::from_micros(self.random.below(40_000)));
            young.kill()?;
        }
        self.next().start()
    }

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
        until("each client works", self.cx.patience(60), || {
            let stat = self.cx.stat("disk")?;
            let done = |door: &str, what: &str| stat[door]["counters"][what].as_u64().unwrap_or(0);
            for door in ["ublk", "vhost"] {
                ensure!(done(door, "errors") == 0, "requests failed: {stat}");
            }
            let writes = stat["access"] == "upgraded" && done("vhost", "writes") > 10;
            Ok(writes && (done("ublk", "reads") > 10 || !self.block_door))
        })
    }
}

const REPLACED: &str = "made way for others";

fn tell_killed(who: &str, kills: usize, hammered: &Hammered) -> Result<()> {
    tell(who, kills, "were killed", hammered)
}

/// What a run decides by.
fn seed() -> Result<u64> {
    match std::env::var("LAB_SEED") {
        Ok(text) => text.parse().context("LAB_SEED is no number"),
        Err(_) => Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs()),
    }
}

/// A client on this machine, which has requests in flight when its servers die.
fn client_survives(cx: &Context, kills: usize) -> Result<()> {
    let mut export = Mortal::new(cx)?;
    let server = export.serve().start()?;
    let mut client = Client::new(&export.socket, export.seed);
    let seed = export.seed;
    let ((), server) = beside(
        |over| client.run(over).with_context(|| format!("LAB_SEED={seed}")),
        || export.kill(server, kills),
    )?;
    let done = client.done();
    line(&format!(
        "vhost door: {kills} servers were killed, {} requests on {} connections, the longest took {} ms",
        done.requests,
        done.connections,
        done.longest_wait.as_millis()
    ));
    ensure!(
        done.connections > kills as u64 / 4 && done.requests > 100,
        "too little was done: {done:?}"
    );
    client.check_image(&export.image)?;
    server.stop()?;
    let left: Vec<_> = fs::read_dir(cx.run_dir().join("exports"))?.collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
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

/// A client on this side of a machine, and one in it.
fn in_guest(
    guest: &mut Machine,
    hammer: &Hammer,
    kill: impl FnOnce() -> Result<Server>,
) -> Result<(Hammered, Server)> {
    let exchange = guest.exchange();
    let group = guest.process();
    beside(
        |_| guest.run_step::<_, Hammered>("hammer_disk", hammer),
        || {
            let killed = kill();
            if killed.is_err() {
                // The guest would wait for its disk for ever.
                let _gone = kill_process_group(group, Signal::KILL);
            }
            tell_guest_to_stop(&exchange)?;
            killed
        },
    )
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
    let (hammered, server) = in_guest(&mut guest, &disk, || happens(&mut export, server))?;
    guest.power_off();
    server.stop()?;
    Ok(hammered)
}

fn guest_survives(cx: &Context, kills: usize) -> Result<()> {
    let hammered = guest_verifies(cx, |export, server| export.kill(server, kills))?;
    tell_killed("vhost door", kills, &hammered)
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
            "socket,id=disk,path={},reconnect-ms=10",
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
    let (hammered, server) = beside(|over| disk.run(cx, over), || export.kill(server, kills))?;
    tell_killed("ublk door", kills, &hammered)?;
    ensure!(server.block_device()? == device, "another device");
    server.stop().map(drop)
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
    let outside = hammer(&device, true);
    let both = || {
        in_guest(&mut guest, &hammer("/dev/vda", true), || {
            // The guest's fio has started by then.
            thread::sleep(Duration::from_secs(3));
            export.kill(server, kills)
        })
    };
    let (outside, (inside, server)) = beside(|over| outside.run(cx, over), both)?;
    tell_killed("both, at the block device", kills, &outside)?;
    tell_killed("both, in the guest", kills, &inside)?;
    guest.power_off();
    ensure!(server.block_device()? == device, "another device");
    server.stop().map(drop)
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
    let (reads, (hammered, server)) = beside(
        |over| read_known(&device, over),
        || in_guest(&mut guest, &disk, || export.replace(server, times)),
    )?;
    tell("both doors, in the guest", times, REPLACED, &hammered)?;
    line(&format!(
        "both doors, at the block device: {reads} reads without an error"
    ));
    guest.power_off();
    ensure!(server.block_device()? == device, "another device");
    server.stop().map(drop)
}
