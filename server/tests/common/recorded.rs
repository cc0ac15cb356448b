//! A client that has its requests in flight on record.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use crate::common::{Driver, Vring, attempt};

/// A client with in-flight memory.
pub struct Client {
    pub driver: Driver,
    pub told: VhostUserInflight,
    pub memory: File,
}

impl Client {
    /// Connects and gets memory from the server; starts nothing.
    pub fn connect(stream: UnixStream, features: u64) -> Self {
        let mut driver = Driver::connect(stream, features);
        let (told, memory) = new_memory(&mut driver);
        driver.vrings.push(Vring::new(0, 128));
        Self {
            driver,
            told,
            memory,
        }
    }

    #[must_use]
    pub fn reconnect(self, connect: impl FnOnce() -> UnixStream) -> Self {
        Self {
            driver: self.driver.reconnect(connect),
            ..self
        }
    }

    /// Presents its memory and starts its vring, as QEMU does whenever it has connected. False if the server refuses.
    pub fn start(&mut self) -> bool {
        let Self { driver, told, .. } = self;
        let fd = self.memory.as_raw_fd();
        driver.frontend.set_inflight_fd(told, fd).unwrap();
        let base = driver.vrings[0].used_index(&driver.memory);
        attempt(|| driver.start(0, base)).is_ok()
    }

    /// Switches the log of dirty pages on and stops, as QEMU does when it has moved its guest.
    pub fn stop_to_migrate(&mut self) {
        self.driver.begin_migration();
        self.driver.frontend.get_vring_base(0).unwrap();
    }
}

/// In-flight memory of the server.
pub fn new_memory(driver: &mut Driver) -> (VhostUserInflight, File) {
    let wanted = VhostUserInflight::new(0, 0, 1, 128);
    driver.frontend.get_inflight_fd(&wanted).unwrap()
}
