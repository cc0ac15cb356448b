//! Memory that the kernel keeps at hand for one ring: its pages are looked up and held once, not for
//! each operation (`IORING_REGISTER_BUFFERS2`, Linux 5.19).

use std::io;

use io_uring::Submitter;

/// The kernel's limit for one entry of the table.
const ENTRY_BYTES: usize = 1 << 30;

/// Entries of the table: a guest with half a TiB in one piece, and many smaller pieces.
const ENTRIES: u16 = 1024;

/// A piece of this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its first byte.
    pub start: usize,
    /// How long it is.
    pub len_bytes: usize,
}

impl Piece {
    /// Whether `len_bytes` from `at` on lie in it.
    fn holds(&self, at: usize, len_bytes: usize) -> bool {
        let offset = at.wrapping_sub(self.start);
        offset < self.len_bytes && len_bytes <= self.len_bytes - offset
    }
}

/// What is in the ring's table, by index.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    /// Empty until something is pinned.
    entries: Box<[Option<Piece>]>,
    /// Indices from here on are free.
    end: usize,
    /// Where the last question was answered.
    last: usize,
}

impl Pinned {
    /// The index of the entry that holds a range.
    #[inline]
    pub(super) fn find(&mut self, at: usize, len_bytes: usize) -> Option<u16> {
        let holds = |entry: &Option<Piece>| entry.is_some_and(|piece| piece.holds(at, len_bytes));
        if !self.entries.get(self.last).is_some_and(holds) {
            self.last = self.entries[..self.end].iter().position(holds)?;
        }
        // No truncation: there are `ENTRIES` of them.
        u16::try_from(self.last).ok()
    }

    /// Changes the table so that it holds `pieces` and nothing else. Entries that stay are not touched.
    ///
    /// # Safety
    ///
    /// The pieces must be mapped until others take their place. (Operations under way keep the pages,
    /// not the mapping, and need no more.)
    pub(super) unsafe fn set(
        &mut self,
        submitter: &Submitter<'_>,
        pieces: &[Piece],
    ) -> io::Result<()> {
        if self.entries.is_empty() {
            if pieces.is_empty() {
                return Ok(());
            }
            submitter.register_buffers_sparse(ENTRIES.into())?;
            self.entries = vec![None; usize::from(ENTRIES)].into();
        }
        let mut wanted: Vec<Piece> = pieces.iter().flat_map(cut).collect();
        let mut gone = Vec::new();
        for (index, entry) in self.entries.iter_mut().enumerate() {
            let Some(piece) = *entry else { continue };
            if let Some(kept) = wanted.iter().position(|one| *one == piece) {
                wanted.swap_remove(kept);
            } else {
                // Not to be found any more, whatever the kernel says.
                *entry = None;
                gone.push(index);
            }
        }
        for index in gone {
            // SAFETY: points to nothing.
            unsafe { self.put(submitter, index, None)? };
        }
        let free = |entries: &[Option<Piece>]| entries.iter().position(Option::is_none);
        for piece in wanted {
            let index = free(&self.entries)
                .ok_or_else(|| io::Error::other("the memory is in too many pieces"))?;
            // SAFETY: the caller keeps it mapped.
            unsafe { self.put(submitter, index, Some(piece))? };
        }
        let used = self.entries.iter().rposition(Option::is_some);
        self.end = used.map_or(0, |last| last + 1);
        Ok(())
    }

    /// # Safety
    ///
    /// As for [`set`](Self::set).
    unsafe fn put(
        &mut self,
        submitter: &Submitter<'_>,
        index: usize,
        piece: Option<Piece>,
    ) -> io::Result<()> {
        let entry = libc::iovec {
            iov_base: piece.map_or(0, |piece| piece.start) as *mut libc::c_void,
            iov_len: piece.map_or(0, |piece| piece.len_bytes),
        };
        // What cannot be put in must not be found, and neither what was there.
        self.entries[index] = None;
        let place = u32::try_from(index).map_err(io::Error::other)?;
        // SAFETY: the caller's promise.
        unsafe { submitter.register_buffers_update(place, &[entry], Some(&[0]))? };
        self.entries[index] = piece;
        self.end = self.end.max(index + 1);
        Ok(())
    }
}

/// A piece as entries of the table.
fn cut(piece: &Piece) -> impl Iterator<Item = Piece> + use<> {
    let Piece { start, len_bytes } = *piece;
    (0..len_bytes)
        .step_by(ENTRY_BYTES)
        .map(move |offset| Piece {
            start: start + offset,
            len_bytes: ENTRY_BYTES.min(len_bytes - offset),
        })
}

#[cfg(test)]
mod tests {
    use super::super::Ring;
    use super::*;

    fn table(pieces: &[(usize, usize)]) -> Pinned {
        let entries: Box<[_]> = pieces
            .iter()
            .map(|&(start, len_bytes)| (len_bytes > 0).then_some(Piece { start, len_bytes }))
            .collect();
        Pinned {
            end: entries.len(),
            entries,
            last: 0,
        }
    }

    #[test]
    fn a_range_is_found_where_it_lies_as_a_whole_and_nowhere_else() {
        let mut pinned = table(&[(0x1000, 0x1000), (0, 0), (0x8000, 0x2000)]);
        for (at, len, index) in [
            (0x1000, 0x1000, Some(0)),
            (0x9fff, 1, Some(2)),
            (0x1fff, 1, Some(0)),
            (0x8000, 0x2000, Some(2)),
            (0x1fff, 2, None),
            (0xfff, 1, None),
            (0xa000, 1, None),
            (0x9000, usize::MAX, None),
            (0, 0, None),
        ] {
            assert_eq!(pinned.find(at, len), index, "{at:#x}+{len:#x}");
        }
        assert_eq!(Pinned::default().find(0x1000, 1), None);
    }

    #[test]
    fn long_pieces_are_cut_as_the_kernel_wants_them() {
        let piece = Piece {
            start: 0x1000,
            len_bytes: 2 * ENTRY_BYTES + 4096,
        };
        let cut: Vec<_> = cut(&piece)
            .map(|piece| (piece.start, piece.len_bytes))
            .collect();
        let second = 0x1000 + ENTRY_BYTES;
        assert_eq!(
            cut,
            [
                (0x1000, ENTRY_BYTES),
                (second, ENTRY_BYTES),
                (second + ENTRY_BYTES, 4096)
            ]
        );
    }

    #[test]
    fn the_kernel_takes_what_comes_and_gives_back_what_goes() {
        let memory = vec![0u8; 3 * 8192];
        let at = |index: usize| Piece {
            start: memory.as_ptr() as usize + index * 8192,
            len_bytes: 8192,
        };
        let mut ring = Ring::new(8).unwrap();
        let find = |ring: &mut Ring, piece: Piece| ring.pinned(piece.start, piece.len_bytes);
        // SAFETY: the memory lives to the end of the test.
        unsafe {
            ring.pin(&[]).unwrap();
            ring.pin(&[at(0), at(1)]).unwrap();
        }
        assert_eq!(find(&mut ring, at(0)), Some(0));
        assert_eq!(find(&mut ring, at(1)), Some(1));
        // SAFETY: as above.
        unsafe { ring.pin(&[at(2), at(1)]).unwrap() };
        assert_eq!(find(&mut ring, at(0)), None);
        assert_eq!(find(&mut ring, at(1)), Some(1), "stays where it is");
        assert_eq!(find(&mut ring, at(2)), Some(0));
        let nowhere = Piece {
            start: 4096,
            len_bytes: 4096,
        };
        // SAFETY: the kernel looks whether it is mapped.
        let refused = unsafe { ring.pin(&[at(1), nowhere]) };
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(find(&mut ring, nowhere), None);
        // SAFETY: as above.
        unsafe { ring.pin(&[]).unwrap() };
        assert_eq!(find(&mut ring, at(1)), None);
    }
}
