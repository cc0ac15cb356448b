//! The storage `rbd:` against a real cluster.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use testkit::server::Serve;
use testkit::shell::{Shell, sh};

use super::{migration, own_tests};
use crate::bench::attach::Client;
use crate::bench::client::{End, Op, Order};
use crate::bench::record::Document;
use crate::kit::ceph::Cluster;
use crate::kit::fio::Fio;
use crate::kit::load;
use crate::test;
use crate::test::{Context, Test};

/// A minute and a half, and the cluster; beside other suites twice as long.
const LIMIT_S: u32 = 600;
const CLUSTER_S: u32 = 120;

/// On this machine.
pub const TESTS: &[Test] = &[
    test!(images_are_served_and_pass_their_tests, |cx| pass(cx, &[])).limit_s(LIMIT_S),
    test!(
        images_outlive_fifty_kills_and_a_minute_without_the_cluster,
        |cx| pass(cx, &[("RBD_KILLS", "50"), ("RBD_STOP_S", "60")])
    )
    .limit_s(LIMIT_S)
    .full(),
    test!(all_candidates_of_the_storage_lane_are_measured)
        .limit_s(300)
        .full(),
    test!(a_guest_moves_between_two_servers_of_an_image)
        .limit_s(600)
        .full(),
];

/// Inside User Mode Linux, the cluster too.
pub const BLOCK_TESTS: &[Test] =
    &[test!(an_image_has_both_doors_the_upgrade_and_outlives_its_servers).limit_s(900)];

const KILLS: usize = 10;

fn an_image_has_both_doors_the_upgrade_and_outlives_its_servers(cx: &Context) -> Result<()> {
    sh("ip link set lo up").run()?;
    let cluster = Cluster::start(cx)?;
    cluster
        .shell("rbd")
        .args(["create", "--size", "64M", "disk"])
        .run()?;
    let set = |serve: Serve, (name, value): (&str, &str)| serve.env(name, value);
    let serve = || {
        let serve = cluster.env().fold(cx.serve(), set);
        serve.ublk("yes").name("disk").arg("rbd:rbd/disk").start()
    };
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
        for _ in 0..KILLS {
            thread::sleep(Duration::from_secs(2));
            server.kill()?;
            server = serve()?;
            ensure!(server.block_device()? == device, "another device");
        }
        ensure!(!fio.is_finished(), "it has written for too short a time");
        let written = fio.join().map_err(|_| anyhow!("fio's thread panicked"))?;
        anyhow::Ok((written?, server))
    })?;
    ensure!(written.jobs.iter().all(|job| job.error == 0), "{written:?}");
    // A client comes from the block device to the vhost-user door.
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
    let locks = cluster.shell("rbd").args(["lock", "ls", "disk"]).run()?;
    ensure!(locks.trim().is_empty(), "{locks}");
    Ok(())
}

/// Under write load, and the guest reads its disk again all the while.
fn a_guest_moves_between_two_servers_of_an_image(cx: &Context) -> Result<()> {
    let cluster = Cluster::start(cx)?;
    let size = format!("{}B", load::DISK_BYTES);
    let create = ["create", "--size", &size, "guest"];
    cluster.shell("rbd").args(create).run()?;
    let serve = || {
        cluster
            .env()
            .fold(cx.serve(), |serve, (name, value)| serve.env(name, value))
    };
    migration::a_guest_moves_between_servers(cx, "rbd:rbd/guest", serve)
}

fn all_candidates_of_the_storage_lane_are_measured(cx: &Context) -> Result<()> {
    let server = cx.paths.server.to_str().context("a path that is no text")?;
    let printed = Shell::new("/proc/self/exe")
        .args([
            "bench",
            "storage",
            "--quick",
            "--no-counts",
            "--json",
            "--yes",
        ])
        .args(["--server", server, "--output"])
        .arg(cx.scratch().join("bench"))
        .limit(cx.patience(250))
        .run()?;
    let document: Document = serde_json::from_str(&printed).context("no document was printed")?;
    let measured = document.rows.iter().map(|row| row.candidates.len());
    let measured: Vec<_> = measured.collect();
    ensure!(measured == [2, 2, 3, 3], "{measured:?}");
    Ok(())
}

fn pass(cx: &Context, more: &[(&str, &str)]) -> Result<()> {
    let cluster = Cluster::start(cx)?;
    let env: Vec<_> = cluster.env().chain(more.iter().copied()).collect();
    own_tests::pass_ignored_within(cx, "rbd", &env, LIMIT_S - CLUSTER_S)
}
