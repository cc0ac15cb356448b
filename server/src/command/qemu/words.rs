//! The syntax of QEMU's options, and of the shell.

use upgrade_proto::printable;

use crate::config::commas;

/// `key=value,…` as QEMU reads it: a bare first word is the value of `first`, any other bare word is switched on.
pub fn pairs(text: &str, first: &str) -> Vec<(String, String)> {
    let pair = |(index, part): (usize, String)| match commas::key_value(&part) {
        (key, Some(value)) => (key.to_owned(), value.to_owned()),
        (_, None) if index == 0 => (first.to_owned(), part),
        (key, None) => (key.to_owned(), "on".to_owned()),
    };
    let parts = commas::split(text).into_iter().enumerate();
    parts.map(pair).collect()
}

/// A word as a shell reads it; with control characters, as a shell with `$'…'` (POSIX 2024, bash) does, so that a name of
/// a file has no effect on the terminal.
#[must_use]
pub fn quote(word: &str) -> String {
    if printable(word) != word {
        let mut quoted = String::from("$'");
        for letter in word.chars() {
            let text = letter.to_string();
            match letter {
                '\'' | '\\' => quoted.extend(['\\', letter]),
                _ if printable(&text) == text => quoted.push(letter),
                _ => quoted.extend(text.bytes().map(|byte| format!("\\{byte:03o}"))),
            }
        }
        return quoted + "'";
    }
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "@%+=:,./_-".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_words_are_the_first_value_or_switches() {
        let got = pairs("/dev/a,,b,id=x,,y,on", "path");
        let want = [("path", "/dev/a,b"), ("id", "x,y"), ("on", "on")];
        assert_eq!(got, want.map(|(key, value)| (key.into(), value.into())));
    }

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_was() {
        for word in ["plain", "", "two words", "it's", "$HOME `x` \"", "a,b=c/d"] {
            let out = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quote(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stdout), word);
        }
        assert_eq!(quote("id=a,b"), "id=a,b");
    }

    #[test]
    fn a_word_that_a_terminal_would_obey_is_quoted_without_its_control_characters() {
        let word = "/dev/it's\u{1b}[2J\n\\1\u{202e}\u{9b}ö";
        let quoted = quote(word);
        assert_eq!(quoted, r"$'/dev/it\'s\033[2J\012\\1\342\200\256\302\233ö'");
        let script = format!("printf %s {quoted}");
        match std::process::Command::new("bash")
            .args(["-c", &script])
            .output()
        {
            Ok(output) => assert_eq!(String::from_utf8_lossy(&output.stdout), word),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
        }
    }
}
