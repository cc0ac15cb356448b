//! The steps of a request, fed with results by hand.

use io_uring::opcode;

use super::bench::*;
use super::*;
use crate::request::{Buffers, Range};

#[test]
fn a_short_transfer_goes_on_where_it_stopped() {
    for op in [Op::Read, WRITE] {
        let mut bench = Bench::new(None, op);
        bench.lead(&[(PLAIN, 3000, Ok(Some(PLAIN)))]);
        let (_, request) = bench.parts();
        assert_eq!(request.position_bytes(), 7096);
        assert_eq!(request.remaining_bytes(), 1096);
        assert_eq!(request.buffers().len_bytes(), 1096);
        bench.lead(&[(PLAIN, 1096, Ok(None))]);
    }
}

#[test]
fn a_read_at_the_end_of_the_file_is_zero_filled() {
    let mut bench = Bench::new(None, Op::Read);
    bench.lead(&[(PLAIN, 1000, Ok(Some(PLAIN))), (PLAIN, 0, Ok(None))]);
    assert!(bench.memory.bytes[..1000].iter().all(|&byte| byte == 0xaa));
    assert!(bench.memory.bytes[1000..].iter().all(|&byte| byte == 0));
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
    let range = Range::new(0, 4096);
    let mut bench = Bench {
        request: Some(Request::new(Op::Read, range, Buffers::in_ring(0, 4096))),
        queue: queue(None),
        memory: Memory::new(0),
    };
    let zeroes = Ok(Some(Step::ReadZeroes));
    bench.lead(&[(PLAIN, 1000, Ok(Some(PLAIN))), (PLAIN, 0, zeroes)]);
    let (queue, request) = bench.parts();
    let bytes = sqe(&operation(queue, Step::ReadZeroes, request).unwrap());
    assert_eq!(bytes[0], opcode::ReadFixed::CODE);
    assert_eq!(bytes[16..24], 1000u64.to_ne_bytes());
    let device = queue.operations.zero_device.as_ref().unwrap().as_raw_fd();
    assert_eq!(bytes[4..8], device.to_ne_bytes());
    let end = (Step::ReadZeroes, 3000, Ok(None));
    bench.lead(&[(Step::ReadZeroes, 96, zeroes), end]);
}

#[test]
fn a_write_that_moves_nothing_is_an_error() {
    Bench::new(None, WRITE).lead(&[(PLAIN, 0, Err(IoError::Io))]);
}

#[test]
fn around_the_page_cache_a_transfer_goes_on_at_a_whole_block() {
    let mut bench = Bench::new(Some(SECTORS), WRITE);
    let (queue, request) = bench.parts();
    let step = queue.next_step(PLAIN, request, 1000);
    assert_eq!(step, Ok(Some(PLAIN)));
    assert_eq!(request.position_bytes(), 4096 + 512);
    let step = queue.next_step(PLAIN, request, 511);
    assert_eq!(step, Err(IoError::Io), "no whole block was written");
}

#[test]
fn an_interrupted_step_is_tried_again_after_pauses_and_not_for_ever() {
    for errno in [libc::EINTR, libc::EAGAIN] {
        let mut bench = Bench::new(None, WRITE);
        let (queue, request) = bench.parts();
        let mut ring = Ring::new(8).unwrap();
        assert_eq!(queue.start(&mut ring, 0, request), Progress::Pending);
        let mut pauses = 0;
        let outcome = loop {
            match queue.advance(&mut ring, 0, request, STEP, -errno) {
                Progress::Done(outcome) => break outcome,
                progress => assert_eq!(progress, Progress::Pending),
            }
            pauses += 1;
            let progress = queue.advance(&mut ring, 0, request, PAUSE, -libc::ETIME);
            assert_eq!(progress, Progress::Pending, "the step again");
            assert!(ring.drain(Duration::from_secs(10), None));
        };
        assert_eq!(outcome, Err(IoError::Io));
        assert_eq!(pauses, MAX_RETRIES);
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

#[test]
fn what_the_storage_failed_is_told_with_its_place_and_cause() {
    let mut bench = Bench::new(None, Op::Read);
    assert_eq!(bench.queue.shared.failures.last(), None);
    bench.lead(&[(PLAIN, -libc::EIO, Err(IoError::Io))]);
    let shared = &bench.queue.shared;
    let cause = io::Error::from_raw_os_error(libc::EIO);
    let told = format!(
        "{}: read of 4096 bytes at 4096 failed: {cause}",
        shared.path.display()
    );
    assert_eq!(shared.failures.last(), Some(told));
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
    for (op, first) in [
        (Op::Discard, Step::DiscardCommand),
        (ZEROES, Step::ZeroRange),
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
    let steps = [
        (PLAIN, -libc::EIO, Err(IoError::Io)),
        (PLAIN, -libc::ENOSPC, Err(IoError::NoSpace)),
        (PLAIN, -libc::EDQUOT, Err(IoError::NoSpace)),
    ];
    Bench::new(None, WRITE).lead(&steps);
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
    let mut bench = Bench::new(None, FORCED);
    bench.lead(&[(WITH_DSYNC, -libc::EOPNOTSUPP, Ok(Some(PLAIN)))]);
    let (queue, request) = bench.parts();
    let entry = operation(queue, PLAIN, request).unwrap();
    assert_eq!(flags(&entry), 0);
    let synced = (Step::Sync, 0, Ok(None));
    bench.lead(&[(PLAIN, 4096, Ok(Some(Step::Sync))), synced]);
    let request = bench.memory.request(FORCED);
    let first = bench.queue.first_step(&request);
    request.finish();
    assert_eq!(first, Ok(Some(PLAIN)), "remembered");
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
    let refused = (PLAIN, -libc::EOPNOTSUPP, Err(IoError::Unsupported));
    Bench::new(None, FORCED).lead(&[refused]);
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
    let op = Op::WriteZeroes {
        unmap: true,
        fua: true,
    };
    let mut bench = Bench::ranged(op);
    let (queue, request) = bench.parts();
    assert_eq!(queue.first_step(request), Ok(Some(Step::PunchHole)));
    let unknown = -libc::EOPNOTSUPP;
    bench.lead(&[
        (Step::PunchHole, unknown, Ok(Some(Step::ZeroRange))),
        (Step::ZeroRange, unknown, Ok(Some(Step::WriteZeroes))),
        (Step::WriteZeroes, 4096, Ok(Some(Step::WriteZeroes))),
        (Step::WriteZeroes, 4096, Ok(Some(Step::Sync))),
    ]);
    // And what was found out is not tried again.
    let request = ranged(op, 8192);
    let first = bench.queue.first_step(&request);
    request.finish();
    assert_eq!(first, Ok(Some(Step::WriteZeroes)));
}

#[test]
fn a_failing_fallocate_is_an_error_and_not_a_lack() {
    let mut bench = Bench::ranged(ZEROES);
    bench.lead(&[(Step::ZeroRange, -libc::ENOSPC, Err(IoError::NoSpace))]);
    let (queue, request) = bench.parts();
    assert_eq!(queue.first_step(request), Ok(Some(Step::ZeroRange)));
}

#[test]
fn a_discard_that_the_storage_does_not_know_is_granted() {
    let mut bench = Bench::ranged(Op::Discard);
    let (queue, request) = bench.parts();
    let mut ring = Ring::new(8).unwrap();
    assert_eq!(queue.start(&mut ring, 0, request), Progress::Pending);
    let progress = queue.advance(&mut ring, 0, request, 0, -libc::EOPNOTSUPP);
    assert_eq!(progress, Progress::Done(Ok(())));
    let progress = queue.start(&mut ring, 1, request);
    assert_eq!(progress, Progress::Done(Ok(())), "and not tried again");
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
    let mut bench = Bench::new(Some(SECTORS), Op::Read);
    let shared = Arc::get_mut(&mut bench.queue.shared).unwrap();
    shared.is_device = true;
    // As a device's, its metadata have no length.
    shared.file.set_len(0).unwrap();
    bench.lead(&[(PLAIN, 1000, Ok(Some(PLAIN)))]);
    let (_, request) = bench.parts();
    assert_eq!(request.position_bytes(), 4096 + 512);
    assert!(bench.memory.bytes.iter().all(|&byte| byte == 0xaa));
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

#[test]
fn long_ranges_are_released_and_zeroed_in_pieces_that_end_at_a_multiple() {
    const GIB: u64 = 1 << 30;
    let unmap = Op::WriteZeroes {
        unmap: true,
        fua: true,
    };
    for (op, step, piece_bytes) in [
        (Op::Discard, Step::PunchHole, GIB),
        (Op::Discard, Step::DiscardCommand, GIB),
        (unmap, Step::PunchHole, GIB),
        (unmap, Step::ZeroRange, GIB / 16),
    ] {
        let mut queue = queue(None);
        let range = Range::new(piece_bytes - 4096, piece_bytes + 8192);
        let mut request = Request::new(op, range, Buffers::NONE);
        let mut pieces = Vec::new();
        let mut next = Some(step);
        while next == Some(step) {
            let bytes = sqe(&operation(&mut queue, step, &request).unwrap());
            let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
            pieces.push(match step {
                // Position and length.
                Step::DiscardCommand => (word(16), word(48)),
                _ => (word(8), word(16)),
            });
            next = queue.next_step(step, &mut request, 0).unwrap();
        }
        let expected = [
            (piece_bytes - 4096, 4096),
            (piece_bytes, piece_bytes),
            (2 * piece_bytes, 4096),
        ];
        assert_eq!(pieces, expected, "{op:?} {step:?}");
        let flushed = matches!(op, Op::WriteZeroes { .. });
        assert_eq!(next, flushed.then_some(Step::Sync), "{op:?} {step:?}");
        request.finish();
    }
}

#[test]
fn pieces_that_the_storage_does_not_know_are_continued_in_another_way() {
    let mut bench = Bench::ranged(ZEROES);
    let (queue, request) = bench.parts();
    let first = queue.next_step(Step::WriteZeroes, request, 4096);
    assert_eq!(first, Ok(Some(Step::WriteZeroes)));
    // The rest of it, not all.
    let bytes = sqe(&operation(queue, Step::ZeroRange, request).unwrap());
    assert_eq!(bytes[8..16], 4096u64.to_ne_bytes());
    assert_eq!(bytes[16..24], 4096u64.to_ne_bytes());
}

#[test]
fn a_range_whose_client_is_gone_ends_with_the_piece_under_way() {
    let mut bench = Bench::ranged(ZEROES);
    bench.queue.abandon();
    bench.lead(&[
        (Step::WriteZeroes, 4096, Err(IoError::Io)),
        (Step::WriteZeroes, 4096, Ok(None)),
    ]);
}
