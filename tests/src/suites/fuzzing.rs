//! Each fuzz target for a minute. `cargo test` runs their corpora every time.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::fuzz::Fuzzer;
use crate::report::line;
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] = &[
    test!(no_vring_of_a_hostile_driver_does_harm, |cx| fuzz(
        cx, "vring"
    ))
    .limit_s(LIMIT_S),
    test!(no_session_of_a_hostile_client_does_harm, |cx| fuzz(
        cx, "messages"
    ))
    .limit_s(LIMIT_S),
    test!(no_record_of_chains_in_flight_does_harm, |cx| fuzz(
        cx, "inflight"
    ))
    .limit_s(LIMIT_S),
    test!(no_configuration_does_harm, |cx| fuzz(cx, "config")).limit_s(LIMIT_S),
    test!(
        no_request_or_answer_of_an_admin_socket_does_harm,
        |cx| fuzz(cx, "admin")
    )
    .limit_s(LIMIT_S),
    test!(no_registry_does_harm, |cx| fuzz(cx, "registry")).limit_s(LIMIT_S),
    test!(no_peer_of_a_ring_does_harm, |cx| fuzz(cx, "ring")).limit_s(LIMIT_S),
];

const MINUTE: Duration = Duration::from_secs(60);

/// A minute, and what is under way then.
const LIMIT_S: u32 = 180;

fn fuzz(cx: &Context, name: &str) -> Result<()> {
    let programs = cx.paths.fuzzers.as_deref();
    let programs = programs.context("this run has no fuzz targets")?;
    let done = Fuzzer::new(&cx.paths.repo, programs, name)?.run(MINUTE)?;
    line(&format!("{name}: {done}"));
    Ok(())
}
