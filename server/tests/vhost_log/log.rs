//! The client's side of the log of dirty pages.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserDirtyLogRegion;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};

use crate::common::*;

pub const LOG_ALL: u64 = 1 << 26;
pub const PAGE: u64 = 4096;
/// A bit for each page of the memory.
pub const LOG_BYTES: u64 = MEMORY_BYTES / PAGE / 8;
/// Where the bitmap is in its file.
pub const OFFSET: u64 = 0x1040;
pub const FEATURES: u64 = USUAL | EVENT_IDX;

/// The client's side of the bitmap.
pub struct Log(pub File);

impl Log {
    pub fn new() -> Self {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, OFFSET + LOG_BYTES).unwrap();
        Self(file)
    }

    pub fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: LOG_BYTES,
            mmap_offset: OFFSET,
            mmap_handle: self.0.as_raw_fd(),
        }
    }

    /// The pages that are marked.
    pub fn pages(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; usize::try_from(LOG_BYTES).unwrap()];
        self.0.read_exact_at(&mut bytes, OFFSET).unwrap();
        let is_set =
            |page: &u64| bytes[usize::try_from(page / 8).unwrap()] & (1 << (page % 8)) != 0;
        (0..8 * LOG_BYTES).filter(is_set).collect()
    }

    /// Takes the marks out.
    pub fn take(&self) -> BTreeSet<u64> {
        let pages = self.pages();
        let zeroes = vec![0; usize::try_from(LOG_BYTES).unwrap()];
        self.0.write_all_at(&zeroes, OFFSET).unwrap();
        pages
    }
}

/// The pages that ranges of guest memory lie in.
pub fn pages(ranges: &[(u64, u64)]) -> BTreeSet<u64> {
    let of = |&(at, len): &(u64, u64)| at / PAGE..=(at + len - 1) / PAGE;
    ranges.iter().flat_map(of).collect()
}

pub trait Logs {
    fn log_to(&mut self, log: &Log);
    fn log_requests(&mut self, on: bool);
    fn log_used(&mut self, on: bool);
    fn settle(&self);
}

impl Logs for Driver {
    fn log_to(&mut self, log: &Log) {
        self.frontend.set_log_base(0, Some(log.region())).unwrap();
    }

    fn log_requests(&mut self, on: bool) {
        let features = self.features | if on { LOG_ALL } else { 0 };
        self.frontend.set_features(features).unwrap();
    }

    fn log_used(&mut self, on: bool) {
        for vring in &self.vrings {
            let addresses = VringConfigData {
                flags: u32::from(on),
                log_addr: Some(vring.used),
                ..vring.addresses()
            };
            self.frontend
                .set_vring_addr(vring.index, &addresses)
                .unwrap();
        }
    }

    /// Waits until the device sleeps, after which it writes nothing, and marks nothing.
    fn settle(&self) {
        self.vrings[0].wait_taken(&self.memory);
        // A message is answered by the queue thread between two rounds.
        self.frontend.set_vring_enable(0);
    }
}

pub trait Enables {
    fn set_vring_enable(&self, index: usize);
}

impl Enables for vhost::vhost_user::Frontend {
    fn set_vring_enable(&self, index: usize) {
        let mut frontend = self.clone();
        VhostUserFrontend::set_vring_enable(&mut frontend, index, true).unwrap();
    }
}

/// A driver whose device logs everything.
pub fn logging(fixture: &Fixture) -> (Driver, Log) {
    let mut driver = Driver::running(fixture.connect(), FEATURES);
    let log = Log::new();
    driver.log_to(&log);
    driver.log_requests(true);
    driver.log_used(true);
    driver.settle();
    log.take();
    (driver, log)
}
