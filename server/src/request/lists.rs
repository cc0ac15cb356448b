//! The buffer lists of a door's slots.

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::buffers::{Buffer, Buffers};

/// A list of buffers for each slot, allocated once. The kernel and the requests point into the lists of their
/// slots, so a list is only ever reached through a pointer to it alone.
#[derive(Debug)]
pub struct BufferLists {
    first: NonNull<MaybeUninit<Buffer>>,
    slots: usize,
    /// Entries of each list.
    each: usize,
}

impl BufferLists {
    /// Lists of `each` buffers for slots 0 to `slots` - 1. Memory that is not used is not touched.
    #[must_use]
    pub fn new(slots: usize, each: usize) -> Self {
        let lists: Box<[MaybeUninit<Buffer>]> = Box::new_uninit_slice(slots * each);
        Self {
            // A box is never null.
            first: NonNull::new(Box::into_raw(lists).cast()).unwrap_or(NonNull::dangling()),
            slots,
            each,
        }
    }

    /// The first entry of a slot's list.
    ///
    /// # Safety
    ///
    /// There is such a slot.
    #[inline]
    unsafe fn list(&self, slot: usize) -> NonNull<MaybeUninit<Buffer>> {
        debug_assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        // SAFETY: the list of such a slot is inside of the allocation.
        unsafe { self.first.add(slot * self.each) }
    }

    /// The list of a slot, to be filled.
    ///
    /// # Safety
    ///
    /// There is such a slot, and nothing else may use its list meanwhile: not a second call, nor a request that the list was
    /// [lent](Self::lend) to, before it is finished.
    #[expect(clippy::mut_from_ref)]
    #[inline]
    pub unsafe fn fill(&self, slot: usize) -> &mut [MaybeUninit<Buffer>] {
        // SAFETY: inside of the allocation, which lives as long as `self`; the caller is the only user.
        unsafe { std::slice::from_raw_parts_mut(self.list(slot).as_ptr(), self.each) }
    }

    /// Lends the first `count` buffers of a slot to a request.
    ///
    /// # Safety
    ///
    /// There is such a slot. So many must have been [filled](Self::fill), and the memory that they name must stay mapped, until the
    /// request is finished. The lists must stay as long.
    #[inline]
    pub unsafe fn lend(&self, slot: usize, count: usize) -> Buffers {
        debug_assert!(count <= self.each, "{count} buffers of {}", self.each);
        // SAFETY: `count` entries of the list are valid, and the request is their only user, as the caller
        // promises.
        unsafe { Buffers::from_raw(self.list(slot).as_ptr().cast(), count) }
    }

    /// Never frees the lists: the kernel may still use them.
    pub fn leak(self) {
        std::mem::forget(self);
    }
}

impl Drop for BufferLists {
    fn drop(&mut self) {
        let lists = std::ptr::slice_from_raw_parts_mut(self.first.as_ptr(), self.slots * self.each);
        // SAFETY: `new` had it from a box of this length, and no request is left that uses a list.
        drop(unsafe { Box::from_raw(lists) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_different_slots_do_not_overlap() {
        let lists = BufferLists::new(3, 2);
        let entry = |len| Buffer {
            iov_base: std::ptr::null_mut(),
            iov_len: len,
        };
        let lent: Vec<_> = (0..3)
            .map(|slot| {
                // SAFETY: each slot is filled and lent once, and `lists` lives longer.
                unsafe {
                    for (index, place) in lists.fill(slot).iter_mut().enumerate() {
                        place.write(entry(10 * slot + index));
                    }
                    lists.lend(slot, 2)
                }
            })
            .collect();
        let lens = |buffers: &Buffers| buffers.list().iter().map(|one| one.iov_len).collect();
        let lens: Vec<Vec<usize>> = lent.iter().map(lens).collect();
        assert_eq!(lens, [[0, 1], [10, 11], [20, 21]]);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "slot 2 of 2")]
    fn a_slot_that_does_not_exist_has_no_list() {
        // SAFETY: it panics.
        unsafe { BufferLists::new(2, 1).lend(2, 0) };
    }
}
