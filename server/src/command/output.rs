//! What commands print.

use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;
use upgrade_proto::printable;

use crate::engine::log;

/// Writes to standard output. A reader that went away ends the program quietly, as for any filter.
pub(super) fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

/// Writes one line to standard output, whatever is in the text.
pub(super) fn print_line(text: &str) -> Result<()> {
    print(&format!("{}\n", printable(text)))
}

/// Tells the user what went wrong, or what to know, on one line. Where standard error cannot be written to, nothing can
/// be told.
pub fn complain(what: &str) {
    let priority = match log::is_journal() {
        true => log::priority(tracing::Level::ERROR),
        false => "",
    };
    let _lost = writeln!(io::stderr(), "{priority}ublkup: {}", printable(what));
}

/// Prints JSON for people and programs.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    print_json_text(&serde_json::to_string_pretty(value)?)
}

/// Prints the text of a JSON value.
pub(super) fn print_json_text(text: &str) -> Result<()> {
    print(&format!("{}\n", escape_json(text)))
}

/// JSON needs no escapes for the control characters above ASCII, which terminals obey all the same.
fn escape_json(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\u{7f}'..='\u{9f}' => escaped.push_str(&format!("\\u{:04x}", u32::from(letter))),
            other => escaped.push(other),
        }
    }
    escaped
}

/// `1 queue`, `2 queues`.
pub(super) fn count(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        number => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_is_no_plural_and_none_is() {
        let texts = [0, 1, 2, 11, 21].map(|number| count(number, "queue"));
        assert_eq!(
            texts,
            ["0 queues", "1 queue", "2 queues", "11 queues", "21 queues"]
        );
    }

    #[test]
    fn json_on_a_terminal_is_the_same_value_without_control_characters() {
        let value = "\u{1b}[2J \u{9b}2J \u{7f} größe\n";
        let text = escape_json(&serde_json::to_string(value).unwrap());
        assert!(!text.chars().any(char::is_control), "{text}");
        assert!(text.contains("größe"));
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), value);
    }
}
