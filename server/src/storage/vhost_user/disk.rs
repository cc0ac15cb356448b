//! What a vhost-user server says of its disk: features and configuration space (virtio 1.3, 5.2.3 and 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;

use super::vring::MAX_SEGMENTS;
use crate::request::{Limits, MAX_DISK_BYTES, SECTOR_SHIFT, Serial};

/// Largest read or write that the doors offer.
const MAX_IO_BYTES: u32 = 1 << 20;

/// Largest range of one request to the server, where it sets no limit.
const MAX_RANGE_BYTES: u64 = 1 << 30;

/// Bytes of the configuration space up to the end of the limits on write-zeroes.
pub(super) const CONFIG_BYTES: usize = 57;

/// The same up to the number of queues, which is what servers without discards may have.
pub(super) const SHORT_CONFIG_BYTES: usize = 36;

fn mask(bit: u32) -> u64 {
    1 << bit
}

/// The features that are used if a server has them.
fn wanted() -> u64 {
    let bits = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ];
    bits.into_iter().map(mask).sum()
}

/// A disk as its server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    /// The features that both sides have.
    pub features: u64,
    pub size_bytes: u64,
    pub block_bytes: u32,
    physical_block_bytes: u32,
    optimal_io_bytes: u32,
    /// Segments of data in one request, and bytes in each.
    pub max_segments: usize,
    pub max_segment_bytes: u64,
    /// Virtqueues that it says it has.
    pub queues: u16,
    discard_granularity_bytes: u32,
    /// Longest discard and write-zeroes; 0: it has none.
    pub max_discard_bytes: u64,
    pub max_write_zeroes_bytes: u64,
}

/// The configuration space. Integers behind its end are zero.
struct Config<'a>(&'a [u8]);

impl Config<'_> {
    fn number<const N: usize>(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        if let Some(found) = self.0.get(offset..offset + N) {
            bytes[..N].copy_from_slice(found);
        }
        u64::from_le_bytes(bytes)
    }

    fn word(&self, offset: usize) -> u32 {
        // Four bytes fit.
        u32::try_from(self.number::<4>(offset)).unwrap_or(u32::MAX)
    }
}

impl Disk {
    /// No disk.
    pub(super) fn none() -> Self {
        Self {
            features: 0,
            size_bytes: 0,
            block_bytes: 512,
            physical_block_bytes: 512,
            optimal_io_bytes: 0,
            max_segments: 1,
            max_segment_bytes: 512,
            queues: 1,
            discard_granularity_bytes: 512,
            max_discard_bytes: 0,
            max_write_zeroes_bytes: 0,
        }
    }

    /// The disk of a server that offers `features` and has this configuration space.
    ///
    /// # Errors
    ///
    /// Why it cannot be used.
    pub(super) fn parse(features: u64, config: &[u8]) -> Result<Self, String> {
        let features = features & wanted();
        let has = |bit| features & mask(bit) != 0;
        if !has(VIRTIO_F_VERSION_1) {
            return Err("the server has no virtio 1.0 (VIRTIO_F_VERSION_1)".into());
        }
        let config = Config(config);
        let block_bytes = match has(VIRTIO_BLK_F_BLK_SIZE) {
            true => config.word(20),
            false => 512,
        };
        if !block_bytes.is_power_of_two() || !(512..=4096).contains(&block_bytes) {
            return Err(format!(
                "the server's disk has blocks of {block_bytes} bytes: 512, 1024, 2048 or 4096 can be served"
            ));
        }
        let sectors = config.number::<8>(0);
        let most = MAX_DISK_BYTES >> SECTOR_SHIFT;
        let size_bytes = sectors.min(most) << SECTOR_SHIFT;
        let size_bytes = size_bytes - size_bytes % u64::from(block_bytes);
        if sectors > most || size_bytes == 0 {
            return Err(format!(
                "the server's disk has {sectors} sectors, which is not the size of a disk"
            ));
        }
        // QEMU says that it has a limit, and then none.
        let max_segment_bytes = match config.word(8) {
            limit @ 1.. if has(VIRTIO_BLK_F_SIZE_MAX) => u64::from(limit),
            _ => u64::from(MAX_IO_BYTES),
        };
        if max_segment_bytes < u64::from(block_bytes) {
            return Err(format!(
                "the server takes segments of {max_segment_bytes} bytes (size_max), which is less than a block"
            ));
        }
        let max_segments = match has(VIRTIO_BLK_F_SEG_MAX) {
            true => (config.word(12) as usize).clamp(1, MAX_SEGMENTS),
            false => 1,
        };
        let topology = has(VIRTIO_BLK_F_TOPOLOGY);
        let exponent = config.number::<1>(24).min(12);
        let sectors_at = |offset| {
            let bytes = u64::from(config.word(offset)) << SECTOR_SHIFT;
            match bytes {
                0 => MAX_RANGE_BYTES,
                _ => bytes,
            }
        };
        let longest = |feature, offset| match has(feature) {
            true => sectors_at(offset) / u64::from(block_bytes) * u64::from(block_bytes),
            false => 0,
        };
        let alignment = config.word(44).clamp(1, 1 << 20) << SECTOR_SHIFT;
        Ok(Self {
            features,
            size_bytes,
            block_bytes,
            physical_block_bytes: match topology {
                true => block_bytes << exponent,
                false => block_bytes,
            },
            optimal_io_bytes: match topology {
                true => config.word(28).saturating_mul(block_bytes),
                false => 0,
            },
            max_segments,
            max_segment_bytes,
            queues: match has(VIRTIO_BLK_F_MQ) {
                // Two bytes fit.
                true => u16::try_from(config.number::<2>(34)).unwrap_or(1).max(1),
                false => 1,
            },
            discard_granularity_bytes: match has(VIRTIO_BLK_F_DISCARD) {
                true if alignment.is_power_of_two() => alignment.max(block_bytes),
                _ => block_bytes,
            },
            max_discard_bytes: longest(VIRTIO_BLK_F_DISCARD, 36),
            max_write_zeroes_bytes: longest(VIRTIO_BLK_F_WRITE_ZEROES, 48),
        })
    }

    /// Whether completed writes need a flush to be durable.
    pub(super) fn has_cache(&self) -> bool {
        self.features & mask(VIRTIO_BLK_F_FLUSH) != 0
    }

    /// Whether it cannot be written.
    pub(super) fn is_read_only(&self) -> bool {
        self.features & mask(VIRTIO_BLK_F_RO) != 0
    }

    /// Whether the server follows indirect descriptors.
    pub(super) fn has_indirect(&self) -> bool {
        self.features & mask(VIRTIO_RING_F_INDIRECT_DESC) != 0
    }

    /// What the doors are told of it. Blocks may be larger than the server's.
    pub(super) fn limits(&self, block_bytes: u32, read_only: bool, serial: Serial) -> Limits {
        let size_bytes = self.size_bytes - self.size_bytes % u64::from(block_bytes);
        Limits {
            capacity: size_bytes.into(),
            block_bytes,
            physical_block_bytes: self.physical_block_bytes.max(block_bytes),
            optimal_io_bytes: self.optimal_io_bytes,
            max_io_bytes: MAX_IO_BYTES,
            discard_granularity_bytes: self.discard_granularity_bytes.max(block_bytes),
            max_discard_bytes: self.max_discard_bytes,
            max_write_zeroes_bytes: self.max_write_zeroes_bytes,
            read_only: read_only || self.is_read_only(),
            write_cache: self.has_cache(),
            serial,
        }
    }

    /// Whether requests that were made for this disk can be made to `other`, which a server has that came back.
    ///
    /// # Errors
    ///
    /// Why not.
    pub(super) fn may_become(&self, other: &Self, served_bytes: u64) -> Result<(), String> {
        // What the limits below are about, and hints.
        let others = [
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
        ];
        let others = others.iter().fold(0, |all, bit| all | mask(*bit));
        let lacking = self.features & !other.features & !others;
        if other.size_bytes < served_bytes {
            return Err(format!(
                "the disk has {} bytes now and had {served_bytes}: what is behind its end is missing",
                other.size_bytes
            ));
        }
        if other.block_bytes != self.block_bytes {
            return Err(format!(
                "the disk has blocks of {} bytes now and had {}",
                other.block_bytes, self.block_bytes
            ));
        }
        if lacking != 0 {
            return Err(format!(
                "the server lacks features {lacking:#x} that it had"
            ));
        }
        if other.is_read_only() && !self.is_read_only() {
            return Err("the disk is read-only now".into());
        }
        if other.has_cache() && !self.has_cache() {
            return Err("the disk has a write-back cache now and had none".into());
        }
        if other.max_segments < self.max_segments
            || other.max_segment_bytes < self.max_segment_bytes
            || other.max_discard_bytes < self.max_discard_bytes
            || other.max_write_zeroes_bytes < self.max_write_zeroes_bytes
        {
            return Err("the server takes smaller requests than it did".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    /// A configuration space with these integers of four bytes.
    fn config(words: &[(usize, u32)]) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        for (offset, word) in [(0, 2048), (8, 65536), (12, 126), (20, 512)]
            .iter()
            .chain(words)
        {
            config[*offset..offset + 4].copy_from_slice(&word.to_le_bytes());
        }
        config
    }

    #[test]
    fn what_a_server_says_becomes_the_disks_limits() {
        let words = [
            (20, 4096),
            (24, 1),
            (28, 16),
            (36, 1 << 20),
            (44, 64),
            (48, 9),
        ];
        let disk = Disk::parse(ALL, &config(&words)).unwrap();
        let limits = disk.limits(4096, false, Serial::new("s").unwrap());
        assert_eq!(limits.capacity.bytes(), 1 << 20);
        assert_eq!(
            (limits.block_bytes, limits.physical_block_bytes),
            (4096, 8192)
        );
        assert_eq!(limits.optimal_io_bytes, 65536);
        assert_eq!(limits.discard_granularity_bytes, 32768);
        assert_eq!(limits.max_discard_bytes, 512 << 20);
        assert_eq!(limits.max_write_zeroes_bytes, 4096, "whole blocks");
        assert!(limits.read_only && limits.write_cache);
        let plain = Disk::parse(mask(VIRTIO_F_VERSION_1), &config(&[])[..36]).unwrap();
        let limits = plain.limits(512, false, Serial::new("s").unwrap());
        assert_eq!((limits.max_discard_bytes, plain.max_segments), (0, 1));
        assert!(!limits.read_only && !limits.write_cache);
    }

    #[test]
    fn what_no_disk_has_is_refused() {
        for (offset, word) in [
            (20, 0),
            (20, 768),
            (20, 8192),
            (0, 0),
            (4, u32::MAX),
            (8, 511),
        ] {
            assert!(
                Disk::parse(ALL, &config(&[(offset, word)])).is_err(),
                "{offset} {word}"
            );
        }
        assert!(Disk::parse(0, &config(&[])).is_err());
        assert!(Disk::parse(ALL, &[]).is_err());
    }

    #[test]
    fn a_disk_that_comes_back_need_not_give_the_same_hints() {
        let disk = Disk::parse(ALL, &config(&[(24, 3)])).unwrap();
        let hints = mask(VIRTIO_BLK_F_TOPOLOGY) | mask(VIRTIO_BLK_F_SIZE_MAX);
        let again = Disk::parse(ALL & !hints, &config(&[])).unwrap();
        assert_eq!(disk.may_become(&again, disk.size_bytes), Ok(()));
        let one_segment = Disk::parse(ALL & !mask(VIRTIO_BLK_F_SEG_MAX), &config(&[])).unwrap();
        assert!(disk.may_become(&one_segment, disk.size_bytes).is_err());
    }

    #[test]
    fn a_disk_that_comes_back_is_as_large_and_can_do_as_much() {
        let features = ALL & !mask(VIRTIO_BLK_F_RO);
        let disk = Disk::parse(features, &config(&[])).unwrap();
        let again = |features, words: &[_]| Disk::parse(features, &config(words)).unwrap();
        let served = disk.size_bytes;
        assert!(
            disk.may_become(&again(features, &[(0, 4096)]), served)
                .is_ok()
        );
        for (features, words) in [
            (features, &[(0, 2047)][..]),
            (features, &[(20, 1024)]),
            (features, &[(12, 125)]),
            (features & !mask(VIRTIO_BLK_F_DISCARD), &[]),
            (ALL, &[]),
        ] {
            let other = again(features, words);
            assert!(disk.may_become(&other, served).is_err(), "{words:?}");
        }
    }
}
