//! What the tests of rings share.

use fd_ring::{Options, Transport};
use tempfile::TempDir;

/// The ring under test. On kernels that have rings the lab runs these tests again, with
/// `RING_TESTS_TRANSPORT=kernel`.
pub fn transport() -> Transport {
    match std::env::var("RING_TESTS_TRANSPORT").as_deref() {
        Err(_) | Ok("shared") => Transport::Shared,
        Ok("kernel") => Transport::Kernel,
        Ok(other) => panic!("RING_TESTS_TRANSPORT is {other}, neither kernel nor shared"),
    }
}

/// This transport only, with a small ring, and a registry in `dir`.
pub fn options(transport: Transport, dir: &TempDir) -> Options {
    let mut options = Options {
        kernel: transport == Transport::Kernel,
        shared: transport == Transport::Shared,
        size_bytes: 128 << 10,
        ..Options::default()
    };
    options.offer.kernel = false;
    options.offer.runtime_dir = Some(dir.path().to_owned());
    options.lookup.kernel = false;
    options.lookup.runtime_dirs = vec![dir.path().to_owned()];
    options
}
