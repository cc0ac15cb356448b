//! What an export did between two readings, for `stat --watch` and `top`.

use std::time::Duration;

use upgrade_proto::printable;

use super::output::count;
use crate::engine::counters::Totals;
use crate::engine::latency::{Histogram, Latency};
use crate::export::admin::ExportStatus;
use crate::request::format_size;

/// A door of an export at one time.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    pub door: &'static str,
    pub in_flight: u64,
    pub counters: &'a Totals,
    pub latency: &'a [Latency],
}

/// The doors of an export.
pub(super) fn readings(status: &ExportStatus) -> Vec<Reading<'_>> {
    let ublk = status.ublk.as_ref().map(|door| Reading {
        door: "ublk",
        in_flight: door.in_flight,
        counters: &door.counters,
        latency: &door.latency,
    });
    let vhost = status.vhost.as_ref().map(|door| Reading {
        door: "vhost-user",
        in_flight: door.in_flight,
        counters: &door.counters,
        latency: &door.latency,
    });
    ublk.into_iter().chain(vhost).collect()
}

/// What requests of one kind came to in an interval.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rate {
    pub per_second: u64,
    pub bytes_per_second: u64,
    /// The time that half of them did not exceed, and that of 99 in 100; in nanoseconds.
    pub median_ns: Option<u64>,
    pub p99_ns: Option<u64>,
}

/// What a door did in an interval.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rates {
    pub reads: Rate,
    pub writes: Rate,
    pub flushes_per_second: u64,
    pub errors: u64,
    pub throttled_per_second: u64,
}

impl Rates {
    /// What happened between two readings of a door.
    pub(super) fn between(before: Reading<'_>, after: Reading<'_>, interval: Duration) -> Self {
        // A door that was opened anew begins at zero.
        let since = |get: fn(&Totals) -> u64| {
            let (before, after) = (get(before.counters), get(after.counters));
            after.checked_sub(before).unwrap_or(after)
        };
        let per_second = |get| {
            let count = u128::from(since(get)) * 1_000_000;
            let rate = count / interval.as_micros().max(1);
            u64::try_from(rate).unwrap_or(u64::MAX)
        };
        let times = |op: &str| {
            let of = |latency: &[Latency]| {
                let found = latency.iter().find(|latency| latency.op == op);
                found.map_or_else(Histogram::default, |latency| latency.request.clone())
            };
            let times = of(after.latency).since(&of(before.latency));
            (times.permille_ns(500), times.permille_ns(990))
        };
        let rate = |op, requests, bytes| {
            let (median_ns, p99_ns) = times(op);
            Rate {
                per_second: per_second(requests),
                bytes_per_second: per_second(bytes),
                median_ns,
                p99_ns,
            }
        };
        Self {
            reads: rate("read", |t| t.reads, |t| t.read_bytes),
            writes: rate("write", |t| t.writes, |t| t.write_bytes),
            flushes_per_second: per_second(|t| t.flushes),
            errors: since(|t| t.errors),
            throttled_per_second: per_second(|t| t.throttled),
        }
    }
}

/// What each door did since an earlier reading, a line each.
pub(super) fn changes(earlier: &ExportStatus, now: &ExportStatus, interval: Duration) -> String {
    let old = readings(earlier);
    let doors = readings(now).into_iter().filter_map(|door| {
        let before = old.iter().find(|old| old.door == door.door)?;
        let rates = Rates::between(*before, door, interval);
        let of = |what, rate: &Rate| {
            let (median, p99) = (time(rate.median_ns), time(rate.p99_ns));
            let (count, size) = (rate.per_second, bytes(rate.bytes_per_second));
            format!("{count} {what}/s ({size}B/s, p50 {median}, p99 {p99})")
        };
        let line = format!(
            "{} {}: {}, {}, {} flushes/s, {} in flight, {} held back/s, {}",
            now.name,
            door.door,
            of("reads", &rates.reads),
            of("writes", &rates.writes),
            rates.flushes_per_second,
            door.in_flight,
            rates.throttled_per_second,
            count(usize::try_from(rates.errors).unwrap_or(usize::MAX), "error"),
        );
        Some(printable(&line) + "\n")
    });
    doors.collect()
}

/// A time as people read it: `83us`, `1.2ms`, `4.0s`.
pub(super) fn time(ns: Option<u64>) -> String {
    match ns {
        None => "-".into(),
        Some(ns) if ns < 1_000_000 => format!("{}us", ns.div_ceil(1000)),
        Some(ns) if ns < 1_000_000_000 => tenths(ns / 100_000, "ms"),
        Some(ns) => tenths(ns / 100_000_000, "s"),
    }
}

/// A number of bytes as people read it, to a tenth of the largest unit that it has.
pub(super) fn bytes(bytes: u64) -> String {
    for (unit, shift) in [("G", 30), ("M", 20), ("K", 10)] {
        if bytes >= 1 << shift {
            let in_tenths = (u128::from(bytes) * 10) >> shift;
            return tenths(u64::try_from(in_tenths).unwrap_or(u64::MAX), unit);
        }
    }
    format_size(bytes)
}

fn tenths(number: u64, unit: &str) -> String {
    match number {
        100.. => format!("{}{unit}", number / 10),
        _ => format!("{}.{}{unit}", number / 10, number % 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second_and_of_the_interval_alone() {
        let latency = |counts: &[(u64, u64)]| {
            let buckets: Vec<_> = counts
                .iter()
                .map(|(ns, count)| (Some(*ns), *count))
                .collect();
            let request = Histogram {
                count: counts.iter().map(|(_, count)| count).sum(),
                sum_ns: 0,
                buckets,
            };
            [Latency {
                op: "read".into(),
                storage: Histogram::default(),
                request,
            }]
        };
        let totals = |reads| Totals {
            reads,
            read_bytes: reads * 4096,
            errors: 1,
            ..Totals::default()
        };
        let (old, new) = (totals(1000), totals(3000));
        let (old_times, new_times) = (
            latency(&[(1024, 1000)]),
            latency(&[(1024, 1010), (8192, 1990)]),
        );
        let reading = |counters, latency| Reading {
            door: "ublk",
            in_flight: 0,
            counters,
            latency,
        };
        let (before, after) = (reading(&old, &old_times[..]), reading(&new, &new_times[..]));
        let rates = Rates::between(before, after, Duration::from_secs(2));
        assert_eq!(rates.reads.per_second, 1000);
        assert_eq!(rates.reads.bytes_per_second, 4096 * 1000);
        assert_eq!(
            (rates.reads.median_ns, rates.reads.p99_ns),
            (Some(8192), Some(8192))
        );
        assert_eq!((rates.writes.per_second, rates.writes.median_ns), (0, None));
        assert_eq!(rates.errors, 0);
        let anew = Rates::between(after, before, Duration::from_secs(1));
        assert_eq!(anew.reads.per_second, 1000, "the door was opened anew");
    }

    #[test]
    fn times_and_sizes_are_short() {
        for (ns, text) in [
            (1024, "2us"),
            (83_000, "83us"),
            (1_250_000, "1.2ms"),
            (83_000_000, "83ms"),
            (4_000_000_000, "4.0s"),
        ] {
            assert_eq!(time(Some(ns)), text);
        }
        for (number, text) in [(0, "0"), (512, "512"), (4096, "4.0K"), (10 << 20, "10M")] {
            assert_eq!(bytes(number), text);
        }
        assert_eq!(bytes(u64::MAX), "17179869183G");
    }
}
