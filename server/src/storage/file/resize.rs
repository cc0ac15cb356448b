//! Changing the size of a disk that is being served.

use std::io::{self, Seek, SeekFrom};

use super::shared::Shared;
use crate::request::{Limits, format_size};

/// Makes the storage at least `wanted_bytes` long, if a length is given, and returns how much of it can
/// be served.
pub(super) fn grow(shared: &Shared, limits: &Limits, wanted_bytes: Option<u64>) -> io::Result<u64> {
    // Nothing depends on the file position: all I/O names its own.
    let end = || (&shared.file).seek(SeekFrom::End(0));
    let mut len_bytes = end()?;
    if let Some(wanted) = wanted_bytes
        && wanted > len_bytes
    {
        if shared.is_device {
            return Err(io::Error::other(format!(
                "the device behind the disk has {}: make it larger first",
                format_size(len_bytes)
            )));
        }
        if limits.read_only {
            return Err(io::Error::other("it is served read-only"));
        }
        len_bytes = shared.change(|| {
            // It may have grown meanwhile.
            if end()? < wanted {
                shared.file.set_len(wanted)?;
            }
            end()
        })?;
    }
    let block_bytes = u64::from(limits.block_bytes);
    Ok(len_bytes / block_bytes * block_bytes)
}

/// Truncates a regular file; a device keeps its length.
pub(super) fn cut(shared: &Shared, capacity_bytes: u64) -> io::Result<()> {
    if shared.is_device || (&shared.file).seek(SeekFrom::End(0))? <= capacity_bytes {
        return Ok(());
    }
    shared.change(|| {
        shared.file.set_len(capacity_bytes)?;
        shared.file.sync_all()
    })
}
