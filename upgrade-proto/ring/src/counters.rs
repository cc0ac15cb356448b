//! What a handle did, for those who want to know what an upgrade is worth.

/// Counts since the handle was made; plain words that the handle alone touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes handed over by the user or to the user.
    pub bytes: u64,
    /// Of those, bytes that went through a ring.
    pub ring_bytes: u64,
    /// System calls that moved data, waited, woke or negotiated. Setting up and closing are not counted.
    pub system_calls: u64,
    /// Times the peer slept and was woken.
    pub wakes: u64,
    /// Times this end went to sleep.
    pub sleeps: u64,
    /// Times a ring took the place of the pipe.
    pub upgrades: u64,
}
