//! Limits by a clock of the tests' own: what passes in how long a time.

use super::*;
use crate::engine::throttle::RateLimits;
use crate::engine::throttle::bucket::Bucket;

const SECOND: u64 = 1_000_000_000;
const MILLISECOND: u64 = 1_000_000;

const READ: (Op, u64) = (Op::Read, 4096);
const WRITE: (Op, u64) = (Op::Write { fua: false }, 4096);

fn limited(limits: RateLimits) -> Arc<Throttle> {
    let throttle = Arc::<Throttle>::default();
    throttle.set_at(limits, 0);
    throttle
}

fn gate(throttle: &Arc<Throttle>) -> Gate {
    let mut gate = Gate::new(throttle, 64, Duration::MAX);
    gate.is_in_use();
    gate
}

/// A queue whose client always has as many requests under way as it may, and whose storage takes no time.
struct Client {
    gate: Gate,
    depth: usize,
    request: (Op, u64),
    passed: u64,
}

impl Client {
    fn new(throttle: &Arc<Throttle>, depth: usize, request: (Op, u64)) -> Self {
        Self {
            gate: gate(throttle),
            depth,
            request,
            passed: 0,
        }
    }

    /// One round of the queue's thread. Returns whether something passed.
    fn serve(&mut self, now_ns: u64) -> bool {
        self.gate.is_in_use();
        let before = self.passed;
        self.passed += u64::from(self.gate.release(false, now_ns).is_some());
        while self.gate.len() < self.depth {
            match self.gate.lets_pass(0, self.request, now_ns) {
                true => self.passed += 1,
                false => continue,
            }
            break;
        }
        self.passed > before
    }
}

/// Serves the clients in turns until `end_ns`, with threads that wake up late by `late_ns`.
fn serve(clients: &mut [Client], (mut now_ns, end_ns): (u64, u64), late_ns: u64) {
    while now_ns < end_ns {
        let mut passed = true;
        while passed {
            passed = false;
            for client in clients.iter_mut() {
                passed |= client.serve(now_ns);
            }
        }
        let waits = clients.iter().filter_map(|client| client.gate.wait(now_ns));
        let wait = waits.min().expect("all hold something back");
        now_ns += u64::try_from(wait.as_nanos()).unwrap().max(1) + late_ns;
    }
}

fn assert_close(passed: u64, wanted: u64, percent: u64) {
    let within = wanted * percent / 100;
    assert!(
        passed.abs_diff(wanted) <= within,
        "{passed} instead of {wanted}"
    );
}

#[test]
fn a_limit_is_reached_and_kept_whatever_the_number_of_queues_and_their_depth() {
    let requests = RateLimits {
        iops_total: 1000,
        ..RateLimits::default()
    };
    let bytes = RateLimits {
        bps_read: 10_000_000,
        ..RateLimits::default()
    };
    for (limits, in_ten_seconds) in [(requests, 10_000), (bytes, 100_000_000 / 4096)] {
        for queues in [1, 4] {
            for depth in [1, 32] {
                for late_ns in [0, 2 * MILLISECOND] {
                    let throttle = limited(limits);
                    let client = |_| Client::new(&throttle, depth, READ);
                    let mut clients: Vec<_> = (0..queues).map(client).collect();
                    serve(&mut clients, (0, 10 * SECOND), late_ns);
                    let passed = clients.iter().map(|client| client.passed).sum();
                    assert_close(passed, in_ten_seconds, 2);
                }
            }
        }
    }
}

#[test]
fn the_least_of_several_limits_is_the_one_that_counts() {
    let throttle = limited(RateLimits {
        iops_total: 1000,
        iops_read: 300,
        bps_total: 100 * 4096,
        ..RateLimits::default()
    });
    let mut clients = [Client::new(&throttle, 8, READ)];
    serve(&mut clients, (0, 10 * SECOND), 0);
    assert_close(clients[0].passed, 1000, 2);
}

#[test]
fn queues_share_a_limit_evenly_however_deep_they_are() {
    let throttle = limited(RateLimits {
        iops_total: 1000,
        ..RateLimits::default()
    });
    let mut clients = [1, 2, 32, 64].map(|depth| Client::new(&throttle, depth, READ));
    serve(&mut clients, (0, 10 * SECOND), MILLISECOND);
    for client in clients {
        assert_close(client.passed, 2500, 5);
    }
}

#[test]
fn reads_and_writes_of_a_queue_take_turns() {
    let throttle = limited(RateLimits {
        iops_total: 1000,
        ..RateLimits::default()
    });
    let mut gate = gate(&throttle);
    let mut passed = [0, 0];
    for slot in 0..64 {
        let request = [READ, WRITE][slot as usize % 2];
        passed[slot as usize % 2] += u64::from(gate.lets_pass(slot, request, 0));
    }
    for now_ms in 1..=40 {
        while let Some((slot, _)) = gate.release(false, now_ms * MILLISECOND) {
            passed[slot as usize % 2] += 1;
        }
    }
    assert!(passed[0].abs_diff(passed[1]) <= 5, "{passed:?}");
    assert_close(passed[0] + passed[1], 40, 15);
}

#[test]
fn a_request_larger_than_the_burst_passes_in_its_turn_and_delays_the_next() {
    let throttle = limited(RateLimits {
        bps_total: 1 << 20,
        burst_ms: 1,
        ..RateLimits::default()
    });
    let large = (Op::Write { fua: false }, 4 << 20);
    let mut clients = [
        Client::new(&throttle, 4, large),
        Client::new(&throttle, 4, READ),
    ];
    serve(&mut clients, (0, 80 * SECOND), 0);
    let [large, small] = clients.map(|client| client.passed);
    assert!(
        (17..=21).contains(&large),
        "{large} large ones, {small} small ones"
    );
    assert!(small >= large, "{large} large ones, {small} small ones");
}

#[test]
fn a_limit_on_writes_holds_up_no_reads_and_no_flushes() {
    let throttle = limited(RateLimits {
        iops_write: 1,
        ..RateLimits::default()
    });
    let mut gate = gate(&throttle);
    for write in [
        WRITE,
        (Op::Discard, 4096),
        (
            Op::WriteZeroes {
                unmap: true,
                fua: false,
            },
            4096,
        ),
    ] {
        // The first one is free.
        let passed = gate.lets_pass(0, write, 0);
        assert_eq!(passed, write == WRITE);
    }
    for _ in 0..1000 {
        assert!(gate.lets_pass(0, READ, 0));
        assert!(gate.lets_pass(0, (Op::Flush, 0), 0));
    }
    assert_eq!(gate.len(), 2);
}

#[test]
fn a_discard_is_a_write_without_bytes_and_write_zeroes_has_them() {
    let zeroes = Op::WriteZeroes {
        unmap: true,
        fua: false,
    };
    for (op, passes) in [(Op::Discard, true), (zeroes, false)] {
        let throttle = limited(RateLimits {
            bps_write: 1000,
            ..RateLimits::default()
        });
        let mut gate = gate(&throttle);
        assert!(gate.lets_pass(0, (op, 1 << 30), 0));
        assert_eq!(gate.lets_pass(1, (op, 1 << 30), 0), passes, "{op:?}");
    }
}

#[test]
fn a_pause_saves_up_a_burst_and_no_more() {
    let throttle = limited(RateLimits {
        iops_total: 1000,
        burst_ms: 100,
        ..RateLimits::default()
    });
    let mut client = Client::new(&throttle, 1, READ);
    while client.serve(0) {}
    let at_first = client.passed;
    // Not what was saved up before there were limits.
    assert!(at_first <= 6, "{at_first}");
    while client.serve(100 * SECOND) {}
    // And a chunk at either end.
    assert!((100..=110).contains(&(client.passed - at_first)));
}

#[test]
fn a_change_counts_from_the_next_round_on_and_forgets_what_was_owed() {
    let slow = RateLimits {
        bps_total: 1,
        ..RateLimits::default()
    };
    let throttle = limited(slow);
    let mut gate = gate(&throttle);
    assert!(gate.lets_pass(0, READ, 0));
    assert!(!gate.lets_pass(1, READ, 0) && !gate.lets_pass(2, READ, 0));
    // Not the hour that they are owed: the limits may change before.
    assert_eq!(gate.wait(0), Some(Gate::LONGEST_WAIT));
    throttle.set_at(
        RateLimits {
            bps_total: 4096,
            ..slow
        },
        SECOND,
    );
    assert!(gate.is_in_use());
    assert_eq!(gate.release(false, SECOND), Some((1, SECOND)));
    assert_eq!(gate.release(false, SECOND), None);
    throttle.set_at(RateLimits::default(), SECOND);
    assert!(gate.is_in_use(), "one is held back");
    assert_eq!(gate.release(false, SECOND), Some((2, SECOND)));
    assert!(!gate.is_in_use());
    assert!(gate.lets_pass(3, READ, SECOND));
}

#[test]
fn no_request_is_held_back_for_longer_than_the_door_can_wait() {
    let throttle = limited(RateLimits {
        iops_total: 1,
        burst_ms: 0,
        ..RateLimits::default()
    });
    let mut gate = Gate::new(&throttle, 64, Duration::from_secs(15));
    gate.is_in_use();
    let passed = (0..40).filter(|slot| gate.lets_pass(*slot, READ, 0));
    assert_eq!(passed.count(), 1);
    let mut release_until = |now_ns| {
        let released = std::iter::from_fn(|| gate.release(false, now_ns));
        released.count()
    };
    let in_time: usize = (1..15).map(|second| release_until(second * SECOND)).sum();
    assert_eq!(in_time, 14);
    assert_eq!(release_until(15 * SECOND), 25);
}

#[test]
fn what_is_let_go_at_once_is_owed() {
    let throttle = limited(RateLimits {
        iops_total: 10,
        burst_ms: 0,
        ..RateLimits::default()
    });
    let mut gate = gate(&throttle);
    let passed = (0..11).filter(|slot| gate.lets_pass(*slot, READ, 0));
    assert_eq!(passed.count(), 1);
    let released = std::iter::from_fn(|| gate.release(true, 0)).count();
    assert_eq!((released, gate.len()), (10, 0));
    let next_ns = |now_ns| {
        let mut gate = self::gate(&throttle);
        gate.lets_pass(0, READ, now_ns)
    };
    assert!(!next_ns(SECOND));
    assert!(next_ns(3 * SECOND));
}

#[test]
fn threads_that_take_from_a_bucket_get_times_of_their_own() {
    let bucket = Bucket::new(1000, 0, 0);
    let take = || (0..1000).map(|_| bucket.take(1, 0)).collect::<Vec<_>>();
    let mut times = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
        let times = threads.into_iter().map(|thread| thread.join().unwrap());
        times.flatten().collect::<Vec<_>>()
    });
    times.sort_unstable();
    let wanted: Vec<_> = (0..4000).map(|number| number * MILLISECOND).collect();
    assert_eq!(times, wanted);
}

#[test]
fn the_highest_rates_and_the_largest_requests_do_not_wrap() {
    for per_second in [1, 1_000_000_000, u64::MAX] {
        let bucket = Bucket::new(per_second, u64::MAX, SECOND);
        assert!(bucket.take(u64::MAX, SECOND) <= SECOND);
        let next = bucket.take(u64::MAX, 2 * SECOND);
        assert!(bucket.take(1, 2 * SECOND) >= next);
    }
}
