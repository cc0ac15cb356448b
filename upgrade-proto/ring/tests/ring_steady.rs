//! In steady state a record costs no system call and no allocation, by count and in a process that is killed for any
//! system call but exit_group(2).

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use common::{options, transport};
use fd_ring::{Consumer, Options, Producer, Transport};
use libc::{SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use testkit::seccomp::filter;
use upgrade_proto::{Name, connect};

struct Counting;

thread_local! {
    /// Per thread, as other tests run at the same time.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Both ends of a ring that has been used: the kernel wakes pollers of a pipe when its ring begins, and once more for
/// the first record.
fn upgraded() -> (Producer, Consumer) {
    upgraded_with(|_| {})
}

fn upgraded_with(change: impl FnOnce(&mut Options)) -> (Producer, Consumer) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut options = options(transport(), &dir);
    change(&mut options);
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    let mut consumer = Consumer::new(reader.into(), &options).expect("a consumer");
    for _ in 0..1000 {
        producer.upgrade(Duration::ZERO).expect("asked");
        consumer.upgrade(Duration::ZERO).expect("asked");
    }
    assert_eq!(
        (producer.transport(), consumer.transport()),
        (transport(), transport())
    );
    assert!(exchange(&mut producer, &mut consumer, 4).expect("exchanged"));
    (producer, consumer)
}

/// Sends and receives records of all kinds; false if one is wrong.
fn exchange(producer: &mut Producer, consumer: &mut Consumer, rounds: u64) -> io::Result<bool> {
    for round in 0..rounds {
        let size = [16, 64, 512, 4096][(round % 4) as usize];
        let mut record = producer.reserve(size)?;
        record.put(0, &round.to_le_bytes());
        record.commit(size)?;
        let bytes = consumer.peek(size)?;
        if bytes.array() != Some(round.to_le_bytes()) {
            return Ok(false);
        }
        consumer.consume(size);
        io::Write::write_all(producer, &round.to_le_bytes())?;
        let mut number = [0; 8];
        io::Read::read_exact(consumer, &mut number)?;
        if number != round.to_le_bytes() || consumer.try_peek(1)?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

#[test]
fn no_record_costs_a_system_call_or_an_allocation() {
    const ROUNDS: u64 = 50_000;
    let (mut producer, mut consumer) = upgraded();
    let calls = |producer: &Producer, consumer: &Consumer| {
        producer.counters().system_calls + consumer.counters().system_calls
    };
    let before = (calls(&producer, &consumer), allocations());
    assert!(exchange(&mut producer, &mut consumer, ROUNDS).expect("exchanged"));
    let after = (calls(&producer, &consumer), allocations());
    assert_eq!(before, after, "(system calls, allocations)");
}

/// Has the process killed for any system call but exit_group(2).
fn forbid_system_calls() -> bool {
    let exit = u32::try_from(libc::SYS_exit_group).unwrap_or(0);
    filter([exit; 2], SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS).is_ok()
}

/// Runs `work` in a child; its exit code, or the signal that ended it.
fn in_a_child(work: impl FnOnce() -> i32) -> (Option<i32>, Option<i32>) {
    // SAFETY: the child calls nothing but `work`, which allocates and locks nothing that another thread of
    // this process could hold, and _exit.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let code = work();
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above; `status` is ours.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    (
        code,
        libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)),
    )
}

#[test]
fn a_process_without_system_calls_exchanges_records() {
    // A child does not have its parent's ring, so it makes its own.
    let exchanged = in_a_child(|| {
        let (mut producer, mut consumer) = upgraded();
        if !forbid_system_calls() {
            return 3;
        }
        let exchanged = exchange(&mut producer, &mut consumer, 20_000);
        // Closing takes system calls.
        std::mem::forget((producer, consumer));
        i32::from(!matches!(exchanged, Ok(true)))
    });
    assert_eq!(exchanged, (Some(0), None));
    // The filter works: a system call kills.
    let killed = in_a_child(|| {
        if !forbid_system_calls() {
            return 3;
        }
        i32::from(std::process::id() == 0)
    });
    assert_eq!(killed, (None, Some(libc::SIGSYS)));
}

#[test]
fn a_child_that_drops_its_copies_of_the_ends_changes_nothing() {
    let (mut producer, mut consumer) = upgraded();
    producer.reserve(8).expect("room").commit(8).expect("sent");
    let bytes = consumer.peek(8).expect("there").as_ptr();
    consumer.consume(8);
    let page = bytes.map_addr(|address| address & !4095);
    let ended = in_a_child(|| {
        // The child does not have the ring mapped, and may have another mapping at its address.
        // SAFETY: fails if anything is mapped there.
        let place = unsafe {
            mmap_anonymous(
                page.cast_mut().cast(),
                4096,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE,
            )
        };
        let Ok(place) = place else { return 3 };
        // SAFETY: mapped just now, for reading and writing.
        unsafe { place.cast::<u8>().write_volatile(77) };
        // SAFETY: bitwise copies, as a child has them of all its parent's values; the parent drops its own.
        let copies = unsafe { (std::ptr::read(&producer), std::ptr::read(&consumer)) };
        drop(copies);
        // SAFETY: it is still mapped, if the library is correct; otherwise the test fails by a signal.
        i32::from(unsafe { place.cast::<u8>().read_volatile() } != 77)
    });
    assert_eq!(ended, (Some(0), None));
    assert!(exchange(&mut producer, &mut consumer, 100).expect("exchanged"));
}

#[test]
fn a_producer_that_cannot_accept_is_not_ready_for_ever() {
    let ready = in_a_child(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let options = options(Transport::Shared, &dir);
        let (reader, writer) = io::pipe().expect("a pipe");
        let mut producer = Producer::new(writer.into(), &options).expect("a producer");
        let name = Name::new("ring-buffer").expect("a name");
        let asked = connect(&reader, &name, &options.lookup).expect("asked");
        let _client = asked.found().expect("offered");
        // Fewer than are open.
        let limit = libc::rlimit {
            rlim_cur: 3,
            rlim_max: 3,
        };
        // SAFETY: only reads `limit`.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
            return 3;
        }
        while producer.try_write(&[0; 4096]).expect("written").is_some() {}
        let mut fds = [PollFd::from_borrowed_fd(producer.as_fd(), PollFlags::IN)];
        let ready = poll(&mut fds, Some(&Timespec::default()));
        i32::from(ready != Ok(0))
    });
    assert_eq!(ready, (Some(0), None));
}

/// Restricts this thread, and those that it starts, to one processor.
fn share_one_processor() {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let allowed = sched_getaffinity(None).expect("processors");
    let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(first.expect("a processor"));
    sched_setaffinity(None, &one).expect("moved");
}

#[test]
fn a_stream_on_one_processor_does_not_send_its_consumer_to_sleep_after_each_record() {
    const RECORDS: u64 = 200_000;
    let streaming = std::thread::spawn(|| {
        share_one_processor();
        // Without yields, which would suffice on some kernels.
        let (mut producer, mut consumer) = upgraded_with(|options| options.spin = false);
        let reading = std::thread::spawn(move || {
            for round in 0..RECORDS {
                let record: Option<[u8; 16]> = consumer.peek(16).expect("read").array();
                let number = record.and_then(|record| record.first_chunk().copied());
                assert_eq!(number.map(u64::from_le_bytes), Some(round));
                consumer.consume(16);
            }
            consumer.counters()
        });
        for round in 0..RECORDS {
            let mut record = producer.reserve(16).expect("room");
            record.put(0, &round.to_le_bytes());
            record.put(8, &[0; 8]);
            record.commit(16).expect("committed");
        }
        reading.join().expect("the reader").sleeps
    });
    let sleeps = streaming.join().expect("both ends");
    assert!(sleeps < RECORDS / 100, "{sleeps} sleeps");
}
