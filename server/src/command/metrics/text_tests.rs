//! What is written, read again by the rules of the format, strictly.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::engine::throttle::RateLimits;

/// The samples of a name: labels and value.
type Samples = Vec<(BTreeMap<String, String>, f64)>;

#[derive(Debug)]
struct Family {
    kind: String,
    /// By the whole name, with `_bucket` and the like.
    samples: BTreeMap<String, Samples>,
}

fn is_name(text: &str, also: &str) -> bool {
    let is_letter =
        |letter: char| letter.is_ascii_alphabetic() || letter == '_' || also.contains(letter);
    text.starts_with(is_letter) && text.chars().all(|c| is_letter(c) || c.is_ascii_digit())
}

/// The labels of a sample, and what is behind them.
fn labels(text: &str) -> (BTreeMap<String, String>, &str) {
    let mut labels = BTreeMap::new();
    let Some(mut rest) = text.strip_prefix('{') else {
        return (labels, text);
    };
    loop {
        let (name, behind) = rest.split_once("=\"").expect("a label and its value");
        assert!(is_name(name, ""), "{name:?}");
        let mut value = String::new();
        let mut letters = behind.char_indices();
        let end = loop {
            match letters.next().expect("the value ends") {
                (at, '"') => break at,
                (_, '\\') => value.push(match letters.next().expect("an escape").1 {
                    'n' => '\n',
                    letter @ ('\\' | '"') => letter,
                    other => panic!("no escape: {other:?}"),
                }),
                (_, letter) => {
                    assert!(letter != '\n');
                    value.push(letter);
                }
            }
        };
        assert!(
            labels.insert(name.to_owned(), value).is_none(),
            "{name} twice"
        );
        rest = &behind[end + 1..];
        match rest.split_at(1) {
            (",", more) => rest = more,
            ("}", more) => return (labels, more),
            _ => panic!("{rest:?} behind a label"),
        }
    }
}

fn parse(text: &str) -> BTreeMap<String, Family> {
    assert!(text.ends_with('\n'));
    let mut families = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut current: Option<String> = None;
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let mut word = || words.next().expect("a comment with three words").to_owned();
            let (what, name, rest) = (word(), word(), word());
            assert!(is_name(&name, ":"), "{name:?}");
            match what.as_str() {
                "HELP" => {
                    assert!(helped.insert(name.clone()), "{name} is explained twice");
                    assert!(rest.ends_with('.') && !rest.contains('\\'), "{rest}");
                }
                "TYPE" => {
                    assert!(helped.contains(&name), "{name} is not explained");
                    assert!(["counter", "gauge", "histogram"].contains(&rest.as_str()));
                    let family = Family {
                        kind: rest,
                        samples: BTreeMap::new(),
                    };
                    // Also: all samples of a name stand together.
                    assert!(
                        families.insert(name.clone(), family).is_none(),
                        "{name} twice"
                    );
                    current = Some(name);
                }
                other => panic!("unknown comment {other}"),
            }
            continue;
        }
        let end = line.find(['{', ' ']).expect("a name");
        let (name, rest) = line.split_at(end);
        let (labels, value) = labels(rest);
        let value: f64 = value.strip_prefix(' ').expect("a blank").parse().unwrap();
        let base = current.as_deref().expect("a type comes before samples");
        let family: &mut Family = families.get_mut(base).unwrap();
        let suffix = name.strip_prefix(base).expect("samples of the type above");
        match family.kind.as_str() {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{name}"),
            "counter" => assert!(suffix.is_empty() && name.ends_with("_total"), "{name}"),
            _ => assert!(suffix.is_empty() && !name.ends_with("_total"), "{name}"),
        }
        let samples = family.samples.entry(name.to_owned()).or_default();
        assert!(
            !samples.iter().any(|(other, _)| *other == labels),
            "{line} twice"
        );
        samples.push((labels, value));
    }
    families
}

fn export(name: &str) -> ExportStatus {
    let histogram = Histogram {
        count: 5,
        sum_ns: 1_500_000_000,
        buckets: vec![(Some(1024), 2), (Some(1280), 1), (Some(4096), 1), (None, 1)],
    };
    // As an older server says it.
    let status = serde_json::json!({
        "name": name, "state": "serving", "access": "upgraded", "pid": 1, "backend": "mem:1M", "size_bytes": 1 << 20,
        "block_bytes": 512, "read_only": false, "write_cache": false, "serial": "a", "poll_us": "100", "cpus": null,
        "ublk": null,
        "vhost": {
            "socket": "/s", "queues": 1, "threads": 1, "upgrade": [], "sessions": [],
            "counters": {"reads": 5, "read_bytes": 4096, "errors": 2},
        },
    });
    let mut status: ExportStatus = serde_json::from_value(status).unwrap();
    status.limits = Some(RateLimits {
        iops_total: 1000,
        ..RateLimits::default()
    });
    let vhost = status.vhost.as_mut().unwrap();
    (vhost.counters.errors_eio, vhost.counters.throttled_ns) = (2, 1_500_000);
    vhost.in_flight = 3;
    vhost.latency = vec![Latency {
        op: "read".into(),
        storage: histogram.clone(),
        request: histogram,
    }];
    status
}

fn value(families: &BTreeMap<String, Family>, name: &str, wanted: &[(&str, &str)]) -> f64 {
    let family = families
        .values()
        .find_map(|family| family.samples.get(name));
    let samples = family.unwrap_or_else(|| panic!("no {name}"));
    let has_all = |labels: &BTreeMap<String, String>| {
        let has = |(label, text): &(&str, &str)| labels.get(*label).is_some_and(|l| l == text);
        wanted.iter().all(has)
    };
    let mut found = samples.iter().filter(|(labels, _)| has_all(labels));
    let value = found
        .next()
        .unwrap_or_else(|| panic!("no {name} {wanted:?}"))
        .1;
    assert!(found.next().is_none(), "more than one {name} {wanted:?}");
    value
}

#[test]
fn the_text_is_in_the_format_and_says_what_was_counted() {
    let strange = "a\"b\\c\nd{e=\"f\"} 1";
    let exports = [export("disk"), export(strange)];
    let families = parse(&render(&exports, &["gone"]));
    assert_eq!(value(&families, "ublkup_up", &[("export", "gone")]), 0.0);
    for name in ["disk", strange] {
        let get = |metric: &str, label| value(&families, metric, &[("export", name), label]);
        assert_eq!(value(&families, "ublkup_up", &[("export", name)]), 1.0);
        assert_eq!(get("ublkup_requests_total", ("op", "read")), 5.0);
        assert_eq!(get("ublkup_requests_total", ("op", "write_zeroes")), 0.0);
        assert_eq!(get("ublkup_bytes_total", ("op", "read")), 4096.0);
        assert_eq!(get("ublkup_errors_total", ("errno", "EIO")), 2.0);
        assert_eq!(
            get("ublkup_throttled_seconds_total", ("door", "vhost-user")),
            0.0015
        );
        assert_eq!(
            get("ublkup_requests_in_flight", ("door", "vhost-user")),
            3.0
        );
        assert_eq!(
            get("ublkup_limit_requests_per_second", ("op", "total")),
            1000.0
        );
    }
    for name in families.keys() {
        assert!(name.starts_with("ublkup_"), "{name}");
        let base_units = ["_ms", "_us", "_ns", "milli", "micro", "nano", "_kb", "_mb"];
        assert!(!base_units.iter().any(|unit| name.contains(unit)), "{name}");
    }
}

#[test]
fn histograms_are_cumulative_and_end_with_all_requests() {
    let families = parse(&render(&[export("disk")], &[]));
    for name in [
        "ublkup_request_duration_seconds",
        "ublkup_storage_duration_seconds",
    ] {
        let family = &families[name];
        assert_eq!(family.kind, "histogram");
        let buckets = &family.samples[&format!("{name}_bucket")];
        let bound = |labels: &BTreeMap<String, String>| match labels["le"].as_str() {
            "+Inf" => f64::INFINITY,
            bound => bound.parse().unwrap(),
        };
        let all: Vec<_> = buckets
            .iter()
            .map(|(labels, count)| (bound(labels), *count))
            .collect();
        assert!(
            all.windows(2)
                .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1)
        );
        assert_eq!(all.first(), Some(&(0.000_001_024, 2.0)));
        assert_eq!(all[1], (0.000_002_048, 3.0));
        assert_eq!(all[2], (0.000_004_096, 4.0));
        assert_eq!(all.last(), Some(&(f64::INFINITY, 5.0)));
        let of = |suffix: &str| value(&families, &format!("{name}{suffix}"), &[("op", "read")]);
        assert_eq!((of("_sum"), of("_count")), (1.5, 5.0));
    }
}

#[test]
fn times_are_written_in_seconds_without_a_loss() {
    for (ns, text) in [
        (0, "0"),
        (1, "0.000000001"),
        (1024, "0.000001024"),
        (1_000_000_000, "1"),
        (10_000_000_000, "10"),
        (u64::MAX, "18446744073.709551615"),
    ] {
        assert_eq!(seconds(ns), text);
    }
}

#[test]
fn without_exports_the_text_is_in_the_format_too() {
    parse(&render(&[], &[]));
}
