//! Bounce buffers for data that is not aligned as `O_DIRECT` requires.

use std::io;

use vm_memory::VolatileSlice;

use crate::io::AnonymousMemory;
use crate::request::Buffers;

/// Size of a bounce buffer; larger transfers are split.
pub(super) const BOUNCE_BYTES: usize = 256 << 10;

/// Bounce buffers of one queue. Each is mapped when first needed.
const BOUNCE_BUFFERS: usize = 4;

/// Bounce buffers, lent by number.
#[derive(Debug)]
pub(super) struct Pool {
    buffers: [Option<AnonymousMemory>; BOUNCE_BUFFERS],
    lent: [bool; BOUNCE_BUFFERS],
}

impl Pool {
    pub(super) fn new() -> Self {
        Self {
            buffers: [const { None }; BOUNCE_BUFFERS],
            lent: [false; BOUNCE_BUFFERS],
        }
    }

    /// Lends a buffer. `Ok(None)`: all are lent, one will be given back.
    ///
    /// # Errors
    ///
    /// When there is no memory for the first one, so that none will be given back.
    pub(super) fn take(&mut self) -> io::Result<Option<usize>> {
        let Some(number) = self.lent.iter().position(|lent| !lent) else {
            return Ok(None);
        };
        if self.buffers[number].is_none() {
            match AnonymousMemory::new(BOUNCE_BYTES) {
                Ok(memory) => self.buffers[number] = Some(memory),
                Err(_) if self.lent.contains(&true) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        self.lent[number] = true;
        Ok(Some(number))
    }

    pub(super) fn give_back(&mut self, number: usize) {
        debug_assert!(self.lent[number], "bounce buffer {number} was not lent");
        self.lent[number] = false;
    }

    /// A buffer that is lent.
    pub(super) fn memory(&self, number: usize) -> VolatileSlice<'_> {
        let buffer = self.buffers[number].as_ref();
        buffer.expect("a buffer that is lent is mapped").slice()
    }
}

/// Copies the beginning of a request's data to `to`, as much as there is room for.
pub(super) fn gather(from: &Buffers, mut to: VolatileSlice<'_>) {
    for part in from.memory() {
        part.copy_to_volatile_slice(to);
        to = rest(to, part.len());
    }
}

/// Copies `from` to the beginning of a request's memory.
pub(super) fn scatter(mut from: VolatileSlice<'_>, to: &Buffers) {
    for part in to.memory() {
        from.copy_to_volatile_slice(part);
        from = rest(from, part.len());
    }
}

/// What follows after `len_bytes`, if anything.
fn rest(memory: VolatileSlice<'_>, len_bytes: usize) -> VolatileSlice<'_> {
    let done = len_bytes.min(memory.len());
    memory.offset(done).expect("it is not beyond the end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_lends_each_buffer_once() {
        let mut pool = Pool::new();
        let taken: Vec<_> = std::iter::from_fn(|| pool.take().unwrap()).collect();
        assert_eq!(taken, [0, 1, 2, 3]);
        pool.give_back(2);
        assert_eq!(pool.take().unwrap(), Some(2));
        assert_eq!(pool.take().unwrap(), None);
    }
}
