//! The steps of a request, fed with results by hand.

use io_uring::{opcode, squeue};

use super::*;
use crate::request::{Buffer, Buffers, Range, Serial};
use crate::storage::file::{FileOptions, open};

fn queue(alignment: Option<Alignment>) -> FileQueue {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let (_, mut shared) = open::open(FileOptions {
        path: file.path().into(),
        cache: crate::storage::CacheMode::Buffered,
        read_only: false,
        block_bytes: None,
        serial: Serial::new("test").unwrap(),
        claim_later: false,
    })
    .unwrap();
    shared.alignment = alignment;
    // Step by step, wherever the file lies.
    shared.is_in_memory = false;
    FileQueue::new(Arc::new(shared), &mut Ring::new(8).unwrap(), 8).unwrap()
}

/// Memory of a request in two halves.
struct Memory {
    bytes: Vec<u8>,
    list: Vec<Buffer>,
}

impl Memory {
    fn new(len: usize) -> Self {
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

    fn request(&mut self, op: Op) -> Request {
        let range = Range::new(4096, self.bytes.len() as u64);
        // SAFETY: every test finishes its request before its memory goes.
        let buffers = unsafe { Buffers::from_list(&mut self.list) };
        Request::new(op, range, buffers)
    }
}

fn ranged(op: Op, len_bytes: u64) -> Request {
    let range = Range::new(0, len_bytes);
    Request::new(op, range, Buffers::NONE)
}

/// What the queue would put on the ring.
fn operation(queue: &mut FileQueue, step: Step, request: &Request) -> io::Result<squeue::Entry> {
    queue.operations.entry(step, request)
}

fn sqe(entry: &squeue::Entry) -> [u8; 64] {
    const { assert!(size_of::<squeue::Entry>() == 64) };
    // SAFETY: an entry is 64 bytes of integers.
    unsafe { std::ptr::from_ref(entry).cast::<[u8; 64]>().read() }
}

/// `rw_flags` and `fsync_flags` share a place in the entry.
fn flags(entry: &squeue::Entry) -> u32 {
    u32::from_ne_bytes(sqe(entry)[28..32].try_into().unwrap())
}

const SECTORS: Alignment = Alignment {
    memory_bytes: 512,
    block_bytes: 512,
};
const PLAIN: Step = Step::Transfer { forced: false };
const WITH_DSYNC: Step = Step::Transfer { forced: true };
const WRITE: Op = Op::Write { fua: false };
const FORCED: Op = Op::Write { fua: true };

#[test]
fn a_short_transfer_goes_on_where_it_stopped() {
    for op in [Op::Read, WRITE] {
        let mut queue = queue(None);
        let mut memory = Memory::new(4096);
        let mut request = memory.request(op);
        let step = queue.next_step(PLAIN, &mut request, 3000);
        assert_eq!(step, Ok(Some(PLAIN)));
        assert_eq!(
            (request.position_bytes(), request.remaining_bytes()),
            (7096, 1096)
        );
        assert_eq!(request.buffers().len_bytes(), 1096);
        assert_eq!(queue.next_step(PLAIN, &mut request, 1096), Ok(None));
        request.finish();
    }
}

#[test]
fn a_read_at_the_end_of_the_file_is_zero_filled() {
    let mut queue = queue(None);
    let mut memory = Memory::new(4096);
    let mut request = memory.request(Op::Read);
    let step = queue.next_step(PLAIN, &mut request, 1000);
    assert_eq!(step, Ok(Some(PLAIN)));
    assert_eq!(queue.next_step(PLAIN, &mut request, 0), Ok(None));
    request.finish();
    assert!(memory.bytes[..1000].iter().all(|&byte| byte == 0xaa));
    assert!(memory.bytes[1000..].iter().all(|&byte| byte == 0));
}

#[test]
fn data_in_the_table_of_the_ring_is_read_and_written_there() {
    for (op, code) in [
        (Op::Read, opcode::ReadFixed::CODE),
        (FORCED, opcode::WriteFixed::CODE),
    ] {
        let mut queue = queue(Some(SECTORS));
        let range = Range::new(8192, 4096);
        let mut request = Request::new(op, range, Buffers::in_ring(7, 4096));
        let first = queue.first_step(&request).unwrap().unwrap();
        assert!(
            matches!(first, Step::Transfer { .. }),
            "no bounce buffer can help"
        );
        assert_eq!(queue.next_step(first, &mut request, 1024), Ok(Some(first)));
        let entry = operation(&mut queue, first, &request).unwrap();
        let bytes = sqe(&entry);
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(bytes[0], code);
        // Position on the disk, position in the buffer, what is left, the buffer.
        assert_eq!((word(8), word(16)), (8192 + 1024, 1024));
        assert_eq!(bytes[24..28], 3072u32.to_ne_bytes());
        assert_eq!(bytes[40..42], 7u16.to_ne_bytes());
        assert_eq!(flags(&entry) != 0, op == FORCED);
        assert_eq!(queue.next_step(first, &mut request, 3072), Ok(None));
        request.finish();
    }
}

#[test]
fn what_lies_behind_the_end_of_the_file_comes_from_the_zero_device() {
    let mut queue = queue(None);
    let range = Range::new(0, 4096);
    let mut request = Request::new(Op::Read, range, Buffers::in_ring(0, 4096));
    assert_eq!(queue.next_step(PLAIN, &mut request, 1000), Ok(Some(PLAIN)));
    let zeroes = Ok(Some(Step::ReadZeroes));
    assert_eq!(queue.next_step(PLAIN, &mut request, 0), zeroes);
    let bytes = sqe(&operation(&mut queue, Step::ReadZeroes, &request).unwrap());
    assert_eq!(bytes[0], opcode::ReadFixed::CODE);
    assert_eq!(bytes[16..24], 1000u64.to_ne_bytes());
    let device = queue.operations.zero_device.as_ref().unwrap().as_raw_fd();
    assert_eq!(bytes[4..8], device.to_ne_bytes());
    assert_eq!(queue.next_step(Step::ReadZeroes, &mut request, 96), zeroes);
    assert_eq!(
        queue.next_step(Step::ReadZeroes, &mut request, 3000),
        Ok(None)
    );
    request.finish();
}

#[test]
fn a_write_that_moves_nothing_is_an_error() {
    let mut queue = queue(None);
    let mut memory = Memory::new(4096);
    let mut request = memory.request(WRITE);
    let step = queue.next_step(PLAIN, &mut request, 0);
    assert_eq!(step, Err(IoError::Io));
    request.finish();
}

#[test]
fn around_the_page_cache_a_transfer_goes_on_at_a_whole_block() {
    let mut queue = queue(Some(SECTORS));
    let mut memory = Memory::new(4096);
    let mut request = memory.request(WRITE);
    let step = queue.next_step(PLAIN, &mut request, 1000);
    assert_eq!(step, Ok(Some(PLAIN)));
    assert_eq!(request.position_bytes(), 4096 + 512);
    let step = queue.next_step(PLAIN, &mut request, 511);
    assert_eq!(step, Err(IoError::Io), "no whole block was written");
    request.finish();
}

#[test]
fn an_interrupted_step_is_tried_again_after_pauses_and_not_for_ever() {
    for errno in [libc::EINTR, libc::EAGAIN] {
        let mut queue = queue(None);
        let mut ring = Ring::new(8).unwrap();
        let mut memory = Memory::new(4096);
        let mut request = memory.request(WRITE);
        assert_eq!(queue.start(&mut ring, 0, &mut request), Progress::Pending);
        let mut pauses = 0;
        let outcome = loop {
            match queue.advance(&mut ring, 0, &mut request, STEP, -errno) {
                Progress::Done(outcome) => break outcome,
                progress => assert_eq!(progress, Progress::Pending),
            }
            pauses += 1;
            let progress = queue.advance(&mut ring, 0, &mut request, PAUSE, -libc::ETIME);
            assert_eq!(progress, Progress::Pending, "the step again");
            assert!(ring.drain(Duration::from_secs(10), None));
        };
        assert_eq!(outcome, Err(IoError::Io));
        assert_eq!(pauses, MAX_RETRIES);
        request.finish();
    }
}

#[test]
fn a_step_that_moves_on_has_all_its_retries_again() {
    let mut queue = queue(None);
    let mut ring = Ring::new(8).unwrap();
    let mut memory = Memory::new(4096);
    let mut request = memory.request(WRITE);
    assert_eq!(queue.start(&mut ring, 0, &mut request), Progress::Pending);
    let again = queue.advance(&mut ring, 0, &mut request, STEP, -libc::EAGAIN);
    assert_eq!((again, queue.slots[0].retries), (Progress::Pending, 1));
    let moved = queue.advance(&mut ring, 0, &mut request, STEP, 1024);
    assert_eq!((moved, queue.slots[0].retries), (Progress::Pending, 0));
    request.finish();
}

/// A flush of a disk through the page cache after `step` failed with `errno`.
fn flush_after(
    alignment: Option<Alignment>,
    step: Step,
    errno: i32,
) -> Result<Option<Step>, IoError> {
    let mut queue = queue(alignment);
    let mut failed = ranged(Op::Flush, 0);
    assert!(queue.next_step(step, &mut failed, -errno).is_err());
    failed.finish();
    let mut flush = ranged(Op::Flush, 0);
    let first = queue.first_step(&flush);
    if first.is_err() {
        let in_flight = queue.next_step(Step::Sync, &mut flush, 0);
        assert_eq!(
            in_flight,
            Err(IoError::Io),
            "one that was in flight already"
        );
    }
    flush.finish();
    first
}

#[test]
fn after_a_failed_flush_through_the_page_cache_all_flushes_fail() {
    for (step, errno) in [
        (Step::Sync, libc::EIO),
        (Step::Sync, libc::ENOSPC),
        (WITH_DSYNC, libc::EIO),
    ] {
        assert_eq!(flush_after(None, step, errno), Err(IoError::Io));
    }
    // Nothing was cached: the next flush may succeed.
    for (alignment, step, errno) in [
        (Some(SECTORS), Step::Sync, libc::EIO),
        (None, PLAIN, libc::EIO),
        (None, WITH_DSYNC, libc::ENOSPC),
    ] {
        assert_eq!(flush_after(alignment, step, errno), Ok(Some(Step::Sync)));
    }
}

#[test]
fn an_operation_that_fails_for_one_range_is_tried_again_for_others() {
    let mut queue = queue(None);
    Arc::get_mut(&mut queue.shared).unwrap().is_device = true;
    let zeroes = Op::WriteZeroes {
        unmap: false,
        fua: false,
    };
    for (op, first) in [
        (Op::Discard, Step::DiscardCommand),
        (zeroes, Step::ZeroRange),
    ] {
        let mut request = ranged(op, 8192);
        assert_eq!(queue.first_step(&request), Ok(Some(first)));
        let other = queue.next_step(first, &mut request, -libc::EINVAL);
        assert!(other.is_ok_and(|step| step.is_some_and(|step| step != first)));
        assert_eq!(queue.first_step(&request), Ok(Some(first)));
        request.finish();
    }
}

#[test]
fn errors_of_the_storage_are_reported() {
    let mut queue = queue(None);
    let mut memory = Memory::new(4096);
    let mut request = memory.request(WRITE);
    for (errno, error) in [
        (libc::EIO, IoError::Io),
        (libc::ENOSPC, IoError::NoSpace),
        (libc::EDQUOT, IoError::NoSpace),
    ] {
        assert_eq!(queue.next_step(PLAIN, &mut request, -errno), Err(error));
    }
    request.finish();
}

#[test]
fn a_forced_write_carries_rwf_dsync_and_a_plain_one_does_not() {
    for alignment in [None, Some(SECTORS)] {
        let mut queue = queue(alignment);
        for (op, expected) in [(FORCED, 2), (WRITE, 0)] {
            let mut memory = Memory::new(4094);
            let request = memory.request(op);
            let step = queue.first_step(&request).unwrap().unwrap();
            assert_eq!(matches!(step, Step::Bounce { .. }), alignment.is_some());
            let entry = operation(&mut queue, step, &request).unwrap();
            assert_eq!(flags(&entry), expected, "{op:?}, {step:?}");
            request.finish();
        }
    }
}

#[test]
fn where_rwf_dsync_is_unknown_a_forced_write_is_followed_by_a_sync() {
    let mut queue = queue(None);
    let mut memory = Memory::new(4096);
    let mut request = memory.request(FORCED);
    let step = queue.next_step(WITH_DSYNC, &mut request, -libc::EOPNOTSUPP);
    assert_eq!(step, Ok(Some(PLAIN)));
    let entry = operation(&mut queue, PLAIN, &request).unwrap();
    assert_eq!(flags(&entry), 0);
    let step = queue.next_step(PLAIN, &mut request, 4096);
    assert_eq!(step, Ok(Some(Step::Sync)));
    assert_eq!(queue.next_step(Step::Sync, &mut request, 0), Ok(None));
    request.finish();
    let request = memory.request(FORCED);
    assert_eq!(queue.first_step(&request), Ok(Some(PLAIN)), "remembered");
    request.finish();
}

#[test]
fn forced_writes_that_were_under_way_when_it_turned_out_unknown_succeed_too() {
    let mut queue = queue(None);
    let mut ring = Ring::new(8).unwrap();
    let (mut first, mut second) = (Memory::new(4096), Memory::new(4096));
    let mut requests = [first.request(FORCED), second.request(FORCED)];
    for (slot, request) in (0..).zip(&mut requests) {
        assert_eq!(queue.start(&mut ring, slot, request), Progress::Pending);
    }
    for result in [-libc::EOPNOTSUPP, 4096] {
        for (slot, request) in (0..).zip(&mut requests) {
            let progress = queue.advance(&mut ring, slot, request, 0, result);
            assert_eq!(progress, Progress::Pending, "slot {slot}, {result}");
        }
    }
    for (slot, mut request) in (0..).zip(requests) {
        assert_eq!(queue.slots[slot as usize].step, Step::Sync);
        let progress = queue.advance(&mut ring, slot, &mut request, 0, 0);
        assert_eq!(progress, Progress::Done(Ok(())));
        request.finish();
    }
}

#[test]
fn a_storage_that_knows_no_writes_at_all_is_an_error_and_no_loop() {
    let mut queue = queue(None);
    let mut memory = Memory::new(4096);
    let mut request = memory.request(FORCED);
    let step = queue.next_step(PLAIN, &mut request, -libc::EOPNOTSUPP);
    assert_eq!(step, Err(IoError::Unsupported));
    request.finish();
}

#[test]
fn a_flush_is_fdatasync() {
    let mut queue = queue(None);
    let request = ranged(Op::Flush, 0);
    assert_eq!(queue.first_step(&request), Ok(Some(Step::Sync)));
    let entry = operation(&mut queue, Step::Sync, &request).unwrap();
    // IORING_FSYNC_DATASYNC
    assert_eq!(flags(&entry), 1);
    request.finish();
}

#[test]
fn zeroes_are_written_where_the_storage_has_no_operation_for_them() {
    let mut queue = queue(None);
    let op = Op::WriteZeroes {
        unmap: true,
        fua: true,
    };
    let mut request = ranged(op, 8192);
    assert_eq!(queue.first_step(&request), Ok(Some(Step::PunchHole)));
    let step = queue.next_step(Step::PunchHole, &mut request, -libc::EOPNOTSUPP);
    assert_eq!(step, Ok(Some(Step::ZeroRange)));
    let step = queue.next_step(Step::ZeroRange, &mut request, -libc::EOPNOTSUPP);
    assert_eq!(step, Ok(Some(Step::WriteZeroes)));
    let step = queue.next_step(Step::WriteZeroes, &mut request, 4096);
    assert_eq!(step, Ok(Some(Step::WriteZeroes)));
    let step = queue.next_step(Step::WriteZeroes, &mut request, 4096);
    assert_eq!(step, Ok(Some(Step::Sync)));
    request.finish();
    // And what was found out is not tried again.
    let request = ranged(op, 8192);
    assert_eq!(queue.first_step(&request), Ok(Some(Step::WriteZeroes)));
    request.finish();
}

#[test]
fn a_failing_fallocate_is_an_error_and_not_a_lack() {
    let mut queue = queue(None);
    let op = Op::WriteZeroes {
        unmap: false,
        fua: false,
    };
    let mut request = ranged(op, 8192);
    let step = queue.next_step(Step::ZeroRange, &mut request, -libc::ENOSPC);
    assert_eq!(step, Err(IoError::NoSpace));
    assert_eq!(queue.first_step(&request), Ok(Some(Step::ZeroRange)));
    request.finish();
}

#[test]
fn a_discard_that_the_storage_does_not_know_is_granted() {
    let mut queue = queue(None);
    let mut ring = Ring::new(8).unwrap();
    let mut request = ranged(Op::Discard, 8192);
    assert_eq!(queue.start(&mut ring, 0, &mut request), Progress::Pending);
    let progress = queue.advance(&mut ring, 0, &mut request, 0, -libc::EOPNOTSUPP);
    assert_eq!(progress, Progress::Done(Ok(())));
    let progress = queue.start(&mut ring, 1, &mut request);
    assert_eq!(progress, Progress::Done(Ok(())), "and not tried again");
    request.finish();
}

#[test]
fn a_transfer_goes_on_where_the_memory_is_aligned_again() {
    for op in [Op::Read, WRITE] {
        let mut queue = queue(Some(Alignment {
            memory_bytes: 4096,
            block_bytes: 512,
        }));
        let mut memory = Memory::new(16 << 10);
        let mut request = memory.request(op);
        let step = queue.next_step(PLAIN, &mut request, 5120);
        assert_eq!(step, Ok(Some(PLAIN)));
        assert_eq!(request.position_bytes(), 4096 + 4096);
        // The end of the request is its end, however much memory is left of a page.
        let rest = request.remaining_bytes();
        let step = queue.next_step(PLAIN, &mut request, i32::try_from(rest).unwrap());
        assert_eq!(step, Ok(None));
        request.finish();
    }
}

#[test]
fn a_block_of_a_device_that_was_cut_is_read_again_and_not_zero_filled() {
    let mut queue = queue(Some(SECTORS));
    let shared = Arc::get_mut(&mut queue.shared).unwrap();
    shared.is_device = true;
    // As a device's, its metadata have no length.
    shared.file.set_len(0).unwrap();
    let mut memory = Memory::new(4096);
    let mut request = memory.request(Op::Read);
    let step = queue.next_step(PLAIN, &mut request, 1000);
    assert_eq!(step, Ok(Some(PLAIN)));
    assert_eq!(request.position_bytes(), 4096 + 512);
    request.finish();
    assert!(memory.bytes.iter().all(|&byte| byte == 0xaa));
}

#[test]
fn a_device_that_knows_no_discard_command_has_holes_punched_instead() {
    let mut queue = queue(None);
    Arc::get_mut(&mut queue.shared).unwrap().is_device = true;
    let mut request = ranged(Op::Discard, 8192);
    let step = queue.first_step(&request).unwrap().unwrap();
    assert_eq!(step, Step::DiscardCommand);
    let entry = sqe(&operation(&mut queue, step, &request).unwrap());
    let word = |at: usize| u64::from_ne_bytes(entry[at..at + 8].try_into().unwrap());
    // `cmd_op`, `addr` and `addr3` of `struct io_uring_sqe`.
    assert_eq!((word(8), word(16), word(48)), (0x1200, 0, 8192));
    let step = queue.next_step(step, &mut request, -libc::EOPNOTSUPP);
    assert_eq!(step, Ok(Some(Step::PunchHole)));
    assert_eq!(queue.first_step(&request), Ok(Some(Step::PunchHole)));
    request.finish();
}

#[test]
fn a_request_waits_for_a_bounce_buffer_and_goes_on_with_the_first_that_comes_back() {
    let mut queue = queue(Some(SECTORS));
    let mut ring = Ring::new(8).unwrap();
    let mut memory: Vec<_> = (0..5).map(|_| Memory::new(1022)).collect();
    let mut requests: Vec<_> = memory.iter_mut().map(|one| one.request(WRITE)).collect();
    for (slot, request) in (0..).zip(&mut requests) {
        let expected = match slot {
            0..4 => Progress::Pending,
            _ => Progress::Full,
        };
        assert_eq!(queue.start(&mut ring, slot, request), expected);
    }
    let progress = queue.advance(&mut ring, 2, &mut requests[2], 0, -libc::EIO);
    assert_eq!(progress, Progress::Done(Err(IoError::Io)));
    let progress = queue.start(&mut ring, 4, &mut requests[4]);
    assert_eq!(progress, Progress::Pending);
    for request in requests {
        request.finish();
    }
}

#[test]
fn a_request_that_the_ring_had_no_room_for_keeps_its_step() {
    let mut queue = queue(None);
    let mut ring = Ring::new(2).unwrap();
    let token = Token {
        owner: Owner::None,
        kind: 0,
        index: 0,
    };
    // SAFETY: a NOP points to nothing.
    while unsafe { ring.push(opcode::Nop::new().build(), token) }.is_ok() {}
    let mut request = ranged(Op::Flush, 0);
    assert_eq!(queue.start(&mut ring, 0, &mut request), Progress::Full);
    ring.submit_and_wait(1).unwrap();
    ring.reap(&mut Vec::with_capacity(8));
    assert_eq!(queue.start(&mut ring, 0, &mut request), Progress::Pending);
    request.finish();
}

/// A queue over a file in memory, and the file.
fn in_memory(len_bytes: u64) -> (FileQueue, std::fs::File, Ring) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = std::fs::File::from(rustix::fs::memfd_create("disk", flags).unwrap());
    file.set_len(len_bytes).unwrap();
    let (_, shared) = open::open(FileOptions {
        path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        cache: crate::storage::CacheMode::Auto,
        read_only: false,
        block_bytes: Some(512),
        serial: Serial::new("test").unwrap(),
        claim_later: false,
    })
    .unwrap();
    assert!(shared.is_in_memory);
    let mut ring = Ring::new(8).unwrap();
    let queue = FileQueue::new(Arc::new(shared), &mut ring, 8).unwrap();
    (queue, file, ring)
}

#[test]
fn a_file_in_memory_is_read_and_written_at_once() {
    let (mut queue, file, mut ring) = in_memory(1 << 20);
    let mut run = |memory: &mut Memory, op| {
        let mut request = memory.request(op);
        let progress = queue.start(&mut ring, 0, &mut request);
        request.finish();
        assert_eq!(ring.in_flight(), 0);
        progress
    };
    let mut written = Memory::new(3 * 512);
    for (n, byte) in written.bytes.iter_mut().enumerate() {
        *byte = u8::try_from(n % 251).unwrap();
    }
    assert_eq!(run(&mut written, WRITE), Progress::Done(Ok(())));
    let mut back = Memory::new(3 * 512);
    assert_eq!(run(&mut back, Op::Read), Progress::Done(Ok(())));
    assert_eq!(back.bytes, written.bytes);
    // Cut short by somebody: zeroes from there on.
    file.set_len(4096 + 700).unwrap();
    back.bytes.fill(0xaa);
    assert_eq!(run(&mut back, Op::Read), Progress::Done(Ok(())));
    assert_eq!(back.bytes[..700], written.bytes[..700]);
    assert!(back.bytes[700..].iter().all(|&byte| byte == 0));
}

#[test]
fn an_error_of_a_file_in_memory_is_told() {
    let (mut queue, file, mut ring) = in_memory(1 << 20);
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let mut memory = Memory::new(512);
    let mut request = memory.request(WRITE);
    let progress = queue.start(&mut ring, 0, &mut request);
    request.finish();
    assert_eq!(progress, Progress::Done(Err(IoError::Io)));
}

#[test]
fn a_forced_write_to_a_file_in_memory_goes_the_long_way() {
    let (mut queue, _file, mut ring) = in_memory(1 << 20);
    let mut memory = Memory::new(512);
    let mut request = memory.request(FORCED);
    assert_eq!(queue.start(&mut ring, 0, &mut request), Progress::Pending);
    assert!(ring.drain(std::time::Duration::from_secs(60), None));
    request.finish();
}
