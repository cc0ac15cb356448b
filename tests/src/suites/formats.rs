//! Disks that are no plain files, at both doors.

use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use testkit::server::Serve;
use testkit::shell::Shell;

use crate::bench::attach::Client;
use crate::bench::client::{End, Op, Order};
use crate::kit::fio::Fio;
use crate::test;
use crate::test::{Context, Test};

/// Inside User Mode Linux.
pub const TESTS: &[Test] =
    &[
        test!(a_qcow2_image_has_both_doors_the_upgrade_snapshots_and_outlives_its_servers)
            .limit_s(300),
    ];

/// The block device of a disk of 64 MiB is verified while its servers are killed, so many times and so often; something is done
/// after each. Then a client comes from the block device to the vhost-user door.
pub fn both_doors(
    cx: &Context,
    serve: impl Fn() -> Serve,
    (kills, interval): (usize, Duration),
    mut after_kill: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let serve = || serve().ublk("yes").name("disk").start();
    let mut server = serve()?;
    let device = server.block_device()?;
    let (written, server) = thread::scope(|scope| {
        let fio = scope.spawn(|| {
            Fio::new(&device)
                .option("rw", "randwrite")
                .option("loops", 2)
                .depth(8)
                .verify()
                .limit(cx.patience(300))
                .run()
        });
        let mut while_writing = 0;
        for round in 0..kills {
            thread::sleep(interval);
            while_writing += usize::from(!fio.is_finished());
            server.kill()?;
            server = serve()?;
            ensure!(server.block_device()? == device, "another device");
            after_kill(round)?;
        }
        ensure!(while_writing >= 2, "it has written for too short a time");
        let written = fio.join().map_err(|_| anyhow!("fio's thread panicked"))?;
        anyhow::Ok((written?, server))
    })?;
    ensure!(written.jobs.iter().all(|job| job.error == 0), "{written:?}");
    let order = Order {
        upgrades: true,
        op: Op::RandWrite,
        ..Order::reads(&device, server.pid(), End::Requests(200))
    };
    let answer = Client::start(&order)?.finish()?;
    ensure!(answer.requests >= 200, "{answer:?}");
    let stat = cx.stat("disk")?;
    let writes = &stat["vhost"]["counters"]["writes"];
    ensure!(writes.as_u64() == Some(answer.all_requests), "{stat}");
    server.stop()?;
    ensure!(!device.exists(), "the block device is left");
    Ok(())
}

/// Thin, over another image; it is made larger at the end.
fn a_qcow2_image_has_both_doors_the_upgrade_snapshots_and_outlives_its_servers(
    cx: &Context,
) -> Result<()> {
    let [base, image, snapshot] =
        ["base.raw", "disk.qcow2", "before.qcow2"].map(|name| cx.scratch().join(name));
    let qemu_img = |words: &[&str]| Shell::new("qemu-img").args(words).run();
    std::fs::File::create(&base)?.set_len(64 << 20)?;
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
    Shell::new("qemu-img")
        .args(create)
        .args([&base, &image])
        .run()?;
    let spec = format!("qcow2:{}", image.display());
    let serve = || cx.serve().arg(&spec);
    let after_kill = |round| {
        let command = if round % 2 == 0 { "create" } else { "commit" };
        let words = ["snapshot", command, "disk"];
        cx.ublkup(&words).arg(&snapshot).run().map(drop)
    };
    both_doors(cx, serve, (4, Duration::from_millis(700)), after_kill)?;
    let image = image.display().to_string();
    qemu_img(&["check", "-q", &image])?;
    ensure!(!snapshot.exists(), "a snapshot is left");
    let stored = qemu_img(&["info", "-f", "qcow2", "--output=json", &image])?;
    ensure!(stored.contains("base.raw"), "it lies over {stored}");
    Ok(())
}
