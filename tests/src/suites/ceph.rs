//! The storage `rbd:` against a real cluster.

use anyhow::Result;

use super::own_tests;
use crate::kit::ceph::Cluster;
use crate::test;
use crate::test::{Context, Test};

/// On this machine.
pub const TESTS: &[Test] = &[
    test!(images_are_served_and_pass_their_tests, |cx| pass(cx, &[])).limit_s(300),
    test!(
        images_outlive_fifty_kills_and_a_minute_without_the_cluster,
        |cx| pass(cx, &[("RBD_KILLS", "50"), ("RBD_STOP_S", "60")])
    )
    .limit_s(300)
    .full(),
];

fn pass(cx: &Context, more: &[(&str, &str)]) -> Result<()> {
    let cluster = Cluster::start(cx)?;
    let env: Vec<_> = cluster.env().chain(more.iter().copied()).collect();
    own_tests::pass_ignored(cx, "rbd", &env)
}
