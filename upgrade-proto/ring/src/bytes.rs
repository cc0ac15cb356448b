//! The data of a ring: memory that another process may access at the same time.
//!
//! A `&[u8]` promises that nothing writes to the bytes, and a `&mut [u8]` that nothing else accesses them.
//! Neither holds for memory that a peer has mapped. [`Bytes`] can only be copied out of, and [`Space`] can only
//! be written to. Both copy by relaxed atomic operations of at most a machine word, each word once, except where
//! no other process can write: there a plain copy is faster. Check and use the copy: reading the same place twice
//! may give two answers.
//!
//! This file has all accesses to such data; `memory.rs` has the atomic words beside it.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};

/// A stretch of memory that is valid for reading for `'a`, and that a peer may be writing to.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a> {
    start: NonNull<u8>,
    len_bytes: usize,
    lives: PhantomData<&'a [AtomicU8]>,
}

impl<'a> Bytes<'a> {
    /// # Safety
    /// `start` is valid for reads of `len_bytes` bytes for `'a`, and until then this process writes there by
    /// atomic operations only.
    pub(crate) unsafe fn new(start: NonNull<u8>, len_bytes: usize) -> Self {
        Self {
            start,
            len_bytes,
            lives: PhantomData,
        }
    }

    /// The bytes of private memory.
    pub(crate) fn of(slice: &'a [u8]) -> Self {
        Self {
            start: NonNull::from(slice).cast(),
            len_bytes: slice.len(),
            lives: PhantomData,
        }
    }

    /// Number of bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether there are none. From `peek` that is the end of the stream.
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

    /// All but the first `len_bytes`; empty if there are fewer.
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

    /// Copies as many bytes as fit into `target`; returns their number.
    #[inline]
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let count = self.len_bytes.min(target.len());
        let target = &mut target[..count];
        match is_whole_words(self.start, count) {
            // SAFETY: aligned, and no more bytes than the stretch has.
            true => unsafe { load_words(self.start, target.as_chunks_mut().0) },
            false => self.copy_unaligned(target),
        }
        count
    }

    /// Copies bytes up to the first aligned word, then words, then bytes. `target` is not longer than this.
    #[inline(never)]
    fn copy_unaligned(&self, target: &mut [u8]) {
        let mut from = self.start;
        let (first, rest) = target.split_at_mut(bytes_before_word(from, target.len()));
        for byte in first {
            // SAFETY: inside the stretch, as `target` is not longer.
            (*byte, from) = unsafe { (load_byte(from), from.add(1)) };
        }
        let (words, last) = rest.as_chunks_mut();
        // SAFETY: aligned by the loop above, and inside the stretch.
        unsafe {
            load_words(from, words);
            from = from.add(words.as_flattened().len());
        }
        for byte in last {
            // SAFETY: as for the first bytes.
            (*byte, from) = unsafe { (load_byte(from), from.add(1)) };
        }
    }

    /// A copy of the first `N` bytes; `None` if there are fewer.
    #[inline]
    #[must_use]
    pub fn array<const N: usize>(&self) -> Option<[u8; N]> {
        let mut array = [0; N];
        (self.copy_to(&mut array) == N).then_some(array)
    }

    /// A copy of all of it.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut vec = vec![0; self.len_bytes];
        self.copy_to(&mut vec);
        vec
    }

    /// The address, for a system call that reads from there. Other accesses through it must be volatile or
    /// relaxed atomic loads of at most a machine word: the memory may be mapped read-only.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr()
    }
}

/// A stretch of memory that this end may write to for `'a`, and that a peer may be reading from or writing to.
#[derive(Debug)]
pub(crate) struct Space<'a> {
    start: NonNull<u8>,
    len_bytes: usize,
    /// Nothing else writes there.
    exclusive: bool,
    lives: PhantomData<&'a [AtomicU8]>,
}

impl<'a> Space<'a> {
    /// # Safety
    /// `start` is valid for reads and writes of `len_bytes` bytes for `'a`. If it is `exclusive`, nothing else
    /// writes to them until then, and this process does not read them; otherwise this process accesses them by
    /// atomic operations only.
    #[inline]
    pub(crate) unsafe fn new(start: NonNull<u8>, len_bytes: usize, exclusive: bool) -> Self {
        Self {
            start,
            len_bytes,
            exclusive,
            lives: PhantomData,
        }
    }

    /// Space in private memory.
    pub(crate) fn of(slice: &'a mut [u8]) -> Self {
        Self {
            len_bytes: slice.len(),
            start: NonNull::from(slice).cast(),
            exclusive: true,
            lives: PhantomData,
        }
    }

    /// Writes `source`, beginning at `offset`.
    ///
    /// # Panics
    /// It does not fit.
    #[inline]
    pub(crate) fn put(&mut self, offset: usize, source: &[u8]) {
        let fits = offset <= self.len_bytes && source.len() <= self.len_bytes - offset;
        assert!(fits, "more is written than was reserved");
        // SAFETY: inside the stretch.
        let target = unsafe { self.start.add(offset) };
        if self.exclusive {
            // SAFETY: inside the stretch; `source` is no part of it, as there are no slices of it.
            unsafe { target.copy_from_nonoverlapping(NonNull::from(source).cast(), source.len()) };
            return;
        }
        match is_whole_words(target, source.len()) {
            // SAFETY: aligned, and inside the stretch.
            true => unsafe { store_words(target, source.as_chunks().0) },
            // SAFETY: inside the stretch.
            false => unsafe { store_unaligned(target, source) },
        }
    }

    /// read(2) of `file` into the space from `offset` on; returns the number of bytes.
    pub(crate) fn read_from(&mut self, offset: usize, file: impl AsFd) -> io::Result<usize> {
        let offset = offset.min(self.len_bytes);
        // SAFETY: inside the stretch, or at its end.
        let start = unsafe { self.start.add(offset) }.as_ptr();
        let fd = file.as_fd().as_raw_fd();
        loop {
            // SAFETY: the kernel writes at most the bytes from `start` to the end of the stretch.
            let count = unsafe { libc::read(fd, start.cast(), self.len_bytes - offset) };
            if let Ok(count) = usize::try_from(count) {
                return Ok(count);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// The address, for a system call that writes there.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }
}

/// A machine word: the most that may be loaded atomically from memory that is mapped read-only.
const WORD_BYTES: usize = size_of::<usize>();

/// Whether the bytes are aligned words, as most records are.
#[inline]
fn is_whole_words(start: NonNull<u8>, count: usize) -> bool {
    (start.addr().get() | count).is_multiple_of(WORD_BYTES)
}

/// How many of `count` bytes precede the first aligned word.
fn bytes_before_word(start: NonNull<u8>, count: usize) -> usize {
    start.align_offset(WORD_BYTES).min(count)
}

/// # Safety
/// `from` is valid for reading one byte.
unsafe fn load_byte(from: NonNull<u8>) -> u8 {
    // SAFETY: by the caller's promise; a byte is always aligned.
    unsafe { from.cast::<AtomicU8>().as_ref() }.load(Relaxed)
}

/// # Safety
/// `from` is aligned to words and valid for reading as many bytes as `target` has.
#[inline]
unsafe fn load_words(from: NonNull<u8>, target: &mut [[u8; WORD_BYTES]]) {
    let from = from.cast::<AtomicUsize>();
    for (index, word) in target.iter_mut().enumerate() {
        // SAFETY: by the caller's promise.
        *word = unsafe { from.add(index).as_ref() }
            .load(Relaxed)
            .to_ne_bytes();
    }
}

/// # Safety
/// `to` is valid for writing one byte.
unsafe fn store_byte(to: NonNull<u8>, byte: u8) {
    // SAFETY: by the caller's promise; a byte is always aligned.
    unsafe { to.cast::<AtomicU8>().as_ref() }.store(byte, Relaxed);
}

/// # Safety
/// `to` is aligned to words and valid for writing as many bytes as `source` has.
#[inline]
unsafe fn store_words(to: NonNull<u8>, source: &[[u8; WORD_BYTES]]) {
    let to = to.cast::<AtomicUsize>();
    for (index, word) in source.iter().enumerate() {
        // SAFETY: by the caller's promise.
        unsafe { to.add(index).as_ref() }.store(usize::from_ne_bytes(*word), Relaxed);
    }
}

/// The counterpart of [`Bytes::copy_unaligned`].
///
/// # Safety
/// `to` is valid for writing as many bytes as `source` has.
#[inline(never)]
unsafe fn store_unaligned(mut to: NonNull<u8>, source: &[u8]) {
    let (first, rest) = source.split_at(bytes_before_word(to, source.len()));
    for byte in first {
        // SAFETY: by the caller's promise.
        to = unsafe {
            store_byte(to, *byte);
            to.add(1)
        };
    }
    let (words, last) = rest.as_chunks();
    // SAFETY: by the caller's promise, and aligned by the loop above.
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
mod tests;
