//! The vhost-user door in the test's own process, the driver for it, and a directory for servers.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]
#![allow(
    dead_code,
    unused_imports,
    reason = "each test program uses its own part of this"
)]

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
pub use testkit::sandbox::{LIMIT, Sandbox};
pub use testkit::vhost::*;
pub use testkit::wait::{PATIENCE, eventually};
use ublkup::door::ownership::Ownership;
use ublkup::door::vhost::{VhostConfig, VhostDoor};
use ublkup::engine::Storage;
use ublkup::engine::counters::CounterSet;
use ublkup::engine::polling::Polling;
use ublkup::engine::socket::{Socket, SocketAccess};
use ublkup::engine::threads::ThreadOptions;
use ublkup::engine::throttle::Throttle;
use ublkup::request::{Limits, Serial, small_disk};
use ublkup::storage::{CacheMode, FileOptions};

/// A directory for servers of the program that is tested.
pub fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_ublkup"))
}

pub fn limits(capacity_bytes: u64) -> Limits {
    Limits {
        serial: Serial::new("serial-of-20-letters").unwrap(),
        ..small_disk(capacity_bytes)
    }
}

/// Asserts that a process which this one starts inherits none of its descriptors but the standard ones: a
/// listening socket that outlives its server would go on answering clients.
pub fn expect_all_close_on_exec(pid: u32) {
    let folder = format!("/proc/{pid}/fdinfo");
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Ok(info) = std::fs::read_to_string(format!("{folder}/{name}")) else {
            // It was closed meanwhile.
            continue;
        };
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        // A server is started with the standard ones alone, see `Server::launch`.
        if name.parse::<u32>().unwrap() > 2 {
            seen += 1;
            let target = std::fs::read_link(format!("/proc/{pid}/fd/{name}"));
            assert_ne!(flags & 0o2_000_000, 0, "{name} is inherited: {target:?}");
        }
    }
    assert!(seen > 5, "only {seen} descriptors");
}

/// A file as it is served without options.
pub fn file_options(path: impl Into<PathBuf>, cache: CacheMode) -> FileOptions {
    FileOptions {
        export: "test".into(),
        path: path.into(),
        cache,
        format: None,
        read_only: false,
        block_bytes: None,
        serial: Serial::new("test").unwrap(),
        claim_later: false,
    }
}

/// The right to a disk without a ublk door.
pub fn open_ownership(read_only: bool) -> Arc<Ownership> {
    let ownership = Ownership::new("test", read_only, Duration::from_secs(1), None);
    ownership.open(None);
    ownership
}

/// A door with its directory and counters.
pub struct Fixture {
    pub door: VhostDoor,
    pub ownership: Arc<Ownership>,
    pub counters: Arc<CounterSet>,
    pub throttle: Arc<Throttle>,
    pub scratch: TempDir,
}

impl Fixture {
    pub fn new<B: Storage>(disk: B, queue_threads: u16) -> Self {
        Self::polling(disk, queue_threads, Polling::default())
    }

    /// A fixture whose queue threads wait in this way.
    pub fn polling<B: Storage>(disk: B, queue_threads: u16, polling: Polling) -> Self {
        Self::with(disk, (queue_threads, queue_threads), polling)
    }

    /// A fixture with so many queues and so many threads for them.
    pub fn with<B: Storage>(
        disk: B,
        (queues, queue_threads): (u16, u16),
        polling: Polling,
    ) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let counters = Arc::new(CounterSet::default());
        let throttle = Arc::<Throttle>::default();
        let ownership = open_ownership(disk.limits().read_only);
        let config = VhostConfig {
            name: "test".into(),
            socket: Socket::bind(&scratch.path().join("s"), &SocketAccess::default()).unwrap(),
            queues,
            queue_threads,
            threads: ThreadOptions {
                polling: Arc::new(polling.into()),
                cpus: None,
            },
            throttle: Arc::clone(&throttle),
            ownership: Arc::clone(&ownership),
        };
        let door = VhostDoor::start(config, Arc::new(disk), Arc::clone(&counters)).unwrap();
        Self {
            door,
            ownership,
            counters,
            throttle,
            scratch,
        }
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.door.path()).unwrap()
    }

    /// Waits until all sessions are gone.
    pub fn wait_empty(&self) {
        eventually("the sessions end", || self.door.sessions().is_empty());
    }
}
