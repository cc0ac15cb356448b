//! Another size for a disk that is being served.

use std::io::{self, Seek, SeekFrom};

use super::shared::Shared;
use crate::request::Limits;
use crate::request::format_size;

/// What is served of the storage once it is at least `wanted_bytes` long.
pub(super) fn grow(shared: &Shared, limits: &Limits, wanted_bytes: Option<u64>) -> io::Result<u64> {
    // The position is nobody's: all I/O says where.
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

/// Cuts a regular file; a device stays as long as it is.
pub(super) fn cut(shared: &Shared, capacity_bytes: u64) -> io::Result<()> {
    if shared.is_device || (&shared.file).seek(SeekFrom::End(0))? <= capacity_bytes {
        return Ok(());
    }
    shared.change(|| {
        shared.file.set_len(capacity_bytes)?;
        shared.file.sync_all()
    })
}
