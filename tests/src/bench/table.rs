//! The results as Markdown.

use std::fmt::Write as _;

use super::figures::Samples;
use super::record::{Document, Latency, Row};

/// A number with as many digits as it is worth.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{:.2} M", value / 1e6),
        size if size >= 1e5 => format!("{:.0} k", value / 1e3),
        size if size >= 1e3 => format!("{:.1} k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn spread(samples: &Samples) -> String {
    let (least, most) = (number(samples.min), number(samples.max));
    if samples.samples.len() == 1 || least == most {
        return number(samples.median);
    }
    format!("{} ({least}–{most})", number(samples.median))
}

/// One row in one line.
pub fn summary(row: &Row) -> String {
    let figures: Vec<String> = row
        .candidates
        .iter()
        .map(|one| format!("{} {}", one.name, spread(&one.iops)))
        .collect();
    format!("{}, {}: {}", row.title, row.load, figures.join("; "))
}

/// The whole document.
pub fn markdown(document: &Document) -> String {
    let mut text = String::new();
    let machine = &document.machine;
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "Revision {}; {}, {} processors, {} MiB, Linux {}, {}, governor: {}. `{}`, {} s.\n\n\
         Requests per second, median (least–most) of the rounds; processor time of the server in µs \
         for a request; sleeps, system calls and user-mode instructions of the server for a request.",
        document.revision,
        machine.processor,
        machine.processors,
        machine.memory_mib,
        machine.kernel,
        machine.system,
        machine.governor,
        document.command,
        document.seconds,
    );
    let mut title = None;
    for row in &document.rows {
        let this = (&row.lane, &row.title);
        if title != Some(this) {
            title = Some(this);
            let columns = match has_latency(row) {
                true => {
                    "| load | server | IOPS | p50 µs | p99 µs | p99.9 µs | CPU µs/IO |\n\
                         |---|---|---:|---:|---:|---:|---:|\n"
                }
                false => {
                    "| load | server | IOPS | CPU µs/IO | sleeps/IO | syscalls/IO | instr./IO |\n\
                          |---|---|---:|---:|---:|---:|---:|\n"
                }
            };
            let _ = write!(text, "\n### {}: {}\n\n{columns}", row.lane, row.title);
        }
        if has_latency(row) {
            latencies(&mut text, row);
            continue;
        }
        for one in &row.candidates {
            let median = |samples: &Option<Samples>| {
                samples
                    .as_ref()
                    .map_or_else(String::new, |samples| number(samples.median))
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} |",
                row.load,
                one.name,
                spread(&one.iops),
                median(&one.cpu_us_per_io),
                median(&one.waits_per_io),
                one.syscalls_per_io.map(small).unwrap_or_default(),
                one.instructions_per_io.map(number).unwrap_or_default(),
            );
        }
    }
    if !document.measures.is_empty() {
        text.push_str("\n### Other figures\n\n| lane | what | value |\n|---|---|---:|\n");
    }
    for one in &document.measures {
        let value = format!("{} {}", spread(&one.value), one.unit);
        let _ = writeln!(text, "| {} | {} | {} |", one.lane, one.what, value.trim());
    }
    if !document.ratios.is_empty() {
        text.push_str("\n### Compared\n\n| load | | IOPS | CPU/IO |\n|---|---|---:|---:|\n");
    }
    for one in &document.ratios {
        let cpu = one.cpu.as_ref().map_or_else(String::new, spread);
        let _ = writeln!(
            text,
            "| {} | {} ÷ {} | {} | {cpu} |",
            one.what,
            one.above,
            one.below,
            spread(&one.iops)
        );
    }
    if !document.goals.is_empty() {
        text.push_str("\n### Goals\n\n| what | goal | reached | |\n|---|---|---|---|\n");
    }
    for goal in &document.goals {
        let reached = match goal.spread {
            Some((least, most)) => {
                let (least, most) = (small(least), small(most));
                format!("{} ({least}–{most})", small(goal.reached))
            }
            None => small(goal.reached),
        };
        let mark = if goal.met { "met" } else { "**not met**" };
        let _ = writeln!(
            text,
            "| {} | {} | {reached} | {mark} |",
            goal.what, goal.goal
        );
    }
    if !document.left_out.is_empty() {
        text.push_str("\nLeft out:\n\n");
    }
    for reason in &document.left_out {
        let _ = writeln!(text, "- {reason}");
    }
    text
}

fn has_latency(row: &Row) -> bool {
    row.candidates.iter().any(|one| one.latency_us.is_some())
}

/// A row of a lane that measures how long requests take.
fn latencies(text: &mut String, row: &Row) {
    for one in &row.candidates {
        let spread_of = |of: fn(&Latency) -> &Samples| {
            let latency = one.latency_us.as_ref().map(of);
            latency.map_or_else(String::new, spread)
        };
        let cpu = one.cpu_us_per_io.as_ref().map(|cpu| number(cpu.median));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            row.load,
            one.name,
            spread(&one.iops),
            spread_of(|latency| &latency.p50),
            spread_of(|latency| &latency.p99),
            spread_of(|latency| &latency.p99_9),
            cpu.unwrap_or_default(),
        );
    }
}

/// A number that may be close to zero.
pub fn small(value: f64) -> String {
    if value.abs() < 1.0 {
        format!("{value:.3}")
    } else {
        number(value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Percentiles;
    use super::super::record::{Bound, Candidate, Goal};
    use super::*;

    /// A document with one row.
    pub(super) fn sample() -> Document {
        let iops = Samples::of(&[900_000.0, 1_100_000.0, 1_000_000.0]).expect("samples");
        let goal = Goal::new("twice as fast", Bound::AtLeast(2.0), &iops);
        Document {
            format: super::super::record::FORMAT,
            machine: super::super::machine::Facts::here(),
            revision: "abc".to_owned(),
            command: "cargo lab bench".to_owned(),
            rows: vec![Row {
                lane: "native".to_owned(),
                title: "null: reads".to_owned(),
                load: "depth 32".to_owned(),
                candidates: vec![Candidate {
                    name: "ublkup".to_owned(),
                    iops,
                    syscalls_per_io: Some(0.0125),
                    ..Candidate::default()
                }],
            }],
            goals: vec![goal],
            left_out: vec!["rublk: no compiler".to_owned()],
            ..Document::default()
        }
    }

    #[test]
    fn the_table_has_medians_spreads_goals_and_what_was_left_out() {
        let text = markdown(&sample());
        let row = "| depth 32 | ublkup | 1.00 M (900 k–1.10 M) |  |  | 0.013 |  |";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| twice as fast | >= 2 |"), "{text}");
        assert!(text.contains("- rublk: no compiler"), "{text}");
    }

    #[test]
    fn a_row_with_latencies_has_columns_for_them() {
        let mut document = sample();
        let one = Percentiles {
            p50: 10.0,
            p99: 20.0,
            p99_9: 30.0,
        };
        document.rows[0].candidates[0].latency_us = Latency::of(&[one]);
        let text = markdown(&document);
        let row = "| depth 32 | ublkup | 1.00 M (900 k–1.10 M) | 10.0 | 20.0 | 30.0 |  |";
        assert!(
            text.contains(row) && text.contains("| p99.9 µs |"),
            "{text}"
        );
    }

    #[test]
    fn the_json_keeps_every_sample_and_can_be_read_again() {
        let text = serde_json::to_string(&sample()).expect("it can be encoded");
        let value: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
        let iops = &value["rows"][0]["candidates"][0]["iops"];
        assert_eq!(iops["samples"].as_array().map(Vec::len), Some(3));
        assert_eq!(iops["median"], 1_000_000.0);
        assert_eq!(value["format"], 1);
        let again: Document = serde_json::from_value(value).expect("it is a document");
        assert_eq!(again.goals, sample().goals);
    }

    #[test]
    fn numbers_keep_the_digits_they_are_worth() {
        assert_eq!(number(1_234_567.0), "1.23 M");
        assert_eq!(number(123_456.0), "123 k");
        assert_eq!(number(12_345.0), "12.3 k");
        assert_eq!(number(0.456), "0.46");
        assert_eq!(small(0.012), "0.012");
    }
}
