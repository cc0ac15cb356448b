//! The storage `rbd:` against a real cluster.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::server::Serve;
use testkit::shell::{Shell, sh};

use super::formats::both_doors;
use super::{migration, own_tests};
use crate::bench::record::Document;
use crate::kit::ceph::Cluster;
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

fn an_image_has_both_doors_the_upgrade_and_outlives_its_servers(cx: &Context) -> Result<()> {
    sh("ip link set lo up").run()?;
    let cluster = Cluster::start(cx)?;
    cluster
        .shell("rbd")
        .args(["create", "--size", "64M", "disk"])
        .run()?;
    let set = |serve: Serve, (name, value): (&str, &str)| serve.env(name, value);
    let serve = || cluster.env().fold(cx.serve(), set).arg("rbd:rbd/disk");
    both_doors(cx, serve, (10, Duration::from_secs(2)), |_| Ok(()))?;
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
