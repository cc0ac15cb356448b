//! What the tests of rings share.

use fd_ring::{Options, Way};
use tempfile::TempDir;

/// The way that is tested. Only some kernels have rings; on those the lab runs all of these tests again
/// with `RING_TESTS_WAY=kernel`.
pub fn way() -> Way {
    match std::env::var("RING_TESTS_WAY").as_deref() {
        Err(_) | Ok("shared") => Way::Shared,
        Ok("kernel") => Way::Kernel,
        Ok(other) => panic!("RING_TESTS_WAY is {other}, neither kernel nor shared"),
    }
}

/// This way alone, with a small ring; for the shared one with a registry in this directory.
pub fn options(way: Way, dir: &TempDir) -> Options {
    let mut options = Options {
        kernel: way == Way::Kernel,
        shared: way == Way::Shared,
        size_bytes: 128 << 10,
        ..Options::default()
    };
    options.offer.kernel = false;
    options.offer.runtime_dir = Some(dir.path().to_owned());
    options.lookup.kernel = false;
    options.lookup.runtime_dirs = vec![dir.path().to_owned()];
    options
}
