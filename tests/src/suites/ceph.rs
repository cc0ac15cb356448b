//! The storage `rbd:` against a real cluster.

use anyhow::Result;

use super::own_tests;
use crate::kit::ceph::Cluster;
use crate::test;
use crate::test::{Context, Test};

/// On this machine.
pub const TESTS: &[Test] = &[test!(images_are_served_and_pass_their_tests).limit_s(300)];

fn images_are_served_and_pass_their_tests(cx: &Context) -> Result<()> {
    let cluster = Cluster::start(cx)?;
    let env: Vec<_> = cluster.env().collect();
    own_tests::pass_ignored(cx, "rbd", &env)
}
