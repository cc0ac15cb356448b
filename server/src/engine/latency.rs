//! How long requests take: histograms that queue threads count in and other threads read.
//!
//! A thread reads the clock once in a round of its loop, and only in a round in which a request ends or begins that the
//! storage does not complete at once. So times are exact to one round. A request that ends in the round in which it
//! began is not timed at all and counts as zero: it costs nothing here, and its number is that of all requests without
//! those that are counted here.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::request::Op;

/// Buckets for each power of two.
const PER_OCTAVE: u32 = 4;

/// Times up to 2^10 ns share a bucket, and so do those above 2^36 ns, 69 s.
const FIRST_OCTAVE: u32 = 10;
const LAST_OCTAVE: u32 = 36;

/// The number of buckets.
const BUCKETS: usize = (LAST_OCTAVE - FIRST_OCTAVE) as usize * PER_OCTAVE as usize + 2;

/// The kinds of requests that are told apart, in the order in which they are shown.
pub const OPS: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];

/// The bucket of a time: the first whose bound is not below it.
fn bucket(ns: u64) -> usize {
    let below = ns.saturating_sub(1);
    let octave = below.checked_ilog2().unwrap_or(0);
    if octave < FIRST_OCTAVE {
        return 0;
    }
    if octave >= LAST_OCTAVE {
        return BUCKETS - 1;
    }
    let quarter = (below >> (octave - 2)) % u64::from(PER_OCTAVE);
    let number = u64::from((octave - FIRST_OCTAVE) * PER_OCTAVE) + quarter + 1;
    // No truncation: it is less than BUCKETS.
    usize::try_from(number).unwrap_or(BUCKETS - 1)
}

/// The longest time of a bucket; the last one has none.
fn bound_ns(bucket: usize) -> Option<u64> {
    if bucket == BUCKETS - 1 {
        return None;
    }
    let Some(number) = bucket.checked_sub(1) else {
        return Some(1 << FIRST_OCTAVE);
    };
    let (number, per_octave) = (number as u64, u64::from(PER_OCTAVE));
    let octave = 1 << (number / per_octave + u64::from(FIRST_OCTAVE));
    Some(octave + octave / per_octave * (number % per_octave + 1))
}

/// One histogram, with one writer.
#[derive(Debug)]
struct Counts {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            sum_ns: AtomicU64::new(0),
        }
    }
}

impl Counts {
    fn count(&self, ns: u64) {
        let add = |counter: &AtomicU64, amount| {
            // One writer per counter: no read-modify-write needed.
            counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
        };
        add(&self.buckets[bucket(ns)], 1);
        add(&self.sum_ns, ns);
    }

    fn add_to(&self, sum: &mut Sum) {
        for (sum, count) in sum.buckets.iter_mut().zip(&self.buckets) {
            *sum += count.load(Ordering::Relaxed);
        }
        sum.sum_ns += self.sum_ns.load(Ordering::Relaxed);
    }
}

/// The latencies of the requests of one queue thread.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    /// Of requests that went to the storage as they came.
    direct: [Counts; OPS.len()],
    /// Of requests that limits held back: in the storage, and in all.
    held: [[Counts; 2]; OPS.len()],
}

impl Latencies {
    /// Counts a request that the storage did not complete at once. It came at `came_ns`, the storage got it at `began_ns`.
    pub(super) fn count(&self, op: Op, (came_ns, began_ns): (u64, u64), now_ns: u64) {
        let (storage_ns, all_ns) = (now_ns - began_ns, now_ns - came_ns);
        let op = op.number();
        if came_ns == began_ns {
            self.direct[op].count(all_ns);
        } else {
            self.held[op][0].count(storage_ns);
            self.held[op][1].count(all_ns);
        }
    }

    /// Adds a reading to `sums`.
    pub(super) fn add_to(&self, sums: &mut Sums) {
        for (op, sums) in sums.0.iter_mut().enumerate() {
            let [held_storage, held_all] = &self.held[op];
            self.direct[op].add_to(&mut sums[0]);
            held_storage.add_to(&mut sums[0]);
            self.direct[op].add_to(&mut sums[1]);
            held_all.add_to(&mut sums[1]);
        }
    }
}

/// Readings of several threads: for each operation in the storage, and in all.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums([[Sum; 2]; OPS.len()]);

#[derive(Clone, Debug)]
struct Sum {
    buckets: [u64; BUCKETS],
    sum_ns: u64,
}

impl Default for Sum {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            sum_ns: 0,
        }
    }
}

impl Sums {
    /// What they are, given how many requests of each kind there were in all. Kinds of which there were none are left out.
    pub(super) fn latencies(&self, requests: [u64; OPS.len()]) -> Vec<Latency> {
        let histogram = |sum: &Sum, requests: u64| {
            let timed: u64 = sum.buckets.iter().sum();
            let mut counts = sum.buckets;
            // A request is timed before it is counted.
            counts[0] += requests.saturating_sub(timed);
            let counts = counts.iter().enumerate().filter(|(_, count)| **count > 0);
            let buckets = counts.map(|(bucket, count)| (bound_ns(bucket), *count));
            Histogram {
                count: requests.max(timed),
                sum_ns: sum.sum_ns,
                buckets: buckets.collect(),
            }
        };
        let ops = OPS.iter().zip(&self.0).zip(requests);
        let used = ops.filter(|(_, requests)| *requests > 0);
        used.map(|((op, [storage, request]), requests)| Latency {
            op: (*op).to_owned(),
            storage: histogram(storage, requests),
            request: histogram(request, requests),
        })
        .collect()
    }
}

/// How long the requests of one kind took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// One of [`OPS`].
    pub op: String,
    /// From when the storage was given a request until the server saw its completion.
    pub storage: Histogram,
    /// From when the server took a request from its queue: also what limits held it back for.
    pub request: Histogram,
}

/// A histogram of times in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Requests.
    pub count: u64,
    /// All their times together.
    pub sum_ns: u64,
    /// Buckets that are not empty, in order: the longest time that belongs there, which the last may lack, and how many
    /// requests. It is at most a quarter longer than that of the bucket before it.
    pub buckets: Vec<(Option<u64>, u64)>,
}

impl Histogram {
    /// The time that so many of a thousand requests did not exceed, as the bound of its bucket. `None` without requests,
    /// and above the last bound.
    #[must_use]
    pub fn permille_ns(&self, permille: u64) -> Option<u64> {
        let wanted = (self.count * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        let mut buckets = self.buckets.iter();
        let found = buckets.find(|(_, count)| {
            seen += count;
            seen >= wanted
        });
        found.and_then(|(bound, _)| *bound)
    }

    /// What came since an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |bound| {
            let same = earlier.buckets.iter().find(|(other, _)| *other == bound);
            same.map_or(0, |(_, count)| *count)
        };
        let buckets = self.buckets.iter();
        let buckets = buckets.map(|&(bound, count)| (bound, count.saturating_sub(before(bound))));
        Self {
            count: self.count.saturating_sub(earlier.count),
            sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns),
            buckets: buckets.filter(|(_, count)| *count > 0).collect(),
        }
    }

    /// How many requests took at most 2^`octave` ns.
    #[must_use]
    pub fn up_to(&self, octave: u32) -> u64 {
        let limit = 1 << octave;
        let within = (self.buckets.iter()).filter(|(bound, _)| bound.is_some_and(|b| b <= limit));
        within.map(|(_, count)| count).sum()
    }
}

/// The powers of two, in nanoseconds, that are bounds of buckets.
pub const OCTAVES: std::ops::RangeInclusive<u32> = FIRST_OCTAVE..=LAST_OCTAVE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_each_time_is_in_the_first_that_reaches_it() {
        let bounds: Vec<_> = (0..BUCKETS - 1)
            .map(|bucket| bound_ns(bucket).unwrap())
            .collect();
        assert!(bounds.is_sorted());
        assert_eq!(bounds.first(), Some(&1024));
        assert_eq!(bounds.last(), Some(&(1 << LAST_OCTAVE)));
        for octave in OCTAVES {
            assert!(bounds.contains(&(1 << octave)));
        }
        for (number, bound) in bounds.iter().enumerate() {
            assert_eq!(bucket(*bound), number);
            assert_eq!(bucket(*bound + 1), number + 1);
        }
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        for pair in bounds.windows(2) {
            assert!(
                (pair[1] - pair[0]) * u64::from(PER_OCTAVE) <= pair[0],
                "{pair:?}"
            );
        }
    }

    fn read(came_and_began: (u64, u64), now_ns: u64) -> impl Fn(&Latencies) {
        move |latencies| latencies.count(Op::Read, came_and_began, now_ns)
    }

    fn reading(requests: u64, counts: &[&dyn Fn(&Latencies)]) -> Latency {
        let latencies = Latencies::default();
        counts.iter().for_each(|count| count(&latencies));
        let mut sums = Sums::default();
        latencies.add_to(&mut sums);
        sums.latencies([requests, 0, 0, 0, 0]).remove(0)
    }

    #[test]
    fn what_limits_held_back_took_longer_in_all_than_in_the_storage() {
        let direct = read((100, 100), 5100);
        let held = read((100, 900_100), 905_100);
        let got = reading(2, &[&direct, &held]);
        assert_eq!(got.storage.buckets, [(Some(5120), 2)]);
        assert_eq!(got.request.buckets, [(Some(5120), 1), (Some(917_504), 1)]);
        assert_eq!((got.storage.sum_ns, got.request.sum_ns), (10_000, 910_000));
    }

    #[test]
    fn what_ended_at_once_counts_as_zero() {
        let timed = read((0, 0), 1 << 20);
        let got = reading(1000, &[&timed]);
        assert_eq!(got.request.count, 1000);
        assert_eq!(got.request.sum_ns, 1 << 20);
        assert_eq!(got.request.buckets, [(Some(1024), 999), (Some(1 << 20), 1)]);
        assert_eq!(got.request.permille_ns(999), Some(1024));
        assert_eq!(got.request.permille_ns(1000), Some(1 << 20));
        assert_eq!(got.request.up_to(19), 999);
        assert_eq!(got.request.up_to(20), 1000);
    }

    #[test]
    fn the_difference_of_two_readings_is_what_came_between_them() {
        let (short, long) = (read((0, 0), 2000), read((0, 0), 1 << 30));
        let earlier = reading(2, &[&short, &long]).request;
        let later = reading(4, &[&short, &short, &long, &long]).request;
        let since = later.since(&earlier);
        assert_eq!(since.count, 2);
        assert_eq!(since.buckets, [(Some(2048), 1), (Some(1 << 30), 1)]);
        assert_eq!(later.since(&later).permille_ns(500), None);
    }
}
