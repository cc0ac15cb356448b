//! Requests on queues, for tests.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use std::path::Path;

use io_uring::squeue;

use super::*;
use crate::request::{Buffer, Buffers, Range, Serial};
use crate::storage::CacheMode;
use crate::storage::file::{FileOptions, open};

pub(super) fn opened(path: &Path, cache: CacheMode) -> Shared {
    let options = FileOptions {
        export: "test".into(),
        path: path.into(),
        cache,
        format: None,
        read_only: false,
        block_bytes: Some(512),
        serial: Serial::new("test").unwrap(),
        claim_later: false,
    };
    open::open(options).unwrap().1
}

pub(super) fn queue(alignment: Option<Alignment>) -> FileQueue {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut shared = opened(file.path(), CacheMode::Buffered);
    shared.alignment = alignment;
    // Step by step, wherever the file lies.
    shared.is_in_memory = false;
    FileQueue::new(Arc::new(shared), &mut Ring::new(8).unwrap(), 8).unwrap()
}

/// Memory of a request in two halves.
pub(super) struct Memory {
    pub(super) bytes: Vec<u8>,
    list: Vec<Buffer>,
}

impl Memory {
    pub(super) fn new(len: usize) -> Self {
        let mut bytes = vec![0xaa; len];
        let list = Self::halves(&mut bytes);
        Self { bytes, list }
    }

    fn halves(bytes: &mut [u8]) -> Vec<Buffer> {
        let (first, second) = bytes.split_at_mut(bytes.len() / 2);
        let buffer = |part: &mut [u8]| Buffer {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        };
        vec![buffer(first), buffer(second)]
    }

    pub(super) fn request(&mut self, op: Op) -> Request {
        let range = Range::new(4096, self.bytes.len() as u64);
        // SAFETY: every test finishes its request before its memory goes.
        let buffers = unsafe { Buffers::from_list(&mut self.list) };
        Request::new(op, range, buffers)
    }
}

/// A step, its result, and what follows it.
pub(super) type Led = (Step, i32, Result<Option<Step>, IoError>);

/// A request on a queue of its own. It is finished with the value.
pub(super) struct Bench {
    pub(super) queue: FileQueue,
    pub(super) request: Option<Request>,
    pub(super) memory: Memory,
}

impl Bench {
    /// A request of 4096 bytes.
    pub(super) fn new(alignment: Option<Alignment>, op: Op) -> Self {
        let mut memory = Memory::new(4096);
        Self {
            queue: queue(alignment),
            request: Some(memory.request(op)),
            memory,
        }
    }

    /// A request for 8192 bytes that carries none.
    pub(super) fn ranged(op: Op) -> Self {
        Self {
            queue: queue(None),
            request: Some(ranged(op, 8192)),
            memory: Memory::new(0),
        }
    }

    pub(super) fn parts(&mut self) -> (&mut FileQueue, &mut Request) {
        (&mut self.queue, self.request.as_mut().unwrap())
    }

    /// Feeds the request with the results of its steps; each must lead to the step behind it.
    pub(super) fn lead(&mut self, steps: &[Led]) {
        let (queue, request) = self.parts();
        for &(step, result, next) in steps {
            let led = queue.next_step(step, request, result);
            assert_eq!(led, next, "{result} of {step:?}");
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.request.take().unwrap().finish();
    }
}

pub(super) fn ranged(op: Op, len_bytes: u64) -> Request {
    let range = Range::new(0, len_bytes);
    Request::new(op, range, Buffers::NONE)
}

/// What the queue would put on the ring.
pub(super) fn operation(
    queue: &mut FileQueue,
    step: Step,
    request: &Request,
) -> io::Result<squeue::Entry> {
    queue.operations.entry(step, request)
}

pub(super) fn sqe(entry: &squeue::Entry) -> [u8; 64] {
    const { assert!(size_of::<squeue::Entry>() == 64) };
    // SAFETY: an entry is 64 bytes of integers.
    unsafe { std::ptr::from_ref(entry).cast::<[u8; 64]>().read() }
}

/// `rw_flags` and `fsync_flags` share a place in the entry.
pub(super) fn flags(entry: &squeue::Entry) -> u32 {
    u32::from_ne_bytes(sqe(entry)[28..32].try_into().unwrap())
}

pub(super) const SECTORS: Alignment = Alignment {
    memory_bytes: 512,
    block_bytes: 512,
};
pub(super) const PLAIN: Step = Step::Transfer { forced: false };
pub(super) const WITH_DSYNC: Step = Step::Transfer { forced: true };
pub(super) const WRITE: Op = Op::Write { fua: false };
pub(super) const FORCED: Op = Op::Write { fua: true };
pub(super) const ZEROES: Op = Op::WriteZeroes {
    unmap: false,
    fua: false,
};
