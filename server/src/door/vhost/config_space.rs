//! What the device says about itself: features and configuration space (virtio 1.3, 5.2.3 and 5.2.4).

use vhost::vhost_user::message::VHOST_USER_CONFIG_OFFSET;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::request::{Limits, SECTOR_SHIFT};

/// Data segments of one request, as advertised.
pub(super) const SEG_MAX: u32 = 126;

/// Where `writeback` is in the configuration space.
pub(super) const WRITEBACK_OFFSET: u32 = 32;

/// Bytes of the configuration space that are in use (up to the secure-erase fields).
const CONFIG_BYTES: usize = 60;

/// A feature bit as a mask.
pub(super) const fn mask(bit: u32) -> u64 {
    1 << bit
}

/// What a disk offers.
pub(super) fn features(limits: &Limits) -> u64 {
    let mut features = mask(VIRTIO_F_VERSION_1)
        | mask(VIRTIO_RING_F_INDIRECT_DESC)
        | mask(VIRTIO_RING_F_EVENT_IDX)
        | mask(VIRTIO_BLK_F_MQ)
        | mask(VIRTIO_BLK_F_SEG_MAX)
        | mask(VIRTIO_BLK_F_BLK_SIZE)
        | mask(VIRTIO_BLK_F_TOPOLOGY);
    for (offered, bit) in [
        (limits.write_cache, VIRTIO_BLK_F_FLUSH),
        (limits.write_cache, VIRTIO_BLK_F_CONFIG_WCE),
        (limits.max_discard_bytes != 0, VIRTIO_BLK_F_DISCARD),
        (
            limits.max_write_zeroes_bytes != 0,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ),
        (limits.read_only, VIRTIO_BLK_F_RO),
    ] {
        if offered {
            features |= mask(bit);
        }
    }
    features
}

/// The place in the configuration space that a message means by `offset`. Old front-ends of
/// rust-vmm (the crate still has the constant) count from the beginning of the registers of virtio-mmio, whose configuration space begins at 0x100.
pub(super) fn position(offset: u32) -> u32 {
    offset
        .checked_sub(VHOST_USER_CONFIG_OFFSET)
        .unwrap_or(offset)
}

/// `len` bytes of the configuration space from `offset`; zeroes beyond what is in use.
pub(super) fn config(
    limits: &Limits,
    queues: u16,
    seg_max: u32,
    writeback: bool,
    offset: u32,
    len: u32,
) -> Vec<u8> {
    let block = limits.block_bytes;
    let sectors = |bytes: u64| {
        let bytes = bytes - bytes % u64::from(block);
        u32::try_from(bytes >> SECTOR_SHIFT)
            .unwrap_or(u32::MAX - (u32::MAX % (block >> SECTOR_SHIFT)))
    };
    let physical = limits.physical_block_bytes.max(block);
    let physical_exponent = u8::try_from((physical / block).ilog2()).unwrap_or(0);
    let min_io = u16::try_from(physical / block).unwrap_or(1);
    let mut space = [0u8; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(limits.capacity.bytes() >> SECTOR_SHIFT).to_le_bytes());
    put(12, &seg_max.to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[physical_exponent, 0]);
    put(26, &min_io.to_le_bytes());
    put(28, &(limits.optimal_io_bytes / block).to_le_bytes());
    put(32, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    if limits.max_discard_bytes != 0 {
        let granularity = u64::from(limits.discard_granularity_bytes.max(block));
        put(36, &sectors(limits.max_discard_bytes).to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &sectors(granularity).to_le_bytes());
    }
    if limits.max_write_zeroes_bytes != 0 {
        put(48, &sectors(limits.max_write_zeroes_bytes).to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[u8::from(limits.max_discard_bytes != 0)]);
    }
    let (offset, len) = (position(offset) as usize, len as usize);
    (offset..offset.saturating_add(len))
        .map(|at| space.get(at).copied().unwrap_or(0))
        .collect()
}
