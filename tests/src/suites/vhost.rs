//! The vhost door on the host, used by guests: QEMU's (emulated, stock) and User Mode Linux.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use testkit::proc::Holdings;
use testkit::server::Server;
use testkit::wait::until;

use super::guest::{
    DiskFacts, WRITE_THROUGH_BLOCK_BYTES, WRITE_THROUGH_BLOCKS, write_through_data,
};
use super::io::{Exercise, all_kinds_came};
use crate::kernel::Kernel;
use crate::machine::{Board, Hypervisor, Machine, Qemu, Uml};
use crate::test;
use crate::test::{Context, Test};

const MIB: u64 = 1 << 20;

/// The table.
pub const TESTS: &[Test] = &[
    test!(a_guest_with_one_processor_verifies_a_memory_disk, |cx| {
        verify(cx, "mem:96M", &[], guest)
    })
    .limit_s(900),
    // QEMU makes a queue per processor: more queues than the server has threads.
    test!(a_guest_with_four_processors_verifies_a_file, |cx| {
        verify(cx, &cx.file(96 * MIB)?, &["--queues", "2"], |cx, host| {
            Ok(guest(cx, host)?.processors(4))
        })
    })
    .limit_s(1200),
    test!(a_microvm_verifies_a_file, |cx| {
        verify(cx, &cx.file(96 * MIB)?, &[], |cx, host| {
            Ok(guest(cx, host)?.board(Board::Microvm))
        })
    })
    .limit_s(900),
    test!(user_mode_linux_verifies_a_memory_disk, |cx| {
        verify(cx, "mem:96M", &[], uml)
    })
    .limit_s(600),
    test!(user_mode_linux_verifies_a_file, |cx| {
        verify(cx, &cx.file(96 * MIB)?, &["--queues", "1"], uml)
    })
    .limit_s(600),
    test!(what_was_written_through_is_in_the_file_after_sigkill).limit_s(400),
    test!(the_recipes_boot_guests_as_they_stand).limit_s(400),
    test!(a_guest_sees_a_read_only_disk).limit_s(300),
    test!(guests_come_and_go_and_a_second_one_is_turned_away).limit_s(600),
    test!(running_guests_see_that_their_disk_grew).limit_s(600),
];

/// A server on the host, with its socket.
struct Host {
    server: Server,
    socket: PathBuf,
}

impl Host {
    fn start(cx: &Context, spec: &str, more: &[&str]) -> Result<Self> {
        let socket = cx.scratch().join("disk.sock");
        let serve = cx.serve().ublk("no").name("disk").vhost_socket(&socket);
        let server = serve.arg(spec).args(more).start()?;
        Ok(Self { server, socket })
    }

    fn stop(self) -> Result<()> {
        self.server.stop()?;
        ensure!(!self.socket.exists(), "the socket is left");
        Ok(())
    }
}

/// Serves 96 MiB, boots a machine that has them as its first disk, and exercises that.
fn verify<H: Hypervisor>(
    cx: &Context,
    spec: &str,
    args: &[&str],
    machine: impl FnOnce(&Context, &Host) -> Result<H>,
) -> Result<()> {
    let (host, size) = (Host::start(cx, spec, args)?, 96 * MIB);
    let hypervisor = machine(cx, &host)?;
    let name = format!("verify-{}", hypervisor.name());
    let mut machine = Machine::boot(&hypervisor, &cx.paths, &name)?;
    let disk: DiskFacts = machine.run_step("describe_disk", &"vda")?;
    ensure!(
        disk.size_bytes == size && disk.block_bytes == 512 && !disk.read_only,
        "the guest sees another disk: {disk:?}"
    );
    let mut plan = Exercise::new(Path::new("/dev/vda"), size);
    plan.run_mib = 16;
    let () = machine.run_step("exercise_disk", &plan)?;
    all_kinds_came(&cx.stat("disk")?["vhost"])?;
    machine.power_off();
    host.stop()
}

fn guest(cx: &Context, host: &Host) -> Result<Qemu> {
    let kernel = cx.paths.kernel(Kernel::X86)?;
    Ok(Qemu::client(kernel, &host.socket))
}

fn uml(cx: &Context, host: &Host) -> Result<Uml> {
    let kernel = cx.paths.kernel(Kernel::Uml)?;
    Ok(Uml::new(kernel).vhost_disk(&host.socket))
}

fn running_guests_see_that_their_disk_grew(cx: &Context) -> Result<()> {
    let image = cx.image(64 * MIB)?;
    let host = Host::start(cx, &format!("file:{}", image.display()), &[])?;
    let guests: [Box<dyn Hypervisor>; 2] = [
        Box::new(guest(cx, &host)?.board(Board::Microvm)),
        Box::new(guest(cx, &host)?),
    ];
    for (guest, grown_mib) in guests.iter().zip([96, 128]) {
        let log = format!("grows-{grown_mib}-{}", guest.name());
        let mut machine = Machine::boot(&**guest, &cx.paths, &log)?;
        let told = cx
            .ublkup(&["resize", "disk", &format!("{grown_mib}M")])
            .run()?;
        ensure!(told.contains(&format!("{grown_mib}M, was")), "{told}");
        let sectors = grown_mib * MIB / 512;
        let script = format!(
            "for i in $(seq 300); do
                 [ $(cat /sys/block/vda/size) = {sectors} ] && break
                 sleep 0.1
             done
             dmesg | grep 'vda.*new size: {sectors} 512-byte'
             echo grown | dd of=/dev/vda bs=512 seek={} conv=sync,fsync",
            sectors - 1
        );
        let _: String = machine
            .run_step("run_script", &script)
            .context("the guest was not told, or cannot use the new end")?;
        machine.power_off();
        let mut last = [0; 5];
        File::open(&image)?.read_exact_at(&mut last, grown_mib * MIB - 512)?;
        ensure!(&last == b"grown", "the last sector is {last:?}");
    }
    host.stop()
}

/// And the guests come back to a server that was killed and started again.
fn the_recipes_boot_guests_as_they_stand(cx: &Context) -> Result<()> {
    let image = cx.image(64 * MIB)?;
    let spec = format!("file:{}", image.display());
    for (script, board) in [("q35.sh", Board::Q35), ("microvm.sh", Board::Microvm)] {
        let host = Host::start(cx, &spec, &[])?;
        let script = cx.paths.repo.join("qemu-config").join(script);
        let guest = guest(cx, &host)?.board(board).recipe(&script);
        let mut machine = Machine::boot(&guest, &cx.paths, &format!("recipe-{board:?}"))
            .with_context(|| script.display().to_string())?;
        let disk: DiskFacts = machine.run_step("describe_disk", &"vda")?;
        ensure!(
            disk.size_bytes == 64 * MIB,
            "{}: {disk:?}",
            script.display()
        );
        host.server.kill()?;
        let host = Host::start(cx, &spec, &[])?;
        let written = format!("{board:?} is back");
        let script = format!("printf '{written}' | dd of=/dev/vda conv=fsync,sync bs=512");
        machine.sh(&script).context("after the server was killed")?;
        let mut there = vec![0; written.len()];
        File::open(&image)?.read_exact_at(&mut there, 0)?;
        ensure!(there == written.as_bytes(), "{there:?}");
        machine.power_off();
        host.stop()?;
    }
    Ok(())
}

fn what_was_written_through_is_in_the_file_after_sigkill(cx: &Context) -> Result<()> {
    let image = cx.image(64 * MIB)?;
    let host = Host::start(cx, &format!("file:{}", image.display()), &[])?;
    let guest = guest(cx, &host)?;
    let mut machine = Machine::boot(&guest, &cx.paths, "write-through")?;
    let before = cx.stat("disk")?["vhost"].take();
    ensure!(before["counters"]["forced_writes"] == 0);
    let () = machine.run_step("write_through", &"vda")?;
    let after = cx.stat("disk")?["vhost"].take();
    host.server.kill()?;
    ensure!(
        after["counters"]["forced_writes"].as_u64() >= Some(WRITE_THROUGH_BLOCKS),
        "writes without a cache were not forced to the storage: {after}"
    );
    drop(machine);
    let file = File::open(&image)?;
    for block in 0..WRITE_THROUGH_BLOCKS {
        let mut got = vec![0; WRITE_THROUGH_BLOCK_BYTES];
        file.read_exact_at(&mut got, block * WRITE_THROUGH_BLOCK_BYTES as u64)?;
        ensure!(
            got == write_through_data(block),
            "block {block} is not in the file"
        );
    }
    Ok(())
}

fn a_guest_sees_a_read_only_disk(cx: &Context) -> Result<()> {
    let image = cx.image(64 * MIB)?;
    let spec = format!("file:{},serial=LAB-1", image.display());
    let host = Host::start(cx, &spec, &["--read-only"])?;
    let guest = guest(cx, &host)?;
    let mut machine = Machine::boot(&guest, &cx.paths, "read-only")?;
    let disk: DiskFacts = machine.run_step("describe_disk", &"vda")?;
    ensure!(disk.read_only, "the guest takes the disk for writable");
    let serial = machine.sh("cat /sys/block/vda/serial")?;
    ensure!(serial.trim() == "LAB-1", "the serial is {serial:?}");
    let written = machine.sh("! dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct")?;
    ensure!(!written.contains("1+0 records out"), "{written}");
    machine.power_off();
    host.stop()
}

fn guests_come_and_go_and_a_second_one_is_turned_away(cx: &Context) -> Result<()> {
    let host = Host::start(cx, "mem:64M", &[])?;
    for round in 0..2 {
        let guest = guest(cx, &host)?;
        let mut machine = Machine::boot(&guest, &cx.paths, &format!("come-and-go-{round}"))?;
        let marker = format!("round {round}");
        if round > 0 {
            let seen = machine.sh("head -c 7 /dev/vda")?;
            ensure!(seen.trim() == format!("round {}", round - 1));
        }
        let script = format!("printf '{marker}' | dd of=/dev/vda conv=fsync,notrunc status=none");
        machine.sh(&script)?;
        // One writer at a time: the second client sees the end of its connection, and no more.
        let mut second = UnixStream::connect(&host.socket)?;
        second.set_read_timeout(Some(cx.patience(30)))?;
        let mut byte = [0];
        ensure!(second.read(&mut byte)? == 0, "a second session was opened");
        let sessions = cx.stat("disk")?["vhost"]["sessions"]
            .as_array()
            .map_or(0, Vec::len);
        ensure!(sessions == 1, "{sessions} sessions");
        if round == 0 {
            // A guest that dies, and not politely.
            drop(machine);
        } else {
            machine.power_off();
        }
        until("the session ends", cx.patience(30), || {
            let sessions = &cx.stat("disk")?["vhost"]["sessions"];
            Ok(sessions.as_array().is_none_or(Vec::is_empty))
        })?;
    }
    let held = Holdings::of(host.server.pid())?;
    ensure!(held.descriptors < 32, "left open: {held:?}");
    host.stop()
}
