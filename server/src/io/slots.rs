//! Fixed tables for requests in flight. They allocate when they are created and never again.

/// The number of a request in flight on one queue thread.
pub type Slot = u32;

/// One entry per slot.
#[derive(Debug)]
pub struct SlotTable<T> {
    entries: Box<[Option<T>]>,
}

impl<T> SlotTable<T> {
    /// A table of `slots` empty entries.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self {
            entries: (0..slots).map(|_| None).collect(),
        }
    }

    /// Puts `value` into an empty slot.
    ///
    /// # Panics
    ///
    /// When the slot is in use or outside the table: two requests would share one answer.
    pub fn put(&mut self, slot: Slot, value: T) -> &mut T {
        let entry = &mut self.entries[slot as usize];
        assert!(entry.is_none(), "slot {slot} is in use");
        entry.insert(value)
    }

    /// Takes the value out of a slot.
    ///
    /// # Panics
    ///
    /// When the slot is empty: a completion for a request that is not in flight.
    pub fn take(&mut self, slot: Slot) -> T {
        let value = self.entries[slot as usize].take();
        value.expect("slot holds a request")
    }

    /// The value in a slot.
    ///
    /// # Panics
    ///
    /// When the slot is empty.
    pub fn get_mut(&mut self, slot: Slot) -> &mut T {
        self.entries[slot as usize]
            .as_mut()
            .expect("slot holds a request")
    }
}

/// The slots that are free, for doors that choose them.
#[derive(Debug)]
pub struct FreeSlots {
    free: Vec<Slot>,
}

impl FreeSlots {
    /// Slots 0 to `slots` - 1, all free.
    #[must_use]
    pub fn new(slots: Slot) -> Self {
        Self {
            free: (0..slots).rev().collect(),
        }
    }

    /// Takes a free slot: the one used last, which is warm in the cache.
    pub fn take(&mut self) -> Option<Slot> {
        self.free.pop()
    }

    /// Returns a slot.
    pub fn give_back(&mut self, slot: Slot) {
        debug_assert!(!self.free.contains(&slot), "slot {slot} returned twice");
        self.free.push(slot);
    }

    /// How many slots are free.
    #[must_use]
    pub fn len(&self) -> usize {
        self.free.len()
    }

    /// Whether no slot is free.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.free.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_free_slot_is_given_out_once() {
        let mut free = FreeSlots::new(3);
        let mut got: Vec<_> = std::iter::from_fn(|| free.take()).collect();
        assert!(free.is_empty());
        got.sort_unstable();
        assert_eq!(got, [0, 1, 2]);
        free.give_back(1);
        assert_eq!(free.take(), Some(1));
    }

    #[test]
    #[should_panic(expected = "slot 1 is in use")]
    fn a_taken_slot_is_not_overwritten() {
        let mut table = SlotTable::new(2);
        table.put(1, "first");
        table.put(1, "second");
    }

    #[test]
    #[should_panic(expected = "slot holds a request")]
    fn a_completion_for_an_empty_slot_is_a_bug() {
        let mut table = SlotTable::new(2);
        table.put(0, ());
        table.take(1);
    }
}
