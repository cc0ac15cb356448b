//! Statistics of a handle.

/// Counts since the handle was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that the caller committed or consumed.
    pub bytes: u64,
    /// Those of them that went through a ring.
    pub ring_bytes: u64,
    /// System calls that moved data, waited, woke or negotiated; not those of setting up and closing.
    pub system_calls: u64,
    /// Wake-ups sent to the peer.
    pub wakes: u64,
    /// Times this end went to sleep.
    pub sleeps: u64,
    /// Times a ring replaced the pipe.
    pub upgrades: u64,
}
