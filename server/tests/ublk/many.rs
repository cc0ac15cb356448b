//! Many exports with both doors in one process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testkit::proc::{Holdings, sleeps};

use super::common::sandbox;

const EXPORTS: usize = 100;

/// Besides the one of each queue of a device.
const THREADS: usize = 4;

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_hundred_exports_with_both_doors_start_under_the_usual_limit_and_wake_nobody() {
    // What a login or a unit gives; with eleven descriptors an export it takes more, and the server raises it.
    let usual = getrlimit(Resource::Nofile);
    let current = Some(1024);
    setrlimit(Resource::Nofile, Rlimit { current, ..usual }).unwrap();
    let lab = sandbox();
    let specs: Vec<String> = (0..EXPORTS).map(|n| format!("e{n}=null:1G")).collect();
    let mut args = vec!["--ublk", "yes", "--vhost", "yes", "--queues", "1"];
    args.extend(specs.iter().map(String::as_str));
    let server = lab.serve(&args);
    setrlimit(Resource::Nofile, usual).unwrap();
    let held = Holdings::of(server.pid()).unwrap();
    assert!(
        held.descriptors > 1024,
        "the limit was not reached: {}",
        held.descriptors
    );
    assert!(
        held.threads <= EXPORTS + THREADS,
        "{} threads",
        held.threads
    );
    sleeps(server.pid()).expect("with a hundred exports");
    assert!(lab.ok(&["stat", "e99"]).contains("e99"));
    server.stop().unwrap();
    lab.is_clean();
}
