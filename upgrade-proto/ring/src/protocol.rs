//! The order of loads and stores between the two ends of a ring, and nothing else.
//!
//! Every step is generic over the words it works on: the library uses words in shared memory, the model
//! in `tests/ring_model.rs` uses loom's, so that what was modelled is what runs.
//!
//! Positions are free-running 32-bit counts of bytes. `producer - consumer` is what is in the ring, and
//! never more than its size: an end that sees more has a peer that broke the rules, and stops.
//!
//! No wake-up is lost because each side first writes, then fences, then reads what the other writes:
//!
//! ```text
//! publisher: position = n ; full fence ; read the peer's `waiting`
//! sleeper:   waiting = how; full fence ; read the peer's `position`
//! ```
//!
//! At least one of the two reads sees the other's write.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Wake me by a shared futex on your own position.
pub const WAIT_FUTEX: u32 = 1;
/// Wake me through the socket that I poll. Only between two processes: the kernel keeps its own word about
/// those who poll its rings.
pub const WAIT_POLL: u32 = 2;
/// With [`WAIT_FUTEX`]: not before the ring is filled well. Who says so looks by itself before long, so no
/// wake-up is owed, and whoever does not know of this may wake at once.
pub const WAIT_LATE: u32 = 4;

/// A 32-bit word that both ends can see.
pub trait Word {
    /// Reads it.
    fn load(&self, order: std::sync::atomic::Ordering) -> u32;
    /// Writes it.
    fn store(&self, value: u32, order: std::sync::atomic::Ordering);
}

/// A full memory barrier.
pub trait Fence {
    /// Orders everything before it before everything after it.
    fn full();
}

/// What one end writes and the other reads; the first words of that end's page. The position and the rest
/// are on cache lines of their own: looking whether a peer sleeps costs nothing while it moves on.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Page<W> {
    /// Bytes produced, or consumed, since the beginning, modulo 2^32.
    pub position: W,
    /// Reserved for the upper half of a 64-bit position.
    pub high: W,
    reserved: [u32; 30],
    /// How this end sleeps, if it does: [`WAIT_POLL`], [`WAIT_FUTEX`], [`WAIT_LATE`].
    pub waiting: W,
    /// Not zero: this end has left for good. Only between two processes; the kernel says it in the control
    /// page, and this word is reserved there.
    pub closed: W,
}

/// The peer's position is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt;

/// What an end finds out about its peer when it publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How the peer sleeps; zero if it does not.
    pub waiting: u32,
    /// Whether it has said that it left.
    pub closed: bool,
}

/// Makes a position visible and looks whether the peer sleeps.
#[inline]
fn publish<W: Word, F: Fence>(own: &Page<W>, peer: &Page<W>, position: u32) -> Seen {
    own.position.store(position, Release);
    F::full();
    Seen {
        waiting: peer.waiting.load(Relaxed),
        closed: peer.closed.load(Relaxed) != 0,
    }
}

/// Says how this end is about to sleep. What it waits for must be looked at again after this and before
/// it sleeps.
pub fn announce_sleep<W: Word, F: Fence>(own: &Page<W>, how: u32) {
    own.waiting.store(how, Relaxed);
    F::full();
}

/// Says that this end is awake.
pub fn awake<W: Word>(own: &Page<W>) {
    own.waiting.store(0, Relaxed);
}

/// Says that this end leaves, after its last position was published; how the peer is to be woken.
pub fn close<W: Word, F: Fence>(own: &Page<W>, peer: &Page<W>) -> u32 {
    own.closed.store(1, Release);
    F::full();
    peer.waiting.load(Relaxed)
}

/// Whether the peer has said that it left. Its position is final for those who read it after this.
#[inline]
pub fn has_closed<W: Word>(peer: &Page<W>) -> bool {
    peer.closed.load(Acquire) != 0
}

/// The producer's private state.
#[derive(Debug)]
pub struct Writer {
    size: u32,
    position: u32,
    consumed: u32,
}

impl Writer {
    /// A producer of a ring of `size` bytes, a power of two, in which both are at these positions.
    pub fn new(size: u32, position: u32, consumed: u32) -> Result<Self, Corrupt> {
        let this = Self {
            size,
            position,
            consumed,
        };
        (this.used() <= size).then_some(this).ok_or(Corrupt)
    }

    #[inline]
    fn used(&self) -> u32 {
        self.position.wrapping_sub(self.consumed)
    }

    /// Where the next byte goes, counted since the beginning.
    #[inline]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// The consumer's position when it was last looked at.
    pub fn consumed(&self) -> u32 {
        self.consumed
    }

    /// Bytes that are free as far as is known without looking.
    #[inline]
    pub fn room(&self) -> u32 {
        self.size - self.used()
    }

    /// Looks at the consumer's position.
    #[inline]
    pub fn look<W: Word>(&mut self, peer: &Page<W>) -> Result<u32, Corrupt> {
        let consumed = peer.position.load(Acquire);
        // It only moves forward, and not beyond what was produced.
        let taken = consumed.wrapping_sub(self.consumed);
        if taken > self.used() {
            return Err(Corrupt);
        }
        self.consumed = consumed;
        Ok(self.room())
    }

    /// Publishes `count` more bytes, of which there was room for.
    #[inline]
    pub fn commit<W: Word, F: Fence>(&mut self, own: &Page<W>, peer: &Page<W>, count: u32) -> Seen {
        self.position = self.position.wrapping_add(count);
        publish::<W, F>(own, peer, self.position)
    }

    /// Whether what is in the ring passed `mark` bytes with the last `count`.
    pub fn passed<W: Word>(&self, peer: &Page<W>, count: u32, mark: u32) -> bool {
        let used = self.position.wrapping_sub(peer.position.load(Relaxed));
        used >= mark && used.wrapping_sub(count) < mark
    }
}

/// The consumer's private state.
#[derive(Debug)]
pub struct Reader {
    size: u32,
    position: u32,
    published: u32,
    produced: u32,
}

impl Reader {
    /// A consumer of a ring of `size` bytes, a power of two, in which both are at these positions.
    pub fn new(size: u32, position: u32, produced: u32) -> Result<Self, Corrupt> {
        let this = Self {
            size,
            position,
            published: position,
            produced,
        };
        (this.filled() <= size).then_some(this).ok_or(Corrupt)
    }

    /// Where the next byte comes from, counted since the beginning.
    #[inline]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// The producer's position when it was last looked at.
    pub fn produced(&self) -> u32 {
        self.produced
    }

    /// Bytes that can be read as far as is known without looking.
    #[inline]
    pub fn filled(&self) -> u32 {
        self.produced.wrapping_sub(self.position)
    }

    /// Looks at the producer's position.
    #[inline]
    pub fn look<W: Word>(&mut self, peer: &Page<W>) -> Result<u32, Corrupt> {
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

    /// Takes `count` bytes that are filled, without telling the producer.
    #[inline]
    pub fn consume(&mut self, count: u32) {
        self.position = self.position.wrapping_add(count);
    }

    /// Bytes taken that the producer does not know of.
    #[inline]
    pub fn unpublished(&self) -> u32 {
        self.position.wrapping_sub(self.published)
    }

    /// Tells the producer what was taken.
    #[inline]
    pub fn publish<W: Word, F: Fence>(&mut self, own: &Page<W>, peer: &Page<W>) -> Seen {
        self.published = self.position;
        publish::<W, F>(own, peer, self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{FullFence, SharedWord};

    fn at(position: u32) -> Page<SharedWord> {
        let page = Page::default();
        Word::store(&page.position, position, Relaxed);
        page
    }

    #[test]
    fn positions_wrap_at_two_to_the_thirty_two() {
        let start = u32::MAX - 3;
        let (producer, consumer) = (at(start), at(start));
        let mut writer = Writer::new(16, start, start).expect("valid");
        let mut reader = Reader::new(16, start, start).expect("valid");
        for _ in 0..8 {
            assert_eq!(writer.look(&consumer), Ok(16));
            writer.commit::<_, FullFence>(&producer, &consumer, 16);
            assert_eq!(writer.look(&consumer), Ok(0), "full is not empty");
            assert_eq!(reader.look(&producer), Ok(16));
            reader.consume(16);
            reader.publish::<_, FullFence>(&consumer, &producer);
            assert_eq!(reader.look(&producer), Ok(0));
        }
    }

    #[test]
    fn a_position_that_cannot_be_is_refused_by_either_end() {
        let mut writer = Writer::new(16, 100, 90).expect("valid");
        for impossible in [89, 101, 0, u32::MAX, 100 + 16] {
            assert_eq!(writer.look(&at(impossible)), Err(Corrupt), "{impossible}");
        }
        assert_eq!(writer.look(&at(100)), Ok(16));
        assert_eq!(writer.look(&at(99)), Err(Corrupt), "backwards");
        let mut reader = Reader::new(16, 100, 110).expect("valid");
        for impossible in [99, 109, 117, 0, u32::MAX] {
            assert_eq!(reader.look(&at(impossible)), Err(Corrupt), "{impossible}");
        }
        assert_eq!(reader.look(&at(116)), Ok(16));
        assert!(Writer::new(16, 17, 0).is_err() && Reader::new(16, 0, 17).is_err());
    }

    #[test]
    fn a_mark_is_passed_once_whatever_the_steps() {
        for (start, step) in [(0, 1), (u32::MAX - 5, 1), (0, 3), (7, 8), (u32::MAX, 16)] {
            let (producer, consumer) = (at(start), at(start));
            let mut writer = Writer::new(16, start, start).expect("valid");
            let mut passed = Vec::new();
            for _ in 0..16 / step {
                writer.commit::<_, FullFence>(&producer, &consumer, step);
                passed.push(writer.passed(&consumer, step, 8));
            }
            assert_eq!(passed.iter().filter(|passed| **passed).count(), 1);
            assert!(passed[8_u32.div_ceil(step) as usize - 1], "{passed:?}");
            // A consumer that took some sees to it that it is passed again.
            Word::store(&consumer.position, start.wrapping_add(9), Relaxed);
            writer.look(&consumer).expect("valid");
            let left = 16 / step * step - 9;
            writer.commit::<_, FullFence>(&producer, &consumer, 8 - left);
            assert!(writer.passed(&consumer, 8 - left, 8));
        }
    }

    #[test]
    fn a_publisher_sees_how_its_peer_sleeps_and_that_it_left() {
        let (producer, consumer) = (at(0), at(0));
        let mut writer = Writer::new(16, 0, 0).expect("valid");
        announce_sleep::<_, FullFence>(&consumer, WAIT_FUTEX);
        let seen = writer.commit::<_, FullFence>(&producer, &consumer, 1);
        assert_eq!((seen.waiting, seen.closed), (WAIT_FUTEX, false));
        awake(&consumer);
        assert_eq!(close::<_, FullFence>(&consumer, &producer), 0);
        let seen = writer.commit::<_, FullFence>(&producer, &consumer, 1);
        assert_eq!((seen.waiting, seen.closed), (0, true));
        assert!(has_closed(&consumer) && !has_closed(&producer));
    }
}
