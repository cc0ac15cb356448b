//! A request that a door has parsed and a storage works on.

use super::buffers::{Buffer, Buffers, zero};
use super::limits::Range;
use super::op::Op;

/// One request, valid from here on. It is finished exactly once, by value.
#[derive(Debug)]
pub struct Request {
    op: Op,
    range: Range,
    buffers: Buffers,
    /// How much of the range is behind us.
    done_bytes: u64,
    armed: Armed,
}

impl Request {
    /// A request for `range`. See [`Limits::check`](super::Limits::check) for how to get one.
    #[must_use]
    pub fn new(op: Op, range: Range, buffers: Buffers) -> Self {
        debug_assert!(!op.has_data() || buffers.len_bytes() == range.len_bytes());
        Self {
            op,
            range,
            buffers,
            done_bytes: 0,
            armed: Armed,
        }
    }

    /// What to do.
    #[must_use]
    #[inline]
    pub fn op(&self) -> Op {
        self.op
    }

    /// First byte of the range on the disk.
    #[must_use]
    #[inline]
    pub fn offset_bytes(&self) -> u64 {
        self.range.offset_bytes()
    }

    /// Length of the range. Where the operation has data it is the length of the buffers, too.
    #[must_use]
    #[inline]
    pub fn len_bytes(&self) -> u64 {
        self.range.len_bytes()
    }

    /// Where the rest of the data goes to or comes from.
    #[must_use]
    #[inline]
    pub fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// Where the rest of the request begins on the disk.
    #[must_use]
    pub fn position_bytes(&self) -> u64 {
        self.offset_bytes() + self.done_bytes
    }

    /// How much is left of it.
    #[must_use]
    pub fn remaining_bytes(&self) -> u64 {
        self.len_bytes() - self.done_bytes
    }

    /// Puts `moved_bytes` of the range, and of the buffers if there are any, behind us.
    ///
    /// # Panics
    ///
    /// When that is more than is left.
    pub fn advance(&mut self, moved_bytes: u64) {
        assert!(
            moved_bytes <= self.remaining_bytes(),
            "more moved than asked for"
        );
        self.done_bytes += moved_bytes;
        if self.op.has_data() {
            // No truncation: it is no more than the buffers' length, which is a usize.
            let more_bytes = usize::try_from(moved_bytes).unwrap_or(usize::MAX);
            self.buffers
                .advance(more_bytes, self.done_bytes - moved_bytes);
        }
    }

    /// Fills what is left of a read into memory with zeroes, which ends it.
    pub fn zero_fill(&mut self) {
        self.buffers.memory().for_each(zero);
        self.advance(self.remaining_bytes());
    }

    /// All buffers in memory as the door made them, for a request that has ended: what of them was
    /// transferred does not matter any more.
    pub fn whole_list(&mut self) -> &[Buffer] {
        self.buffers.whole_list(self.done_bytes)
    }

    /// Ends the request. The door that made it calls this when it has answered its client.
    pub fn finish(self) {
        let Self { armed, .. } = self;
        std::mem::forget(armed);
    }
}

/// Panics in debug builds when a request is dropped without having been finished.
#[derive(Debug)]
struct Armed;

impl Drop for Armed {
    fn drop(&mut self) {
        if cfg!(debug_assertions) && !std::thread::panicking() {
            panic!("a request was dropped without an outcome");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_advance_across_entries() {
        let mut bytes = [1u8; 12];
        let base = bytes.as_mut_ptr();
        let entry = |at: usize, len| Buffer {
            iov_base: base.wrapping_add(at).cast(),
            iov_len: len,
        };
        let mut list = [entry(0, 4), entry(4, 0), entry(4, 8)];
        // SAFETY: `list` and `bytes` live to the end of this test and are not touched otherwise.
        let buffers = unsafe { Buffers::from_list(&mut list) };
        let range = Range::new(512, 12);
        let mut request = Request::new(Op::Read, range, buffers);
        assert_eq!(request.buffers.len_bytes(), 12);
        for (moved, left) in [(3, 9), (0, 9), (2, 7), (1, 6)] {
            request.advance(moved);
            assert_eq!(request.buffers.len_bytes(), left);
            let first = request
                .buffers
                .list()
                .iter()
                .find(|entry| entry.iov_len > 0);
            let at = base.wrapping_add(12 - usize::try_from(left).unwrap());
            assert_eq!(first.map(|entry| entry.iov_base), Some(at.cast()));
        }
        request.zero_fill();
        assert_eq!(request.buffers.len_bytes(), 0);
        request.finish();
        assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn the_buffers_of_a_request_that_ended_anywhere_are_found_whole() {
        let mut bytes = [0u8; 12];
        let base = bytes.as_mut_ptr();
        let entry = |at: usize, len| Buffer {
            iov_base: base.wrapping_add(at).cast(),
            iov_len: len,
        };
        let made = [entry(0, 5), entry(5, 1), entry(6, 6)];
        let range = Range::new(0, 12);
        for steps in [&[][..], &[12], &[3], &[3, 1], &[4, 4, 2], &[5, 1], &[1, 11]] {
            let mut list = made;
            // SAFETY: as above.
            let buffers = unsafe { Buffers::from_list(&mut list) };
            let mut request = Request::new(Op::Read, range, buffers);
            for step in steps {
                request.advance(*step);
            }
            let whole = |list: &[Buffer]| -> Vec<_> {
                let parts = list.iter().map(|entry| (entry.iov_base, entry.iov_len));
                parts.collect()
            };
            assert_eq!(whole(request.whole_list()), whole(&made), "{steps:?}");
            request.finish();
        }
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "without an outcome")]
    fn dropping_an_unfinished_request_panics_in_debug_builds() {
        drop(Request::new(Op::Flush, Range::EMPTY, Buffers::NONE));
    }
}
