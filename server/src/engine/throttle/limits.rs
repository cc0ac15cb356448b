//! What can be limited.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::request::{Op, format_size};

/// What may be done for free after a pause, in milliseconds of the limits, by default. As much as QEMU's throttle allows.
pub const DEFAULT_BURST_MS: u32 = 100;

/// Limits of an export; zero is none. All those that are given apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RateLimits {
    /// Requests per second but for flushes.
    pub iops_total: u64,
    /// Reads per second.
    pub iops_read: u64,
    /// Writes, discards and write-zeroes per second.
    pub iops_write: u64,
    /// Bytes per second, read, written or zeroed.
    pub bps_total: u64,
    /// Bytes read per second.
    pub bps_read: u64,
    /// Bytes written or zeroed per second.
    pub bps_write: u64,
    /// After a pause, what the limits allow in so many milliseconds is let pass at once.
    pub burst_ms: u32,
}

impl Default for RateLimits {
    fn default() -> Self {
        Self {
            iops_total: 0,
            iops_read: 0,
            iops_write: 0,
            bps_total: 0,
            bps_read: 0,
            bps_write: 0,
            burst_ms: DEFAULT_BURST_MS,
        }
    }
}

impl fmt::Display for RateLimits {
    /// As options of an export.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let requests = [
            ("iops-total", self.iops_total),
            ("iops-read", self.iops_read),
            ("iops-write", self.iops_write),
        ];
        let bytes = [
            ("bps-total", self.bps_total),
            ("bps-read", self.bps_read),
            ("bps-write", self.bps_write),
        ];
        for (key, rate) in requests.into_iter().filter(|(_, rate)| *rate > 0) {
            write!(f, "{key}={rate},")?;
        }
        for (key, rate) in bytes.into_iter().filter(|(_, rate)| *rate > 0) {
            write!(f, "{key}={},", format_size(rate))?;
        }
        write!(f, "burst-ms={}", self.burst_ms)
    }
}

/// The number of limits.
pub(super) const LIMITS: usize = 6;

impl RateLimits {
    /// Whether there are any.
    #[must_use]
    pub fn are_set(&self) -> bool {
        self.rates().iter().any(|rate| *rate > 0)
    }

    /// The limits, as [`uses`] numbers them.
    pub(super) fn rates(&self) -> [u64; LIMITS] {
        [
            self.iops_total,
            self.bps_total,
            self.iops_read,
            self.bps_read,
            self.iops_write,
            self.bps_write,
        ]
    }
}

/// Requests that are held back apart from the others, so that a limit on writes does not hold up reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Read => Self::Write,
            Self::Write => Self::Read,
        }
    }

    /// The direction of an operation. A flush has none: it moves nothing, and what it is there for has been paid for by
    /// the writes before it.
    pub(super) fn of(op: Op) -> Option<Self> {
        match op {
            Op::Flush => None,
            Op::Read => Some(Self::Read),
            Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. } => Some(Self::Write),
        }
    }
}

/// What a request takes: the numbers of limits, and of each how much.
pub(super) fn uses(op: Op, direction: Direction, len_bytes: u64) -> [(usize, u64); 4] {
    let bytes = match op {
        // It moves no data, and a mkfs discards the whole disk.
        Op::Discard => 0,
        _ => len_bytes,
    };
    let own = match direction {
        Direction::Read => 2,
        Direction::Write => 4,
    };
    [(0, 1), (1, bytes), (own, 1), (own + 1, bytes)]
}
