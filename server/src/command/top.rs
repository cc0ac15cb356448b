//! `ublkup top`: what all exports of the machine do, once a second.
//!
//! On a terminal it has the screen to itself until it is interrupted. Elsewhere it prints one table after the other, for
//! programs that read them.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::termios::tcgetwinsize;
use signal_hook::consts::{SIGINT, SIGTERM};
use upgrade_proto::printable;

use super::client::{Found, statuses};
use super::output::print;
use super::rates::{Rate, Rates, bytes, readings, time};
use crate::export::admin::ExportStatus;
use crate::export::runtime_dir::RuntimeDir;

const INTERVAL: Duration = Duration::from_secs(1);

/// How long an interrupt may go unnoticed.
const STEP: Duration = Duration::from_millis(100);

const HEAD: [&str; 14] = [
    "NAME",
    "DOOR",
    "ACCESS",
    "READS/s",
    "BYTES/s",
    "P50",
    "P99",
    "WRITES/s",
    "BYTES/s",
    "P50",
    "P99",
    "IN FLIGHT",
    "HELD/s",
    "ERRORS",
];

/// The first columns that are text.
const TEXTS: usize = 3;

// ECMA-48: the other screen and no cursor, and back; the upper left corner; what is behind a line, below all lines.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K\r\n";
const CLEAR_REST: &str = "\x1b[J";
const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[31m";
const PLAIN: &str = "\x1b[0m";

/// `ublkup top`
///
/// # Errors
///
/// When the runtime directory cannot be read, or standard output cannot be written to.
pub fn run(dir: &RuntimeDir) -> Result<ExitCode> {
    let interrupted = Arc::<AtomicBool>::default();
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let is_terminal = io::stdout().is_terminal();
    if is_terminal {
        print(ENTER)?;
    }
    let watched = watch(dir, is_terminal, &interrupted);
    if is_terminal {
        print(LEAVE)?;
    }
    watched.map(|()| ExitCode::SUCCESS)
}

fn watch(dir: &RuntimeDir, is_terminal: bool, interrupted: &AtomicBool) -> Result<()> {
    let mut before: Option<(Instant, Found)> = None;
    loop {
        let (now, found) = (Instant::now(), statuses(dir)?);
        let earlier = before.as_ref().map(|(at, earlier)| (earlier, now - *at));
        let rows = rows(earlier, &found);
        print(&match is_terminal {
            true => screen(&rows, &found, size()),
            false => {
                lines(&rows, &found)
                    .iter()
                    .map(|(line, _)| format!("{line}\n"))
                    .collect::<String>()
                    + "\n"
            }
        })?;
        before = Some((now, found));
        while now.elapsed() < INTERVAL {
            if interrupted.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::sleep(STEP);
        }
    }
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 1 => (size.ws_col.into(), size.ws_row.into()),
        _ => (80, 24),
    }
}

type Row = [String; HEAD.len()];

/// A row for each door. Without an earlier reading, and for an export that has just come, it has no rates.
fn rows(earlier: Option<(&Found, Duration)>, found: &Found) -> Vec<(Row, bool)> {
    let earlier_exports: BTreeMap<&str, &ExportStatus> = earlier
        .iter()
        .flat_map(|(found, _)| &found.exports)
        .map(|export| (export.name.as_str(), export))
        .collect();
    let mut rows = Vec::new();
    for export in &found.exports {
        let old = earlier_exports
            .get(export.name.as_str())
            .map(|old| readings(old));
        for door in readings(export) {
            let old = old.iter().flatten().find(|old| old.door == door.door);
            let interval = earlier.map(|(_, interval)| interval);
            let rates = old
                .zip(interval)
                .map(|(old, interval)| Rates::between(*old, door, interval));
            let rate = |rate: Option<&Rate>| match rate {
                None => ["-", "-", "-", "-"].map(str::to_owned),
                Some(rate) => [
                    rate.per_second.to_string(),
                    bytes(rate.bytes_per_second),
                    time(rate.median_ns),
                    time(rate.p99_ns),
                ],
            };
            let rates = rates.as_ref();
            let [reads, read_bytes, read_p50, read_p99] = rate(rates.map(|rates| &rates.reads));
            let [writes, write_bytes, write_p50, write_p99] =
                rate(rates.map(|rates| &rates.writes));
            let held = rates.map_or("-".into(), |rates| rates.throttled_per_second.to_string());
            let failing = rates.is_some_and(|rates| rates.errors > 0);
            let row = [
                export.name.clone(),
                door.door.to_owned(),
                export.access.to_string(),
                reads,
                read_bytes,
                read_p50,
                read_p99,
                writes,
                write_bytes,
                write_p50,
                write_p99,
                door.in_flight.to_string(),
                held,
                door.counters.errors.to_string(),
            ];
            // Another program may have answered as the server.
            rows.push((row.map(|cell| printable(&cell)), failing));
        }
    }
    rows
}

/// The lines of the table, and of exports without a server; whether each tells of something that is wrong.
fn lines(rows: &[(Row, bool)], found: &Found) -> Vec<(String, bool)> {
    let head = HEAD.map(str::to_owned);
    let all = || std::iter::once(&head).chain(rows.iter().map(|(row, _)| row));
    let widths: [usize; HEAD.len()] = std::array::from_fn(|column| {
        all()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let line = |row: &Row| {
        let cells = row.iter().zip(widths).enumerate();
        let cells = cells.map(|(column, (cell, width))| match column < TEXTS {
            true => format!("{cell:width$}"),
            false => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    let mut lines = vec![(line(&head), false)];
    lines.extend(rows.iter().map(|(row, failing)| (line(row), *failing)));
    let silent = found.silent.iter();
    lines.extend(
        silent.map(|silent| (printable(&format!("{}: {}", silent.name, silent.why)), true)),
    );
    lines
}

/// What is sent to a terminal of so many columns and lines: what does not fit is left out.
fn screen(rows: &[(Row, bool)], found: &Found, (columns, height): (usize, usize)) -> String {
    let mut text = HOME.to_owned();
    let lines = lines(rows, found);
    // The last line stays empty: a line break there would move all the others.
    for (number, (line, wrong)) in lines.iter().take(height - 1).enumerate() {
        text += match (number, wrong) {
            (0, _) => BOLD,
            (_, true) => RED,
            (_, false) => PLAIN,
        };
        text.extend(line.chars().take(columns));
        text += PLAIN;
        text += CLEAR_LINE;
    }
    text + CLEAR_REST
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::client::Silent;

    fn found() -> Found {
        let row = |name: &str, reads| {
            let status = serde_json::json!({
                "name": name, "state": "serving", "access": "upgraded", "pid": 1, "backend": "mem:1M",
                "size_bytes": 1 << 20, "block_bytes": 512, "read_only": false, "write_cache": false, "serial": "a",
                "poll_us": "100", "cpus": null, "ublk": null,
                "vhost": {
                    "socket": "/s", "queues": 1, "threads": 1, "upgrade": [], "sessions": [],
                    "counters": {"reads": reads, "read_bytes": 0, "errors": reads},
                },
            });
            serde_json::from_value(status).unwrap()
        };
        Found {
            exports: vec![row("disk", 1000), row("\x1b[2Jx", 0)],
            silent: vec![Silent {
                name: "gone".into(),
                why: "its server\nhas died".into(),
                is_dead: true,
            }],
        }
    }

    #[test]
    fn a_screen_fits_and_has_no_control_characters_but_its_own() {
        let (earlier, mut later) = (found(), found());
        let vhost = later.exports[0].vhost.as_mut().unwrap();
        vhost.counters.reads = 4000;
        vhost.counters.errors = 1001;
        let rows = rows(Some((&earlier, Duration::from_secs(2))), &later);
        let text = screen(&rows, &later, (40, 4));
        assert_eq!(text.matches(CLEAR_LINE).count(), 3, "{text:?}");
        let text = screen(&rows, &later, (200, 24));
        assert!(text.contains("1500"), "{text:?}");
        assert_eq!(
            text.matches(RED).count(),
            2,
            "an error and a dead server: {text:?}"
        );
        assert!(!text.contains("\x1b[2J"), "{text:?}");
        let lines = lines(&rows, &later);
        assert_eq!(lines.len(), 4);
        assert!(
            !lines
                .iter()
                .any(|(line, _)| line.chars().any(char::is_control))
        );
    }

    #[test]
    fn an_export_that_has_just_come_has_no_rates() {
        let nothing = Found {
            exports: Vec::new(),
            silent: Vec::new(),
        };
        for earlier in [None, Some((&nothing, Duration::from_secs(1)))] {
            let rows = rows(earlier, &found());
            assert_eq!(rows[0].0[3..7], ["-", "-", "-", "-"]);
        }
    }
}
