//! What is measured, in the text format of Prometheus
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>, version 0.0.4).
//!
//! Base units, seconds and bytes. All samples of a name stand together, as the format demands. Operations of which an
//! export has seen none have no histogram.

use std::fmt::{Display, Write};

use crate::engine::counters::Totals;
use crate::engine::latency::{Histogram, Latency, OCTAVES};
use crate::export::admin::ExportStatus;

/// A door of an export.
struct Door<'a> {
    export: &'a str,
    door: &'static str,
    counters: &'a Totals,
    in_flight: u64,
    latency: &'a [Latency],
}

fn doors(exports: &[ExportStatus]) -> impl Iterator<Item = Door<'_>> {
    exports.iter().flat_map(|export| {
        let ublk = export.ublk.as_ref().map(|door| Door {
            export: &export.name,
            door: "ublk",
            counters: &door.counters,
            in_flight: door.in_flight,
            latency: &door.latency,
        });
        let vhost = export.vhost.as_ref().map(|door| Door {
            export: &export.name,
            door: "vhost-user",
            counters: &door.counters,
            in_flight: door.in_flight,
            latency: &door.latency,
        });
        ublk.into_iter().chain(vhost)
    })
}

/// A time as seconds.
fn seconds(ns: u64) -> String {
    // A number of seconds with as many digits as it needs; none of them is lost, as f64 would lose some.
    let text = format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The text, as it is written.
#[derive(Default)]
struct Text(String);

type Labels<'a> = &'a [(&'a str, &'a str)];

impl Text {
    /// Begins the samples of a name. `kind` is `counter`, `gauge` or `histogram`.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.0 += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.0 += name;
        for (number, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', r"\\").replace('"', "\\\"");
            let text = text.replace('\n', r"\n");
            let begin = if number == 0 { '{' } else { ',' };
            self.0 += &format!("{begin}{label}=\"{text}\"");
        }
        let end = if labels.is_empty() { "" } else { "}" };
        // Writing to a String does not fail.
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn histogram(&mut self, name: &str, labels: Labels<'_>, histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        let with = |text: &mut Self, bound: &str, count| {
            let labels = [labels, &[("le", bound)]].concat();
            text.sample(&bucket, &labels, count);
        };
        for octave in OCTAVES {
            with(self, &seconds(1 << octave), histogram.up_to(octave));
        }
        with(self, "+Inf", histogram.count);
        self.sample(&format!("{name}_sum"), labels, seconds(histogram.sum_ns));
        self.sample(&format!("{name}_count"), labels, histogram.count);
    }

    /// A counter of each door.
    fn counter<V: Display>(
        &mut self,
        (name, help): (&str, &str),
        exports: &[ExportStatus],
        value: impl Fn(&Door<'_>) -> V,
    ) {
        self.family(name, "counter", help);
        for door in doors(exports) {
            let labels = [("export", door.export), ("door", door.door)];
            self.sample(name, &labels, value(&door));
        }
    }

    /// A counter of each door that is divided by another label.
    fn counters<const N: usize>(
        &mut self,
        (name, help): (&str, &str),
        label: &str,
        exports: &[ExportStatus],
        values: impl Fn(&Totals) -> [(&'static str, u64); N],
    ) {
        self.family(name, "counter", help);
        for door in doors(exports) {
            for (text, value) in values(door.counters) {
                let labels = [("export", door.export), ("door", door.door), (label, text)];
                self.sample(name, &labels, value);
            }
        }
    }
}

/// What these exports measured. `silent` are those that have no server, or one that does not answer.
pub(super) fn render(exports: &[ExportStatus], silent: &[&str]) -> String {
    let mut text = Text::default();
    exports_themselves(&mut text, exports, silent);
    requests(&mut text, exports);
    let durations = [
        (
            "ublkup_request_duration_seconds",
            "From when the server took a request from its queue to when it answered it, in rounds of its loop.",
        ),
        (
            "ublkup_storage_duration_seconds",
            "From when the storage was given a request to when the server saw its completion.",
        ),
    ];
    for (number, (name, help)) in durations.into_iter().enumerate() {
        text.family(name, "histogram", help);
        for door in doors(exports) {
            for latency in door.latency {
                let labels = [
                    ("export", door.export),
                    ("door", door.door),
                    ("op", &latency.op),
                ];
                let histogram = [&latency.request, &latency.storage][number];
                text.histogram(name, &labels, histogram);
            }
        }
    }
    text.0
}

fn exports_themselves(text: &mut Text, exports: &[ExportStatus], silent: &[&str]) {
    let name = "ublkup_up";
    text.family(name, "gauge", "Whether a server answers for the export.");
    for export in exports {
        text.sample(name, &[("export", &export.name)], 1);
    }
    for export in silent {
        text.sample(name, &[("export", export)], 0);
    }
    let name = "ublkup_size_bytes";
    text.family(name, "gauge", "Size of the disk.");
    for export in exports {
        text.sample(name, &[("export", &export.name)], export.size_bytes);
    }
    let name = "ublkup_access";
    text.family(
        name,
        "gauge",
        "Who may write: 1 for the state that the export is in.",
    );
    for export in exports {
        let state = export.access.to_string();
        text.sample(name, &[("export", &export.name), ("state", &state)], 1);
    }
    let name = "ublkup_sessions";
    text.family(name, "gauge", "vhost-user clients that are connected.");
    for export in exports {
        if let Some(door) = &export.vhost {
            text.sample(name, &[("export", &export.name)], door.sessions.len());
        }
    }
    let limits = || {
        exports
            .iter()
            .filter_map(|e| Some((&e.name, e.limits.as_ref()?)))
    };
    let name = "ublkup_limit_requests_per_second";
    text.family(name, "gauge", "Limits on requests.");
    for (export, limits) in limits() {
        let all = [
            ("total", limits.iops_total),
            ("read", limits.iops_read),
            ("write", limits.iops_write),
        ];
        for (op, rate) in all.into_iter().filter(|(_, rate)| *rate > 0) {
            text.sample(name, &[("export", export), ("op", op)], rate);
        }
    }
    let name = "ublkup_limit_bytes_per_second";
    text.family(name, "gauge", "Limits on bytes.");
    for (export, limits) in limits() {
        let all = [
            ("total", limits.bps_total),
            ("read", limits.bps_read),
            ("write", limits.bps_write),
        ];
        for (op, rate) in all.into_iter().filter(|(_, rate)| *rate > 0) {
            text.sample(name, &[("export", export), ("op", op)], rate);
        }
    }
}

fn requests(text: &mut Text, exports: &[ExportStatus]) {
    let name = ("ublkup_requests_total", "Requests that ended.");
    text.counters(name, "op", exports, |counted| {
        [
            ("read", counted.reads),
            ("write", counted.writes),
            ("flush", counted.flushes),
            ("discard", counted.discards),
            ("write_zeroes", counted.write_zeroes),
        ]
    });
    let name = ("ublkup_bytes_total", "Bytes read and written.");
    text.counters(name, "op", exports, |counted| {
        [("read", counted.read_bytes), ("write", counted.write_bytes)]
    });
    let name = (
        "ublkup_errors_total",
        "Requests that failed, by what the client was told.",
    );
    text.counters(name, "errno", exports, |counted| {
        [
            ("EIO", counted.errors_eio),
            ("EOPNOTSUPP", counted.errors_eopnotsupp),
            ("EPERM", counted.errors_eperm),
            ("ENOSPC", counted.errors_enospc),
            ("EBADE", counted.errors_ebade),
        ]
    });
    let name = "ublkup_requests_in_flight";
    text.family(
        name,
        "gauge",
        "Requests that were taken and have not ended.",
    );
    for door in doors(exports) {
        let labels = [("export", door.export), ("door", door.door)];
        text.sample(name, &labels, door.in_flight);
    }
    let name = (
        "ublkup_throttled_requests_total",
        "Requests that limits held back.",
    );
    text.counter(name, exports, |door| door.counters.throttled);
    let name = (
        "ublkup_throttled_seconds_total",
        "For how long limits held requests back, all together.",
    );
    text.counter(name, exports, |door| seconds(door.counters.throttled_ns));
    let name = (
        "ublkup_sleeps_total",
        "How often queue threads waited for work.",
    );
    text.counter(name, exports, |door| door.counters.sleeps);
    let name = (
        "ublkup_rounds_total",
        "Rounds of the loops of queue threads.",
    );
    text.counter(name, exports, |door| door.counters.batches);
    let name = ("ublkup_enters_total", "Calls of io_uring_enter(2).");
    text.counter(name, exports, |door| door.counters.enters);
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
