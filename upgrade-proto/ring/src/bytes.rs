//! Bytes that another process may be changing while they are looked at.
//!
//! A `&[u8]` promises that nobody writes to it; for memory that a producer shares with us that promise is
//! the producer's to break. [`Bytes`] can only be copied out of, each word read exactly once. What was
//! copied is ours: check it, then use it, and never copy the same place twice to check and to use.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};

/// A stretch of memory that is valid for reading for `'a` and may change meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a> {
    start: NonNull<u8>,
    len_bytes: usize,
    lives: PhantomData<&'a [AtomicU8]>,
}

impl<'a> Bytes<'a> {
    /// # Safety
    /// `start` is valid for reads of `len_bytes` bytes for `'a`, and for that long nobody in this process
    /// writes there but by atomic operations.
    pub(crate) unsafe fn new(start: NonNull<u8>, len_bytes: usize) -> Self {
        Self {
            start,
            len_bytes,
            lives: PhantomData,
        }
    }

    /// Bytes that are private after all.
    pub(crate) fn of(slice: &'a [u8]) -> Self {
        Self {
            start: NonNull::from(slice).cast(),
            len_bytes: slice.len(),
            lives: PhantomData,
        }
    }

    /// How many there are.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether there are none: the end of the stream, where this comes from `peek`.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The first `len_bytes`, or all if there are fewer.
    #[inline]
    #[must_use]
    pub fn first(self, len_bytes: usize) -> Self {
        Self {
            len_bytes: self.len_bytes.min(len_bytes),
            ..self
        }
    }

    /// What is left after the first `len_bytes`; nothing if there are fewer.
    #[inline]
    #[must_use]
    pub fn after(self, len_bytes: usize) -> Self {
        let skipped = self.len_bytes.min(len_bytes);
        Self {
            // SAFETY: at most at the end of the same stretch.
            start: unsafe { self.start.add(skipped) },
            len_bytes: self.len_bytes - skipped,
            ..self
        }
    }

    /// Copies as many bytes as fit; how many that was.
    #[inline]
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let count = self.len_bytes.min(target.len());
        let target = &mut target[..count];
        match is_whole_words(self.start, count) {
            // SAFETY: aligned, and inside the stretch with all of its bytes.
            true => unsafe { load_words(self.start, target.as_chunks_mut().0) },
            false => self.copy_odd_bytes(target),
        }
        count
    }

    /// Single bytes up to the first aligned word, then words, then single bytes; no more than there are.
    #[inline(never)]
    fn copy_odd_bytes(&self, target: &mut [u8]) {
        let mut from = self.start;
        let (first, rest) = target.split_at_mut(lead(from, target.len()));
        for byte in first {
            // SAFETY: inside the stretch: no more bytes are read than it has.
            (*byte, from) = unsafe { (load(from), from.add(1)) };
        }
        let (words, last) = rest.as_chunks_mut();
        // SAFETY: aligned by the loop above, and inside the stretch with all of their bytes.
        unsafe {
            load_words(from, words);
            from = from.add(words.as_flattened().len());
        }
        for byte in last {
            // SAFETY: as for the first bytes.
            (*byte, from) = unsafe { (load(from), from.add(1)) };
        }
    }

    /// The first `N` bytes, copied; `None` if there are fewer.
    #[inline]
    #[must_use]
    pub fn array<const N: usize>(&self) -> Option<[u8; N]> {
        let mut array = [0; N];
        (self.copy_to(&mut array) == N).then_some(array)
    }

    /// All of it, copied.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut vec = vec![0; self.len_bytes];
        self.copy_to(&mut vec);
        vec
    }

    /// The address, for a system call that reads from there. Reading through it otherwise needs volatile or
    /// relaxed atomic loads, of no more than a machine word: the memory may be mapped for reading only.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }
}

/// Of a machine word: the most that may be loaded from memory that is mapped for reading only.
const WORD_BYTES: usize = size_of::<usize>();

/// Whether these bytes are aligned words and nothing else, as records mostly are.
#[inline]
fn is_whole_words(start: NonNull<u8>, count: usize) -> bool {
    (start.addr().get() | count).is_multiple_of(WORD_BYTES)
}

/// How many of `count` bytes come before the first aligned word.
fn lead(start: NonNull<u8>, count: usize) -> usize {
    start.align_offset(WORD_BYTES).min(count)
}

/// # Safety
/// `from` is valid for reading one byte.
unsafe fn load(from: NonNull<u8>) -> u8 {
    // SAFETY: our caller's promise; a byte is always aligned.
    unsafe { from.cast::<AtomicU8>().as_ref() }.load(Relaxed)
}

/// # Safety
/// `from` is aligned to words and valid for reading as many bytes as `target` has.
#[inline]
unsafe fn load_words(from: NonNull<u8>, target: &mut [[u8; WORD_BYTES]]) {
    let from = from.cast::<AtomicUsize>();
    for (index, word) in target.iter_mut().enumerate() {
        // SAFETY: our caller's promise.
        *word = unsafe { from.add(index).as_ref() }
            .load(Relaxed)
            .to_ne_bytes();
    }
}

/// # Safety
/// `to` is valid for writing one byte.
unsafe fn store_byte(to: NonNull<u8>, byte: u8) {
    // SAFETY: our caller's promise; a byte is always aligned.
    unsafe { to.cast::<AtomicU8>().as_ref() }.store(byte, Relaxed);
}

/// # Safety
/// `to` is aligned to words and valid for writing as many bytes as `source` has.
#[inline]
unsafe fn store_words(to: NonNull<u8>, source: &[[u8; WORD_BYTES]]) {
    let to = to.cast::<AtomicUsize>();
    for (index, word) in source.iter().enumerate() {
        // SAFETY: our caller's promise.
        unsafe { to.add(index).as_ref() }.store(usize::from_ne_bytes(*word), Relaxed);
    }
}

/// Copies to where others may be writing, or reading by [`Bytes`], at the same time.
///
/// # Safety
/// `target` is valid for reading and writing as many bytes as `source` has, and nobody in this process
/// accesses them meanwhile but by atomic operations.
#[inline]
pub(crate) unsafe fn store(target: NonNull<u8>, source: &[u8]) {
    match is_whole_words(target, source.len()) {
        // SAFETY: our caller's promise, and aligned.
        true => unsafe { store_words(target, source.as_chunks().0) },
        // SAFETY: our caller's promise.
        false => unsafe { store_odd_bytes(target, source) },
    }
}

/// As [`Bytes::copy_odd_bytes`].
///
/// # Safety
/// As for [`store`].
#[inline(never)]
unsafe fn store_odd_bytes(target: NonNull<u8>, source: &[u8]) {
    let mut to = target;
    let (first, rest) = source.split_at(lead(to, source.len()));
    for byte in first {
        // SAFETY: inside the stretch: no more bytes are written than `source` has.
        to = unsafe {
            store_byte(to, *byte);
            to.add(1)
        };
    }
    let (words, last) = rest.as_chunks();
    // SAFETY: aligned by the loop above, and inside the stretch with all of their bytes.
    unsafe {
        store_words(to, words);
        to = to.add(words.as_flattened().len());
    }
    for byte in last {
        // SAFETY: as for the first bytes.
        to = unsafe {
            store_byte(to, *byte);
            to.add(1)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_and_length_is_copied_whole() {
        let source: Vec<u8> = (0..64).map(|n| n * 3).collect();
        for start in 0..source.len() {
            for end in start..source.len() {
                let bytes = Bytes::of(&source[start..end]);
                assert_eq!(bytes.to_vec(), source[start..end]);
                let mut short = [0xee; 9];
                let copied = bytes.copy_to(&mut short);
                assert_eq!(copied, (end - start).min(9));
                assert_eq!(short[..copied], source[start..start + copied]);
                assert!(short[copied..].iter().all(|byte| *byte == 0xee));
            }
        }
    }

    #[test]
    fn every_place_and_length_is_stored_whole_and_nothing_beside_it() {
        let source: Vec<u8> = (1..=40).collect();
        for place in 0..16 {
            for len_bytes in 0..source.len() {
                let mut target = [0_u8; 64];
                let start = NonNull::from(&mut target[place..]).cast();
                // SAFETY: `target` is ours alone and holds more.
                unsafe { store(start, &source[..len_bytes]) };
                assert_eq!(target[place..place + len_bytes], source[..len_bytes]);
                let beside = target[..place].iter().chain(&target[place + len_bytes..]);
                assert!(
                    beside.copied().all(|byte| byte == 0),
                    "{place}, {len_bytes}"
                );
            }
        }
    }

    #[test]
    fn words_are_whole_at_aligned_places_only() {
        let memory = [0_usize; 3];
        let start = NonNull::from(&memory).cast::<u8>();
        for place in 0..WORD_BYTES {
            for count in 0..=2 * WORD_BYTES {
                // SAFETY: inside `memory`.
                let whole = is_whole_words(unsafe { start.add(place) }, count);
                assert_eq!(whole, place == 0 && count % WORD_BYTES == 0);
            }
        }
    }

    #[test]
    fn parts_never_reach_beyond_the_whole() {
        let source: Vec<u8> = (0..10).collect();
        let bytes = Bytes::of(&source);
        assert_eq!(bytes.first(3).to_vec(), [0, 1, 2]);
        assert_eq!(bytes.first(30).to_vec(), source);
        assert_eq!(bytes.after(8).to_vec(), [8, 9]);
        assert!(bytes.after(11).is_empty());
        assert_eq!(bytes.after(4).array(), Some([4, 5]));
        assert_eq!(bytes.after(9).array::<2>(), None);
    }
}
