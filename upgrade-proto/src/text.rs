//! Text of others, fit to be shown.

use std::fmt::Write;

/// `text` on one line and without effect on a terminal: control characters, and those that change the direction of what
/// follows, are written as Rust writes them (`\n`, `\u{1b}`).
///
/// For all text that another user or a peer has chosen: names of files, mount points and processes, answers and errors.
/// Otherwise a newline in it forges a line of a log, and an escape sequence is executed by the terminal of the reader.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        // Writing to a string does not fail.
        let _written = match letter {
            control if control.is_control() => write!(shown, "{}", control.escape_debug()),
            format if is_format(format) => write!(shown, "{}", format.escape_unicode()),
            plain => write!(shown, "{plain}"),
        };
    }
    shown
}

/// Marks, overrides and isolates of direction; separators of lines; what is invisible.
fn is_format(letter: char) -> bool {
    matches!(
        letter,
        '\u{61c}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_cursor_is_escaped_and_all_else_stays() {
        for (text, shown) in [
            (
                "/srv/a b/größe-\u{78c1}\u{76d8}.img",
                "/srv/a b/größe-\u{78c1}\u{76d8}.img",
            ),
            ("a\nERROR b", r"a\nERROR b"),
            (
                "\u{1b}[2J\u{9b}2J\u{7f}\r\t\0",
                r"\u{1b}[2J\u{9b}2J\u{7f}\r\t\0",
            ),
            ("gnp.\u{202e}exe\u{2028}", r"gnp.\u{202e}exe\u{2028}"),
            (r#"it's "\n""#, r#"it's "\n""#),
        ] {
            assert_eq!(printable(text), shown);
        }
    }
}
