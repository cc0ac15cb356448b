//! What the log says of requests that the door answers before the storage has seen them.

use libublk::sys;

use crate::engine::repeats::Repeats;
use crate::request::{IoError, SECTOR_SHIFT};

/// The refusals of a device, by all of its queues.
#[derive(Debug)]
pub(super) struct Refusals {
    id: u32,
    /// Those of one operation with one error are a kind.
    repeats: Repeats,
}

impl Refusals {
    /// Of the device with this number.
    pub(super) const fn new(id: u32) -> Self {
        let repeats = Repeats::new(1);
        Self { id, repeats }
    }

    /// Logs one, unless the same came lately.
    #[cold]
    pub(super) fn tell(&self, descriptor: &sys::ublksrv_io_desc, error: IoError) {
        let kind = format!("{} {}", descriptor.op_flags & 0xff, error.errno());
        if let Some(omitted) = self.repeats.due(&kind) {
            let text = describe(descriptor, error);
            tracing::warn!("/dev/ublkb{}: {text}{omitted}", self.id);
        }
    }
}

fn describe(descriptor: &sys::ublksrv_io_desc, error: IoError) -> String {
    let op = match descriptor.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => "read".to_owned(),
        sys::UBLK_IO_OP_WRITE => "write".to_owned(),
        sys::UBLK_IO_OP_FLUSH => "flush".to_owned(),
        sys::UBLK_IO_OP_DISCARD => "discard".to_owned(),
        sys::UBLK_IO_OP_WRITE_ZEROES => "write-zeroes".to_owned(),
        other => format!("operation {other}"),
    };
    let why = match error {
        IoError::Conflict => {
            "a client of the vhost-user socket has the disk, and until it leaves this device is read-only (EBADE)"
        }
        IoError::ReadOnly => "the export is read-only",
        IoError::Unsupported => "the disk does not offer it",
        IoError::Io => "it does not fit the disk or its buffer could not be copied",
        IoError::NoSpace => "no space",
    };
    format!(
        "{op} of {} bytes at {} was refused: {why}",
        u64::from(descriptor.nr_sectors) << SECTOR_SHIFT,
        descriptor.start_sector << SECTOR_SHIFT,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_request_and_the_cause() {
        let mut descriptor = sys::ublksrv_io_desc {
            op_flags: sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA,
            nr_sectors: 8,
            start_sector: 16,
            ..Default::default()
        };
        let told = describe(&descriptor, IoError::Conflict);
        assert!(
            told.starts_with("write of 4096 bytes at 8192 was refused: a client"),
            "{told}"
        );
        descriptor.op_flags = 77;
        let told = describe(&descriptor, IoError::Unsupported);
        assert!(
            told.starts_with("operation 77 of 4096 bytes at 8192 was refused: the disk"),
            "{told}"
        );
    }
}
