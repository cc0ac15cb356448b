//! Where the data of a request is: in a list of buffers that its door lends, or in a buffer of its
//! thread's ring.

use vm_memory::VolatileSlice;

/// Memory that a request reads into or writes from, as the kernel's `struct iovec`.
pub type Buffer = libc::iovec;

/// The buffers of one request: borrowed from the slot of the door that made the request, or
/// registered with its thread's ring.
///
/// The door guarantees that the list and the memory it names stay valid and mapped until the
/// request is finished. The storage may move them forward (short transfers).
#[derive(Debug)]
pub struct Buffers(Place);

#[derive(Debug)]
enum Place {
    /// The entries before `next` are behind us, and as the door made them.
    Memory {
        list: *mut Buffer,
        next: u32,
        count: u32,
    },
    Ring(RingBuffer),
}

/// Data that only the kernel can reach: what is left of a buffer in the ring's table, for
/// `IORING_OP_READ_FIXED` and `WRITE_FIXED`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingBuffer {
    /// Its index in the table.
    pub index: u16,
    /// Where the rest begins.
    pub offset_bytes: usize,
    /// How long the rest is.
    pub len_bytes: usize,
}

/// Fills memory with zeroes.
pub fn zero(memory: VolatileSlice<'_>) {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut rest = memory;
    while !rest.is_empty() {
        rest.copy_from(&ZEROES);
        let done = rest.len().min(ZEROES.len());
        rest = rest.offset(done).expect("it is no longer than the rest");
    }
}

impl Buffers {
    /// No buffers (flush, discard, write-zeroes).
    pub const NONE: Self = Self(Place::Memory {
        list: std::ptr::null_mut(),
        next: 0,
        count: 0,
    });

    /// Borrows `list` for the life of a request.
    ///
    /// # Safety
    ///
    /// `list` and the memory that its entries name must stay valid, and `list` must not be touched
    /// by anyone else, until the [`Request`](super::Request) that holds the result is finished.
    pub unsafe fn from_list(list: &mut [Buffer]) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self::from_raw(list.as_mut_ptr(), list.len()) }
    }

    /// [`from_list`](Self::from_list) of the `count` entries at `list`.
    ///
    /// # Safety
    ///
    /// As for [`from_list`](Self::from_list).
    #[inline]
    pub(super) unsafe fn from_raw(list: *mut Buffer, count: usize) -> Self {
        Self(Place::Memory {
            list,
            next: 0,
            // Doors have some hundred entries at most.
            count: u32::try_from(count).unwrap_or(u32::MAX),
        })
    }

    /// The first `len_bytes` of a buffer in the ring's table. Only for storages that take such
    /// (`Storage::ring_buffers`).
    #[must_use]
    pub fn in_ring(index: u16, len_bytes: usize) -> Self {
        Self(Place::Ring(RingBuffer {
            index,
            offset_bytes: 0,
            len_bytes,
        }))
    }

    /// The buffer in the ring's table, if the data is there.
    #[must_use]
    pub fn ring(&self) -> Option<RingBuffer> {
        match self.0 {
            Place::Memory { .. } => None,
            Place::Ring(buffer) => Some(buffer),
        }
    }

    /// The buffers still to be transferred, if they are in memory.
    #[must_use]
    pub fn list(&self) -> &[Buffer] {
        match self.0 {
            Place::Memory { list, next, count } if count > next => {
                // SAFETY: `from_list` requires the list to outlive the request, which owns `self`;
                // nothing else writes to it meanwhile.
                unsafe {
                    std::slice::from_raw_parts(list.add(next as usize), (count - next) as usize)
                }
            }
            _ => &[],
        }
    }

    /// The memory still to be transferred, if the data is in memory. A client may access it at the same time: it is
    /// only copied.
    pub fn memory(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        let list = self.list().iter();
        // SAFETY: the door keeps the memory mapped until the request is finished (`from_list`), which owns `self`.
        list.map(|buffer| unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) })
    }

    /// Bytes still to be transferred.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        match &self.0 {
            Place::Memory { .. } => self.list().iter().map(|b| b.iov_len as u64).sum(),
            Place::Ring(buffer) => buffer.len_bytes as u64,
        }
    }

    /// Moves the list forward past `more_bytes` transferred bytes, after `before_bytes`.
    pub(super) fn advance(&mut self, more_bytes: usize, before_bytes: u64) {
        if let Place::Ring(buffer) = &mut self.0 {
            assert!(
                more_bytes <= buffer.len_bytes,
                "more bytes transferred than asked for"
            );
            buffer.offset_bytes += more_bytes;
            buffer.len_bytes -= more_bytes;
            return;
        }
        let mut done_bytes = self.complete_entry(before_bytes) + more_bytes;
        let Place::Memory { list, next, count } = &mut self.0 else {
            return;
        };
        while *next < *count && done_bytes > 0 {
            // SAFETY: `list` points at the `count` valid entries of the list (`from_list`), which
            // this request alone may write.
            let head = unsafe { &mut *list.add(*next as usize) };
            if done_bytes < head.iov_len {
                head.iov_base = head.iov_base.wrapping_byte_add(done_bytes);
                head.iov_len -= done_bytes;
                return;
            }
            done_bytes -= head.iov_len;
            *next += 1;
        }
        assert!(done_bytes == 0, "more bytes transferred than asked for");
    }

    /// All buffers in memory as they were lent, when the first `done_bytes` of them are behind us.
    pub(super) fn whole_list(&mut self, done_bytes: u64) -> &[Buffer] {
        self.complete_entry(done_bytes);
        match self.0 {
            Place::Memory { list, count, .. } if count > 0 => {
                // SAFETY: as for `list`.
                unsafe { std::slice::from_raw_parts(list, count as usize) }
            }
            _ => &[],
        }
    }

    /// Gives the entry that the first `done_bytes` end in back what they cut off its beginning; how
    /// much that was.
    fn complete_entry(&mut self, done_bytes: u64) -> usize {
        let Place::Memory { list, next, count } = self.0 else {
            return 0;
        };
        if done_bytes == 0 || next >= count {
            return 0;
        }
        // SAFETY: as for `advance`.
        let list = unsafe { std::slice::from_raw_parts_mut(list, count as usize) };
        let (behind, rest) = list.split_at_mut(next as usize);
        let behind: u64 = behind.iter().map(|entry| entry.iov_len as u64).sum();
        // No truncation: it is less than the length of an entry.
        let cut = usize::try_from(done_bytes - behind).unwrap_or(0);
        rest[0].iov_base = rest[0].iov_base.wrapping_byte_sub(cut);
        rest[0].iov_len += cut;
        cut
    }
}
