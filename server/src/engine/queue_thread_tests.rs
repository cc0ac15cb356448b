//! How a queue thread ends.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use io_uring::{opcode, squeue, types};
use testkit::wait::eventually;

use super::*;
use crate::engine::mailbox::Undelivered;
use crate::io::{Full, Token};
use crate::request::small_disk;
use crate::storage::Null;

/// What a long read writes to. Both bytes are 1 until it does. Leaked: the end of an
/// abandoned operation is not reported.
struct Target {
    begun: AtomicU8,
    ended: AtomicU8,
    vectors: Vec<libc::iovec>,
}

// SAFETY: only the kernel follows the pointers.
unsafe impl Send for Target {}
// SAFETY: as above, and the bytes are atomic.
unsafe impl Sync for Target {}

/// The pieces between the first byte and the last, and how long each is. In all just less than
/// the kernel moves at once.
const PIECES: usize = 1022;
const PIECE_BYTES: usize = 2 << 20;

fn target() -> &'static Target {
    let target = Box::leak(Box::new(Target {
        begun: AtomicU8::new(1),
        ended: AtomicU8::new(1),
        vectors: Vec::new(),
    }));
    let piece = Box::leak(vec![1u8; PIECE_BYTES].into_boxed_slice());
    let vector = |base: *mut u8, len| libc::iovec {
        iov_base: base.cast(),
        iov_len: len,
    };
    let mut vectors = vec![vector(piece.as_mut_ptr(), PIECE_BYTES); PIECES];
    vectors.insert(0, vector(target.begun.as_ptr(), 1));
    vectors.push(vector(target.ended.as_ptr(), 1));
    target.vectors = vectors;
    target
}

/// A door with one operation that no cancellation ends once it has begun: a worker of the
/// kernel reads 2 GiB of holes into the same memory again and again.
struct Door {
    holes: File,
    target: &'static Target,
    quit: bool,
    abandons: bool,
    panics: bool,
}

impl DoorQueue for Door {
    type Command = ();

    fn slots(&self) -> u32 {
        1
    }

    fn ring_operations(&self) -> u32 {
        1
    }

    fn start(&mut self, ring: &mut Ring) -> Result<(), Full> {
        let vectors = &self.target.vectors;
        let count = u32::try_from(vectors.len()).expect("a thousand");
        let fd = types::Fd(self.holes.as_raw_fd());
        let read = opcode::Readv::new(fd, vectors.as_ptr(), count).build();
        let token = Token {
            owner: Owner::Door,
            kind: 0,
            index: 0,
        };
        // SAFETY: vectors and what they point to are leaked.
        unsafe { ring.push(read.flags(squeue::Flags::ASYNC), token) }
    }

    fn command(&mut self, _: &mut Ring, (): ()) {
        assert!(!self.panics, "a bug in a door");
        self.quit = true;
    }

    fn event(&mut self, _: &mut Ring, _: Completion) {}

    fn next(&mut self, _: &mut Ring) -> Option<(Slot, Request)> {
        None
    }

    fn complete(&mut self, _: &mut Ring, _: Slot, _: Request, _: Outcome) {
        unreachable!("there was no request")
    }

    fn end_batch(&mut self, _: &mut Ring) -> Next {
        if self.quit { Next::Exit } else { Next::Idle }
    }

    fn abandons_operations(&self) -> bool {
        self.abandons
    }
}

fn is_written(byte: &AtomicU8) -> bool {
    byte.load(Ordering::Acquire) == 0
}

/// Ends a queue in the middle of the long read. Returns how it ended, and whether it waited for the
/// read.
fn ends_during_the_read(abandons: bool, panics: bool) -> (End, bool) {
    let target = target();
    let holes = rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&holes, 4 << 30).unwrap();
    let door = Door {
        holes: holes.into(),
        target,
        quit: false,
        abandons,
        panics,
    };
    let (commands, mailbox) = Mailbox::new().unwrap();
    let thread = thread::spawn(move || {
        let disk = Null::new(small_disk(1 << 20));
        let thread = QueueThread::new(
            door,
            &disk,
            mailbox,
            &Arc::default(),
            &ThreadOptions::default(),
            &Arc::default(),
        )
        .unwrap();
        let end = thread.run();
        // The end of a thread waits for its kernel workers in any case: look before it.
        (end, is_written(&target.ended))
    });
    eventually("the read begins", || is_written(&target.begun));
    commands.send(()).unwrap();
    let ended = thread.join().unwrap();
    assert_eq!(commands.send(()), Err(Undelivered(())));
    eventually("the read ends", || is_written(&target.ended));
    ended
}

#[test]
fn a_thread_that_ends_waits_for_what_its_door_has_on_the_ring() {
    let (end, waited) = ends_during_the_read(false, false);
    assert!(matches!(end, End::Finished) && waited, "{end}");
}

#[test]
fn a_thread_that_ends_does_not_wait_for_what_its_door_abandons() {
    let (end, waited) = ends_during_the_read(true, false);
    assert!(matches!(end, End::Finished) && !waited, "{end}");
}

#[test]
fn a_thread_that_panics_frees_nothing_that_the_kernel_still_writes_to() {
    let (end, waited) = ends_during_the_read(false, true);
    assert!(waited);
    assert_eq!(end.to_string(), "its thread panicked: a bug in a door");
}
