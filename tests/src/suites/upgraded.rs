//! The upgrade, told and measured in one Linux with the kernel series: a disk is used as a block
//! device, by a program that upgrades, by a guest of a stock QEMU on that block device, and by the same
//! guest upgraded.

mod costs;
mod findings;
mod jobs;

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::images::{self, KnownFiles};
use testkit::server::Server;
use testkit::shell::{Shell, sh};
use testkit::wait::until;

use self::costs::{SystemCalls, cpu_us};
pub use self::findings::{Bench, Findings, Load, Row, table};
use self::jobs::{Job, random_reads, upgraded_reads};
use super::guest::FilesOnDisk;
use crate::kernel::Kernel;
use crate::kit::beside::beside;
use crate::machine::{Machine, Qemu, Uml};
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] = &[test!(a_guest_upgrades_from_the_block_device_and_back).limit_s(900)];

/// What runs inside User Mode Linux and in the guests inside that.
pub const STEPS: &[Test] = &[
    test!(upgrade_and_back).limit_s(700),
    test!(bench_disk).limit_s(300),
];

/// A program on the block device: fio.
pub const PROGRAM: &str = "program on block device";

/// A program that has a descriptor of the block device and upgrades: libblkio's core.
pub const PROGRAM_UPGRADED: &str = "program, upgraded";

/// A guest on the block device.
pub const GUEST: &str = "guest, virtio-blk on block device";

/// The same guest, upgraded.
pub const GUEST_UPGRADED: &str = "guest, upgraded";

const DISK_BYTES: u64 = 96 << 20;

/// Where the step tells how far it is.
const TOLD: &str = "told";

/// For how long its costs are looked at.
const WINDOW: Duration = Duration::from_secs(3);

/// The way of a request into the server.
#[derive(Clone, Copy, Debug)]
enum Door {
    Block,
    Vhost,
}

impl Door {
    /// In what `stat` prints.
    fn name(self) -> &'static str {
        match self {
            Self::Block => "ublk",
            Self::Vhost => "vhost",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Block => Self::Vhost,
            Self::Vhost => Self::Block,
        }
    }
}

/// Tells the story to `say` while it happens; fio makes these loads.
pub fn tell(cx: &Context, loads: &[Load], say: &(dyn Fn(&str) + Sync)) -> Result<Findings> {
    let kernel = cx.paths.kernel(Kernel::Uml)?;
    let mut linux = Machine::boot(&Uml::new(kernel).memory_mib(4096), &cx.paths, "upgrade")?;
    say(&format!(
        "booted User Mode Linux {} with ublk and fd addresses",
        linux.kernel()
    ));
    let told = linux.exchange().join(TOLD);
    let follow = |over: &AtomicBool| {
        follow(&told, over, say);
        Ok(())
    };
    let ((), findings) = beside(follow, || linux.run_step("upgrade_and_back", &loads))?;
    linux.power_off();
    Ok(findings)
}

/// Passes on the lines of a growing file until it is over.
fn follow(path: &Path, over: &AtomicBool, say: &dyn Fn(&str)) {
    let mut seen = 0;
    loop {
        let last = over.load(Ordering::Relaxed);
        let text = std::fs::read_to_string(path).unwrap_or_default();
        // A line that is being written has no end yet.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        text[seen..whole].lines().for_each(say);
        seen = whole;
        if last {
            return;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn a_guest_upgrades_from_the_block_device_and_back(cx: &Context) -> Result<()> {
    let findings = tell(cx, &[Load::one_by_one(16)], &|line| println!("{line}"))?;
    for line in table(&findings) {
        println!("{line}");
    }
    ensure!(findings.rows.len() == 4, "rows are missing");
    Ok(())
}

/// The story as it happens inside User Mode Linux.
struct Story<'a> {
    cx: &'a Context,
    told: File,
    disk: PathBuf,
    server: u32,
    /// Of the fio jobs.
    loads: Vec<Load>,
    rows: Vec<Row>,
}

impl Story<'_> {
    fn say(&mut self, text: &str) -> Result<()> {
        println!("{text}");
        writeln!(self.told, "{text}").context("cannot tell")
    }

    /// Reads that have come by a door.
    fn reads(&self, door: Door) -> Result<u64> {
        let reads = &self.cx.stat("disk")?[door.name()]["counters"]["reads"];
        reads.as_u64().context("stat counts no reads")
    }

    /// Measures a job that `run` runs somewhere, with each load, and adds it to the table. All its
    /// reads must reach the server by this door.
    fn measure(
        &mut self,
        what: &str,
        door: Door,
        qemu: Option<u32>,
        mut run: impl FnMut(Load) -> Result<Bench>,
    ) -> Result<()> {
        for load in self.loads.clone() {
            let other = self.reads(door.other())?;
            let (cost, bench) = beside(|_| self.processor_time(door, qemu), || run(load))?;
            // A run of its own: being watched makes it slow.
            let (calls, _) = beside(|_| self.system_calls(door, qemu), || run(load))?;
            ensure!(
                self.reads(door.other())? == other,
                "{what}: reads came by another door than {door:?}"
            );
            self.rows.push(Row {
                what: what.to_owned(),
                load,
                bench,
                server_us: cost.0,
                qemu_us: qemu.map(|_| cost.1),
                calls,
            });
        }
        Ok(())
    }

    /// Waits until a job is under way, as the door's counters show.
    fn await_load(&self, door: Door) -> Result<()> {
        let mut before = self.reads(door)?;
        until(
            &format!("reads come by {door:?}"),
            self.cx.patience(60),
            || {
                std::thread::sleep(Duration::from_millis(200));
                let now = self.reads(door)?;
                // More than a program that starts reads from a disk.
                Ok(now - std::mem::replace(&mut before, now) > 20)
            },
        )
    }

    /// Microseconds per read of server and QEMU.
    fn processor_time(&self, door: Door, qemu: Option<u32>) -> Result<(f64, f64)> {
        self.await_load(door)?;
        let now = || -> Result<(f64, f64, f64)> {
            let reads = self.reads(door)? as f64;
            Ok((cpu_us(self.server)?, qemu.map_or(Ok(0.0), cpu_us)?, reads))
        };
        let before = now()?;
        std::thread::sleep(WINDOW);
        let after = now()?;
        let reads = after.2 - before.2;
        ensure!(
            reads > 0.0,
            "the job ended before its processor time was known"
        );
        Ok(((after.0 - before.0) / reads, (after.1 - before.1) / reads))
    }

    /// System calls per read of server and QEMU together, by name.
    fn system_calls(&self, door: Door, qemu: Option<u32>) -> Result<Vec<(String, f64)>> {
        self.await_load(door)?;
        let counted = SystemCalls::of(self.cx, [Some(self.server), qemu])?;
        let before = self.reads(door)?;
        std::thread::sleep(WINDOW);
        let reads = self.reads(door)? - before;
        let calls = counted.end()?;
        ensure!(
            reads > 0,
            "the job ended before its system calls were counted"
        );
        let mut calls: Vec<_> = calls
            .into_iter()
            .map(|(name, count)| (name, count as f64 / reads as f64))
            .collect();
        calls.sort_by(|one, other| other.1.total_cmp(&one.1));
        Ok(calls)
    }

    fn measure_in_guest(&mut self, what: &str, door: Door, guest: &mut Machine) -> Result<()> {
        let pid = guest.pid();
        self.measure(what, door, Some(pid), |load| {
            let job = Job {
                disk: "/dev/vda".into(),
                load,
            };
            guest.run_step("bench_disk", &job)
        })
    }
}

/// A server of a memory disk, and a story about it.
fn begin<'a>(cx: &'a Context, grace: &str) -> Result<(Server, Story<'a>)> {
    let server = cx
        .serve()
        .ublk("yes")
        .args(["--name", "disk", "--reconnect-grace", grace])
        .arg(format!("mem:{DISK_BYTES}"))
        .start()?;
    let told = OpenOptions::new()
        .append(true)
        .create(true)
        .open(cx.exchange().join(TOLD))
        .context("cannot tell")?;
    let story = Story {
        cx,
        told,
        disk: server.block_device()?,
        server: server.pid(),
        loads: cx.args()?,
        rows: Vec::new(),
    };
    Ok((server, story))
}

/// Programs, without a guest. libblkio hangs up without stopping its vrings, which the server takes for
/// its death: so they have a disk of their own.
fn programs(cx: &Context) -> Result<Vec<Row>> {
    let (server, mut story) = begin(cx, "0")?;
    let (disk, pid) = (story.disk.clone(), story.server);
    let name = disk.display();
    story.say(&format!("ublkup serves a memory disk as {name}"))?;
    story.measure(PROGRAM, Door::Block, None, |load| {
        let disk = disk.clone();
        random_reads(cx, &Job { disk, load })
    })?;
    story.say("fio has read it through the block device")?;
    story.measure(PROGRAM_UPGRADED, Door::Vhost, None, |load| {
        upgraded_reads(&disk, load.depth, pid)
    })?;
    story.say("a program has upgraded from its descriptor of the block device, and read it so")?;
    server.stop()?;
    Ok(story.rows)
}

fn upgrade_and_back(cx: &Context) -> Result<()> {
    let mut rows = programs(cx)?;
    let image = cx.scratch().join("disk.ext4");
    let known = images::ext4_with_known_files(&image, DISK_BYTES, 1)?;
    let (server, mut story) = begin(cx, "60")?;
    let disk = story.disk.clone();
    sh(&format!(
        "dd if={} of={} bs=1M oflag=direct status=none",
        image.display(),
        disk.display()
    ))
    .run()?;
    story.say(&format!(
        "ublkup serves another as {}, with an ext4 file system of {} known files on it",
        disk.display(),
        known.len()
    ))?;

    let new = before(&mut story, &known)?;
    let known = known.and(new);
    let new = after(&mut story, &known)?;
    let known = known.and(new);

    cx.expect_access("block")?;
    let mounted = images::mount_ext4(&disk, &cx.scratch().join("mnt"), false)?;
    known.verify(mounted.dir())?;
    let more = KnownFiles::generate(mounted.dir(), 9)?;
    mounted.unmount()?;
    images::fsck(&disk)?;
    story.say(&format!(
        "QEMU has left: {} is writable again, holds all {} files, took {} more, and is clean",
        disk.display(),
        known.len(),
        more.len()
    ))?;
    rows.append(&mut story.rows);
    let log = server.stop()?;
    for wanted in ["upgraded: session", "the client left"] {
        ensure!(log.contains(wanted), "the server never said '{wanted}'");
    }
    cx.reply(&Findings {
        rows,
        kernel: sh("uname -r").run()?.trim().to_owned(),
        qemu: qemu_version()?,
    })
}

/// A stock QEMU whose guest has the block device as its virtio-blk disk.
fn before(story: &mut Story<'_>, known: &KnownFiles) -> Result<KnownFiles> {
    let blockdev = format!(
        "driver=host_device,filename={},node-name=disk,cache.direct=on,aio=io_uring",
        story.disk.display()
    );
    let qemu = client(story.cx)?
        .argument("-blockdev")
        .argument(blockdev)
        .argument("-device")
        .argument("virtio-blk-pci,drive=disk");
    let mut guest = Machine::boot(&qemu, &story.cx.paths, "upgrade-before")?;
    let new = add_files(&mut guest, known, 2)?;
    story.say(&format!(
        "a stock QEMU guest on the block device (virtio-blk) found them all and added {}",
        new.len()
    ))?;
    story.measure_in_guest(GUEST, Door::Block, &mut guest)?;
    guest.power_off();
    story.say("the same fio has run in the guest")?;
    Ok(new)
}

/// The same QEMU and the same disk; the path is all that leads to the server.
fn after(story: &mut Story<'_>, known: &KnownFiles) -> Result<KnownFiles> {
    let (mut guest, address) = boot_upgraded(story.cx, &story.disk, "upgrade-after")?;
    let new = add_files(&mut guest, known, 3)?;
    story.cx.expect_access("upgraded")?;
    story.say(&format!(
        "the same QEMU connected to {address}: upgraded; its guest found them all and added {}",
        new.len()
    ))?;
    let write = sh(&format!(
        "dd if=/dev/zero of={} bs=4096 count=1 oflag=direct 2>&1 || true",
        story.disk.display()
    ))
    .run()?;
    ensure!(
        write.contains("exchange"),
        "the block device took a write while upgraded: {write}"
    );
    story.say("meanwhile the block device refuses writes (EBADE, a reservation conflict)")?;
    story.measure_in_guest(GUEST_UPGRADED, Door::Vhost, &mut guest)?;
    guest.power_off();
    story.say("the same fio has run in the upgraded guest")?;
    Ok(new)
}

/// A stock QEMU that upgrades from the block device by nothing but its path; and that path.
pub(super) fn boot_upgraded(cx: &Context, disk: &Path, log: &str) -> Result<(Machine, String)> {
    sh(&format!("blockdev --flushbufs {}", disk.display())).run()?;
    let held = OpenOptions::new()
        .read(true)
        .write(true)
        .open(disk)
        .context("cannot open the block device")?;
    // For QEMU to inherit, as after a shell's redirection.
    rustix::io::fcntl_setfd(&held, rustix::io::FdFlags::empty())?;
    let address = format!("/dev/self/fd/{}/vhost-user-blk", held.as_raw_fd());
    let qemu = client(cx)?
        .argument("-chardev")
        .argument(format!("socket,id=disk,path={address},reconnect-ms=200"))
        .argument("-device")
        .argument("vhost-user-blk-pci,chardev=disk");
    let guest = Machine::boot(&qemu, &cx.paths, log)?;
    Ok((guest, address))
}

fn client(cx: &Context) -> Result<Qemu> {
    let pc = match &cx.paths.guest_kernel {
        Some(kernel) => Qemu::new(&kernel.image).initramfs(&kernel.initramfs),
        None => Qemu::new(cx.paths.kernel(Kernel::X86)?),
    };
    Ok(pc.processors(1).memory_mib(512))
}

fn add_files(guest: &mut Machine, known: &KnownFiles, seed: u64) -> Result<KnownFiles> {
    let files = FilesOnDisk {
        device: "/dev/vda".into(),
        known: known.clone(),
        seed,
    };
    guest.run_step("add_files_to_disk", &files)
}

/// Replies with the [`Bench`] of a [`Job`].
fn bench_disk(cx: &Context) -> Result<()> {
    cx.reply(&random_reads(cx, &cx.args()?)?)
}

fn qemu_version() -> Result<String> {
    let text = Shell::new("qemu-system-x86_64").arg("--version").run()?;
    let line = text.lines().next().unwrap_or_default();
    let number = line.split_whitespace().nth(3).unwrap_or(line);
    Ok(format!("QEMU {number}"))
}
