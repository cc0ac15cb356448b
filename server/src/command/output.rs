//! What commands print.

use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;

/// Writes to standard output. A reader that went away ends the program quietly, as for any filter.
pub(super) fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

/// Tells the user what went wrong, or what to know. Where standard error cannot be written to, nothing can be told.
pub fn complain(what: &str) {
    let _lost = writeln!(io::stderr(), "ublkup: {what}");
}

/// Prints JSON for people and programs.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// `1 queue`, `2 queues`.
pub(super) fn count(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}
