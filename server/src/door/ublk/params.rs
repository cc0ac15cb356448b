//! From the [`Limits`] of a disk to the parameters of a ublk device.

use libublk::sys;

use super::error::UblkError;
use crate::request::{Limits, SECTOR_SHIFT, Serial};

/// Largest buffer of one request that the driver takes (`UBLK_IO_BUF_BITS`).
const MAX_BUFFER_BYTES: u32 = 1 << sys::UBLK_IO_BUF_BITS;

/// Largest block size and hint that the driver takes.
const MAX_HINT_BYTES: u32 = 256 << 20;

/// Checks how many queues of which depth a device shall have.
///
/// # Errors
///
/// [`UblkError::Config`] when there are none, or more than the driver takes.
pub(super) fn check_queues(queues: u16, depth: u16) -> Result<(), UblkError> {
    for (what, number, max) in [
        ("queues", queues, sys::UBLK_MAX_NR_QUEUES),
        ("requests per queue", depth, sys::UBLK_MAX_QUEUE_DEPTH),
    ] {
        if number == 0 || u32::from(number) > max {
            return Err(UblkError::Config(format!(
                "{number} {what} were asked for; 1 to {max} are possible"
            )));
        }
    }
    Ok(())
}

/// Bytes of the buffer of one request for a disk with these limits: what a single read or write
/// can carry, in whole pages.
pub(super) fn buffer_bytes(limits: &Limits, page_bytes: u32) -> u32 {
    let wanted = limits.max_io_bytes.clamp(page_bytes, MAX_BUFFER_BYTES);
    wanted & !(page_bytes - 1)
}

/// The parameters for a disk with these limits whose device has buffers of `buffer_bytes`.
///
/// # Errors
///
/// [`UblkError::Config`] when the driver cannot express the disk.
pub(super) fn params(
    limits: &Limits,
    buffer_bytes: u32,
    page_bytes: u32,
) -> Result<sys::ublk_params, UblkError> {
    let block = limits.block_bytes;
    if !block.is_power_of_two() || !(512..=page_bytes).contains(&block) {
        return Err(UblkError::Config(format!(
            "the block size of the disk is {block} bytes; 512 to {page_bytes} is possible"
        )));
    }
    let block_sectors = block >> SECTOR_SHIFT;
    let mut attrs = 0;
    if limits.read_only {
        attrs |= sys::UBLK_ATTR_READ_ONLY;
    }
    if limits.write_cache {
        attrs |= sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    }
    let physical = limits.physical_block_bytes.clamp(block, MAX_HINT_BYTES);
    let mut params = sys::ublk_params {
        // A struct of some hundred bytes.
        len: u32::try_from(size_of::<sys::ublk_params>()).unwrap_or(u32::MAX),
        types: sys::UBLK_PARAM_TYPE_BASIC,
        basic: sys::ublk_param_basic {
            attrs,
            logical_bs_shift: shift(block),
            physical_bs_shift: shift(physical),
            // The driver knows powers of two only; another size is no hint at all. A shift of zero
            // is one byte, which the block layer rounds down to none.
            io_opt_shift: match limits.optimal_io_bytes {
                bytes if bytes.is_power_of_two() => shift(bytes.min(MAX_HINT_BYTES)),
                _ => 0,
            },
            io_min_shift: shift(physical),
            max_sectors: buffer_bytes >> SECTOR_SHIFT,
            dev_sectors: limits.capacity.bytes() >> SECTOR_SHIFT,
            ..Default::default()
        },
        ..Default::default()
    };
    if limits.max_discard_bytes > 0 || limits.max_write_zeroes_bytes > 0 {
        params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
        params.discard = sys::ublk_param_discard {
            discard_granularity: limits.discard_granularity_bytes.max(block),
            max_discard_sectors: sectors(limits.max_discard_bytes, block_sectors),
            max_write_zeroes_sectors: sectors(limits.max_write_zeroes_bytes, block_sectors),
            max_discard_segments: 1,
            ..Default::default()
        };
    }
    Ok(params)
}

/// The parameters as Linux 6.16 knows them (`struct ublk_params`); the bindings end before the
/// alignment of data.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Params {
    len: u32,
    types: u32,
    basic: sys::ublk_param_basic,
    discard: sys::ublk_param_discard,
    devt: sys::ublk_param_devt,
    zoned: sys::ublk_param_zoned,
    dma: sys::ublk_param_dma_align,
}

const _: () = {
    use std::mem::offset_of;
    // The driver takes as much as `len` says, from the beginning.
    assert!(offset_of!(Params, zoned) == offset_of!(sys::ublk_params, zoned));
    let zoned_end = offset_of!(Params, zoned) + size_of::<sys::ublk_param_zoned>();
    assert!(offset_of!(Params, dma) == zoned_end);
};

impl Params {
    /// Parameters; and if storages reach the data of requests themselves, how it must lie in memory.
    pub(super) fn new(known: sys::ublk_params, alignment_bytes: Option<u32>) -> Self {
        let mut params = Self {
            len: known.len,
            types: known.types,
            basic: known.basic,
            discard: known.discard,
            devt: known.devt,
            zoned: known.zoned,
            ..Self::default()
        };
        if let Some(bytes) = alignment_bytes {
            params.types |= sys::UBLK_PARAM_TYPE_DMA_ALIGN;
            // The driver wants a mask, and four bytes at least.
            params.dma.alignment = bytes.max(4) - 1;
            params.len = Self::room().len;
        }
        params
    }

    /// Room for the driver's answer.
    pub(super) fn room() -> Self {
        Self {
            // A struct of some hundred bytes.
            len: u32::try_from(size_of::<Self>()).unwrap_or(u32::MAX),
            ..Self::default()
        }
    }

    /// At multiples of how many bytes the data of requests lies in memory.
    pub(super) fn alignment_bytes(&self) -> u32 {
        match self.types & sys::UBLK_PARAM_TYPE_DMA_ALIGN {
            // What the driver does by itself.
            0 => 4,
            _ => self.dma.alignment.saturating_add(1),
        }
    }
}

/// What a device tells its users about its disk: the reverse of [`params`].
pub(super) fn limits(params: &sys::ublk_params) -> Limits {
    let (basic, discard) = (&params.basic, &params.discard);
    // The driver has checked all shifts and sectors. A shift of zero is no hint.
    let bytes = |shift: u8| 1_u32.checked_shl(shift.into()).unwrap_or(0);
    let hint = |shift: u8| if shift == 0 { 0 } else { bytes(shift) };
    let discards = params.types & sys::UBLK_PARAM_TYPE_DISCARD != 0;
    let discard_bytes =
        |sectors: u32| u64::from(if discards { sectors } else { 0 }) << SECTOR_SHIFT;
    Limits {
        capacity: (basic.dev_sectors << SECTOR_SHIFT).into(),
        block_bytes: bytes(basic.logical_bs_shift),
        physical_block_bytes: bytes(basic.physical_bs_shift),
        optimal_io_bytes: hint(basic.io_opt_shift),
        max_io_bytes: basic.max_sectors << SECTOR_SHIFT,
        discard_granularity_bytes: discard.discard_granularity,
        max_discard_bytes: discard_bytes(discard.max_discard_sectors),
        max_write_zeroes_bytes: discard_bytes(discard.max_write_zeroes_sectors),
        read_only: basic.attrs & sys::UBLK_ATTR_READ_ONLY != 0,
        write_cache: basic.attrs & sys::UBLK_ATTR_VOLATILE_CACHE != 0,
        serial: Serial::default(),
    }
}

/// log2 of a size that is a power of two; of the next smaller one otherwise.
fn shift(bytes: u32) -> u8 {
    // At most 31.
    bytes.checked_ilog2().unwrap_or(0).to_le_bytes()[0]
}

/// A limit in sectors, whole blocks of it, as far as 32 bits reach.
fn sectors(bytes: u64, block_sectors: u32) -> u32 {
    let sectors = u32::try_from(bytes >> SECTOR_SHIFT).unwrap_or(u32::MAX);
    sectors - sectors % block_sectors
}

#[cfg(test)]
#[path = "params_tests.rs"]
mod tests;
