//! The protocol of loads and stores between the two ends of a ring.
//!
//! A ring is a single-producer, single-consumer queue of bytes with an index page for each end, as the
//! available and used indices of a virtqueue. Everything here is generic over the words it works on: the
//! library uses words in shared memory, and the model in `tests/ring_model.rs` runs the same code with loom's.
//!
//! Positions are free-running 32-bit counts of bytes. `producer - consumer` is the number of bytes in the ring
//! and never more than its size; an end that reads anything else has a peer that broke the protocol, and stops.
//!
//! No wake-up is lost, because each side first stores, then executes a full fence, then loads the other's word:
//!
//! ```text
//! publisher: store own `position`; full fence; load the peer's `waiting`
//! sleeper:   store own `waiting` ; full fence; load the peer's `position`
//! ```
//!
//! At least one of the two loads sees the other side's store.

use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release};

/// In `waiting`: wake this end by a futex on your own position.
pub const WAIT_FUTEX: u32 = 1;
/// In `waiting`: wake this end through the socket, which it polls. Not in the kernel's rings, where the kernel
/// has a word of its own for pollers.
pub const WAIT_POLL: u32 = 2;
/// In `waiting`, with [`WAIT_FUTEX`]: the wake-up may be delayed until the ring has filled up to a mark. The
/// sleeper has a short timeout, so a peer that does not know the bit may wake at once or not at all.
pub const WAIT_COALESCED: u32 = 4;

/// A 32-bit word that both ends can access.
pub trait Word {
    /// Loads the value.
    fn load(&self, order: Ordering) -> u32;
    /// Stores a value.
    fn store(&self, value: u32, order: Ordering);
}

/// A full memory barrier.
pub trait Fence {
    /// Orders all earlier accesses before all later ones.
    fn full();
}

/// The words that one end writes and the other reads, at the beginning of that end's page. The position has a
/// cache line of its own, so that loading `waiting` costs little while the other end moves its position.
#[derive(Debug, Default)]
#[repr(C)]
pub struct IndexPage<W> {
    /// Bytes produced, or consumed, since the beginning, modulo 2^32.
    pub position: W,
    /// Reserved for the upper half of a 64-bit position.
    pub high: W,
    reserved: [u32; 30],
    /// How this end sleeps: [`WAIT_FUTEX`], [`WAIT_POLL`], [`WAIT_COALESCED`]; zero while it does not.
    pub waiting: W,
    /// Nonzero: this end has closed. In the kernel's rings this word is reserved; there the control page says it.
    pub closed: W,
}

/// The peer's position is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt;

/// The peer's state as an end sees it when it publishes its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How the peer sleeps; zero if it does not.
    pub waiting: u32,
    /// Whether the peer has closed.
    pub closed: bool,
}

/// Publishes a position, then loads the peer's state.
#[inline]
fn publish<W: Word, F: Fence>(own: &IndexPage<W>, peer: &IndexPage<W>, position: u32) -> Seen {
    own.position.store(position, Release);
    F::full();
    Seen {
        waiting: peer.waiting.load(Relaxed),
        closed: peer.closed.load(Relaxed) != 0,
    }
}

/// Announces that this end is about to sleep. It must check the peer's words again after this and before it
/// sleeps.
pub fn announce_sleep<W: Word, F: Fence>(own: &IndexPage<W>, how: u32) {
    own.waiting.store(how, Relaxed);
    F::full();
}

/// Announces that this end is awake.
pub fn announce_awake<W: Word>(own: &IndexPage<W>) {
    own.waiting.store(0, Relaxed);
}

/// Announces that this end closes, after its last position was published; returns how the peer sleeps.
pub fn close<W: Word, F: Fence>(own: &IndexPage<W>, peer: &IndexPage<W>) -> u32 {
    own.closed.store(1, Release);
    F::full();
    peer.waiting.load(Relaxed)
}

/// Whether the peer has closed. A position loaded after this is its last one.
#[inline]
pub fn has_closed<W: Word>(peer: &IndexPage<W>) -> bool {
    peer.closed.load(Acquire) != 0
}

/// The private state of one end: its own position, and the peer's when it was last loaded.
pub trait Cursor: Sized {
    /// An end of a ring of `size` bytes, a power of two, with its own position and its peer's.
    fn new(size: u32, own: u32, peer: u32) -> Result<Self, Corrupt>;
    /// The peer's position when it was last loaded.
    fn seen(&self) -> u32;
}

/// The producer's state.
#[derive(Debug)]
pub struct Writer {
    size: u32,
    position: u32,
    consumed: u32,
}

impl Cursor for Writer {
    fn new(size: u32, position: u32, consumed: u32) -> Result<Self, Corrupt> {
        let this = Self {
            size,
            position,
            consumed,
        };
        (this.used() <= size).then_some(this).ok_or(Corrupt)
    }

    fn seen(&self) -> u32 {
        self.consumed
    }
}

impl Writer {
    #[inline]
    fn used(&self) -> u32 {
        self.position.wrapping_sub(self.consumed)
    }

    /// The position of the next byte.
    #[inline]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Bytes known to be free.
    #[inline]
    pub fn free(&self) -> u32 {
        self.size - self.used()
    }

    /// Loads the consumer's position; returns the bytes that are free.
    #[inline]
    pub fn refresh<W: Word>(&mut self, peer: &IndexPage<W>) -> Result<u32, Corrupt> {
        let consumed = peer.position.load(Acquire);
        // It only moves forward, and not beyond what was produced.
        if consumed.wrapping_sub(self.consumed) > self.used() {
            return Err(Corrupt);
        }
        self.consumed = consumed;
        Ok(self.free())
    }

    /// Publishes `count` more bytes, which were free.
    #[inline]
    pub fn commit<W: Word, F: Fence>(
        &mut self,
        own: &IndexPage<W>,
        peer: &IndexPage<W>,
        count: u32,
    ) -> Seen {
        self.position = self.position.wrapping_add(count);
        publish::<W, F>(own, peer, self.position)
    }

    /// Whether the last `count` bytes filled the ring up to `mark` bytes.
    pub fn passed<W: Word>(&self, peer: &IndexPage<W>, count: u32, mark: u32) -> bool {
        let used = self.position.wrapping_sub(peer.position.load(Relaxed));
        used >= mark && used.wrapping_sub(count) < mark
    }
}

/// The consumer's state.
#[derive(Debug)]
pub struct Reader {
    size: u32,
    position: u32,
    published: u32,
    produced: u32,
}

impl Cursor for Reader {
    fn new(size: u32, position: u32, produced: u32) -> Result<Self, Corrupt> {
        let this = Self {
            size,
            position,
            published: position,
            produced,
        };
        (this.filled() <= size).then_some(this).ok_or(Corrupt)
    }

    fn seen(&self) -> u32 {
        self.produced
    }
}

impl Reader {
    /// The position of the next byte.
    #[inline]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Bytes known to be readable.
    #[inline]
    pub fn filled(&self) -> u32 {
        self.produced.wrapping_sub(self.position)
    }

    /// Loads the producer's position; returns the bytes that are readable.
    #[inline]
    pub fn refresh<W: Word>(&mut self, peer: &IndexPage<W>) -> Result<u32, Corrupt> {
        let produced = peer.position.load(Acquire);
        // It only moves forward, and not beyond what the producer may know to be free.
        let known = self.produced.wrapping_sub(self.published);
        let used = produced.wrapping_sub(self.published);
        if used > self.size || used < known {
            return Err(Corrupt);
        }
        self.produced = produced;
        Ok(self.filled())
    }

    /// Takes `count` readable bytes without publishing that.
    #[inline]
    pub fn consume(&mut self, count: u32) {
        self.position = self.position.wrapping_add(count);
    }

    /// Bytes that were taken and not published.
    #[inline]
    pub fn unpublished(&self) -> u32 {
        self.position.wrapping_sub(self.published)
    }

    /// Publishes what was taken.
    #[inline]
    pub fn publish<W: Word, F: Fence>(&mut self, own: &IndexPage<W>, peer: &IndexPage<W>) -> Seen {
        self.published = self.position;
        publish::<W, F>(own, peer, self.position)
    }
}

#[cfg(test)]
mod tests;
