//! Commands become requests and outcomes become commits, without a driver.

use super::*;
use crate::request::small_disk;

const BUFFER: u32 = 1 << 20;

fn descriptor(op_flags: u32, start_sector: u64, nr_sectors: u32) -> sys::ublksrv_io_desc {
    sys::ublksrv_io_desc {
        op_flags,
        nr_sectors,
        start_sector,
        addr: 0,
    }
}

fn parsed(op_flags: u32, first: u64, count: u32) -> Result<(Op, Range), IoError> {
    parse(
        &descriptor(op_flags, first, count),
        &small_disk(1 << 30),
        BUFFER,
    )
}

/// A queue of one tag over a file that is no device: what it does without hearing from a driver.
fn queue() -> UblkQueue {
    let file = rustix::fs::memfd_create("no device", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 1 << 16).unwrap();
    UblkQueue::new(QueueConfig {
        char_device: Arc::new(file.into()),
        queue: 0,
        depth: 1,
        buffer_bytes: BUFFER,
        limits: small_disk(1 << 30),
        counters: Arc::default(),
        fault: Arc::default(),
        refusals: Arc::new(Refusals::new(0)),
        refuse_writes: false,
        data: DataPath::Copy,
        may_copy: false,
        threads: ThreadOptions::default(),
        throttle: Arc::default(),
        longest_hold: Duration::MAX,
        cpus: None,
        insists: false,
        sharing: None,
    })
    .unwrap()
}

fn ended(result: i32) -> Completion {
    let token = Token {
        owner: Owner::Door,
        kind: 0,
        index: 0,
    };
    Completion {
        token,
        result,
        flags: 0,
    }
}

#[test]
fn a_queue_told_to_quit_leaves_its_commands_to_the_kernel() {
    let (mut ring, mut queue) = (Ring::new(8).unwrap(), queue());
    assert_eq!(queue.end_batch(&mut ring), Next::Idle);
    queue.command(&mut ring, Command::Quit);
    assert_eq!(queue.end_batch(&mut ring), Next::Exit);
    assert!(queue.abandons_operations());
}

#[test]
fn a_queue_that_leaves_begins_what_it_was_handed_first() {
    let (mut ring, mut queue) = (Ring::new(8).unwrap(), queue());
    queue.command(&mut ring, Command::Leave);
    queue.event(&mut ring, ended(0));
    assert_eq!(queue.end_batch(&mut ring), Next::Again);
    // An empty descriptor asks for a read of nothing.
    let (slot, request) = queue.next(&mut ring).expect("a request");
    assert_eq!(queue.end_batch(&mut ring), Next::Again);
    queue.complete(&mut ring, slot, request, Ok(()));
    assert_eq!(queue.end_batch(&mut ring), Next::Exit);
    assert!(queue.abandons_operations());
    assert_eq!(ring.in_flight(), 1, "the answer is on its way");
}

#[test]
fn a_queue_that_leaves_asks_the_kernel_in_each_quiet_round() {
    let (mut ring, mut queue) = (Ring::new(8).unwrap(), queue());
    queue.command(&mut ring, Command::Leave);
    let mut rounds = 1;
    let before = ring.enters();
    while queue.end_batch(&mut ring) == Next::Again {
        rounds += 1;
    }
    assert_eq!(
        (rounds, ring.enters() - before),
        (QUIET_ROUNDS, rounds.into())
    );
}

#[test]
fn who_waits_for_requests_hears_of_the_end_of_those_that_were_under_way() {
    let (mut ring, mut queue) = (Ring::new(8).unwrap(), queue());
    let await_answers = |queue: &mut UblkQueue, ring: &mut Ring| {
        let (reply, answer) = mpsc::channel();
        queue.command(ring, Command::AwaitAnswers(reply));
        let _next = queue.end_batch(ring);
        answer
    };
    let none = await_answers(&mut queue, &mut ring);
    assert_eq!(none.try_recv(), Ok(()));
    assert!(!queue.drains());
    queue.event(&mut ring, ended(0));
    let fetched = await_answers(&mut queue, &mut ring);
    let (slot, request) = queue.next(&mut ring).expect("a request");
    let begun = await_answers(&mut queue, &mut ring);
    assert!(queue.drains());
    for waiting in [&fetched, &begun] {
        assert_eq!(waiting.try_recv(), Err(mpsc::TryRecvError::Empty));
    }
    queue.complete(&mut ring, slot, request, Ok(()));
    let _next = queue.end_batch(&mut ring);
    for waiting in [&fetched, &begun] {
        assert_eq!(waiting.try_recv(), Ok(()));
    }
    // The driver hands out the tag again.
    queue.event(&mut ring, ended(0));
    let later = await_answers(&mut queue, &mut ring);
    assert_eq!(later.try_recv(), Err(mpsc::TryRecvError::Empty));
}

#[test]
fn a_queue_with_a_refused_command_leaves_the_others_to_the_kernel() {
    let (mut ring, mut queue) = (Ring::new(8).unwrap(), queue());
    queue.event(&mut ring, ended(-libc::EINVAL));
    assert_eq!(queue.config.fault.load(Ordering::Relaxed), libc::EINVAL);
    assert_eq!(queue.end_batch(&mut ring), Next::Exit);
    assert!(queue.abandons_operations());
}

#[test]
fn a_queue_whose_device_was_stopped_has_nothing_to_leave() {
    let (mut ring, mut queue) = (Ring::new(8).unwrap(), queue());
    queue.event(&mut ring, ended(sys::UBLK_IO_RES_ABORT));
    assert_eq!(queue.end_batch(&mut ring), Next::Exit);
    assert!(!queue.abandons_operations());
}

#[test]
fn operations_and_their_flags_are_understood() {
    let fua = sys::UBLK_IO_F_FUA;
    let keep = sys::UBLK_IO_F_NOUNMAP;
    let harmless = sys::UBLK_IO_F_META | sys::UBLK_IO_F_SWAP | sys::UBLK_IO_F_FAILFAST_DEV;
    let zeroes = |unmap, fua| Op::WriteZeroes { unmap, fua };
    let cases = [
        (sys::UBLK_IO_OP_READ, Op::Read),
        (sys::UBLK_IO_OP_READ | harmless, Op::Read),
        (sys::UBLK_IO_OP_WRITE, Op::Write { fua: false }),
        (sys::UBLK_IO_OP_WRITE | fua, Op::Write { fua: true }),
        (sys::UBLK_IO_OP_DISCARD, Op::Discard),
        (sys::UBLK_IO_OP_WRITE_ZEROES, zeroes(true, false)),
        (sys::UBLK_IO_OP_WRITE_ZEROES | keep, zeroes(false, false)),
        (
            sys::UBLK_IO_OP_WRITE_ZEROES | keep | fua,
            zeroes(false, true),
        ),
    ];
    for (op_flags, op) in cases {
        let range = Range::new(4096, 8192);
        assert_eq!(parsed(op_flags, 8, 16), Ok((op, range)), "{op_flags:#x}");
    }
    let flush = parsed(sys::UBLK_IO_OP_FLUSH, 0, 0);
    assert_eq!(flush, Ok((Op::Flush, Range::EMPTY)));
}

#[test]
fn unknown_operations_are_not_supported() {
    let known = [0, 1, 2, 3, 5];
    for op in (0..=0xff).filter(|op| !known.contains(op)) {
        assert_eq!(parsed(op, 0, 8), Err(IoError::Unsupported), "{op}");
    }
}

#[test]
fn a_transfer_longer_than_its_buffer_is_refused() {
    let sectors = BUFFER >> SECTOR_SHIFT;
    assert!(parsed(sys::UBLK_IO_OP_READ, 0, sectors).is_ok());
    let longer = parsed(sys::UBLK_IO_OP_READ, 0, sectors + 1);
    assert_eq!(longer, Err(IoError::Io));
    // What carries no data has no buffer to outgrow.
    assert!(parsed(sys::UBLK_IO_OP_DISCARD, 0, sectors + 1).is_ok());
}

#[test]
fn a_range_outside_the_disk_is_refused() {
    let past_end = parsed(sys::UBLK_IO_OP_WRITE, u64::MAX, 8);
    assert_eq!(past_end, Err(IoError::Io));
}

#[test]
fn an_answer_is_the_whole_length_or_an_error() {
    let write = Op::Write { fua: false };
    assert_eq!(answer_to(write, 32 << 20, Ok(())), 32 << 20);
    assert_eq!(answer_to(Op::Read, 512, Ok(())), 512);
    assert_eq!(answer_to(Op::Discard, 1 << 40, Ok(())), 0);
    assert_eq!(answer_to(Op::Flush, 0, Ok(())), 0);
    for (error, errno) in [
        (IoError::Io, libc::EIO),
        (IoError::Unsupported, libc::EOPNOTSUPP),
        (IoError::NoSpace, libc::ENOSPC),
        (IoError::Conflict, libc::EBADE),
    ] {
        assert_eq!(answer_to(write, 512, Err(error)), -errno);
    }
}
