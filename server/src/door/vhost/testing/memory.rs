//! A guest's memory and its log of dirty pages, for fuzz targets.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserLog;

use crate::door::vhost::dirty::{DirtyLog, Logging};
use crate::door::vhost::memory::{MemoryMap, Region, RegionAddress};

/// A region of a guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct GuestRegion<'a> {
    /// The file that it is in.
    pub file: &'a File,
    /// Where it begins in the file.
    pub offset_bytes: u64,
    /// Where it is for the guest.
    pub guest: u64,
    /// Where it is for the client.
    pub user: u64,
    /// Its length.
    pub len_bytes: u64,
}

/// A guest's memory, mapped.
#[derive(Clone, Debug)]
pub struct GuestMemory(pub(super) Arc<MemoryMap>);

impl GuestMemory {
    /// Maps these regions.
    ///
    /// # Errors
    ///
    /// When a session would refuse them.
    pub fn map(regions: &[GuestRegion<'_>]) -> io::Result<Self> {
        let regions: io::Result<Vec<_>> = regions
            .iter()
            .map(|region| {
                let address = RegionAddress {
                    guest: region.guest,
                    len_bytes: region.len_bytes,
                    user: region.user,
                };
                Region::map(address, region.file, region.offset_bytes)
            })
            .collect();
        Ok(Self(Arc::new(MemoryMap::new(regions?)?)))
    }

    /// Whether memory of this process lies in it, all of it.
    #[must_use]
    pub fn contains(&self, at: *const u8, len_bytes: usize) -> bool {
        let mut found = 0;
        self.0
            .guest_ranges(at, len_bytes, |_, len_bytes| found += len_bytes);
        found == len_bytes as u64
    }
}

/// The log of dirty pages of a guest.
#[derive(Clone, Debug)]
pub struct PageLog(pub(super) Logging);

impl PageLog {
    /// Maps a log that is a whole file of so many bytes. `requests`: whether requests are marked in it.
    ///
    /// # Errors
    ///
    /// When a session would refuse it.
    pub fn map(file: &File, len_bytes: u64, requests: bool) -> io::Result<Self> {
        let log = Arc::new(DirtyLog::map(&VhostUserLog::new(len_bytes, 0), file)?);
        Ok(Self(Logging { log, requests }))
    }
}
