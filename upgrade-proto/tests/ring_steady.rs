//! What a record costs in steady state: no system call and no allocation. The process that shows it is
//! killed by the kernel at the first system call but exit_group(2).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::time::Duration;

use upgrade_proto::ring::{Consumer, Options, Producer, Way};

struct Counting;

thread_local! {
    /// Of this thread alone: other tests run at the same time.
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

/// Both ends of a ring.
fn upgraded() -> (Producer, Consumer) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut options = Options {
        kernel: false,
        ..Options::default()
    };
    options.offer.kernel = false;
    options.offer.runtime_dir = Some(dir.path().to_owned());
    options.lookup.kernel = false;
    options.lookup.runtime_dirs = vec![dir.path().to_owned()];
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    let mut consumer = Consumer::new(reader.into(), &options).expect("a consumer");
    for _ in 0..1000 {
        producer.upgrade(Duration::ZERO).expect("asked");
        consumer.upgrade(Duration::ZERO).expect("asked");
    }
    assert_eq!((producer.way(), consumer.way()), (Way::Shared, Way::Shared));
    (producer, consumer)
}

/// Sends and receives records of all kinds; false if one is wrong.
fn exchange(producer: &mut Producer, consumer: &mut Consumer, rounds: u64) -> io::Result<bool> {
    for round in 0..rounds {
        let size = [16, 64, 512, 4096][(round % 4) as usize];
        let mut record = producer.reserve(size)?;
        record[..8].copy_from_slice(&round.to_le_bytes());
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

/// Installs a filter that kills the process at every system call but exit_group(2).
fn forbid_system_calls() -> bool {
    let op = |code: u32, jt, jf, k| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let exit = u32::try_from(libc::SYS_exit_group).unwrap_or(0);
    let mut filter = [
        // The number of the system call is the first word.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, exit),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        op(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_KILL_PROCESS,
        ),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: `program` and the filter it points to live until the call returns.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    }
}

/// Runs `work` in a child; its exit code, or the signal that ended it.
fn in_a_child(work: impl FnOnce() -> i32) -> (Option<i32>, Option<i32>) {
    // SAFETY: the child calls nothing but `work`, which allocates and locks nothing that another thread of
    // this process could hold, and _exit.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let code = work();
        // SAFETY: ends the child at once.
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
fn a_process_that_may_not_make_system_calls_exchanges_records() {
    // A child has no ring of its parent's, so it makes its own before it is locked up.
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
    // Locked up it is: one system call, and it is dead.
    let killed = in_a_child(|| {
        if !forbid_system_calls() {
            return 3;
        }
        i32::from(std::process::id() == 0)
    });
    assert_eq!(killed, (None, Some(libc::SIGSYS)));
}
