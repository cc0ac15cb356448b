//! Lists with commas, `a,key=value,…`, as SPECs and QEMU's options have them. A doubled comma stands for one.

/// The parts of a list.
#[must_use]
pub fn split(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != ',' || letters.next_if_eq(&',').is_some() {
            part.push(letter);
        } else {
            parts.push(std::mem::take(&mut part));
        }
    }
    parts.push(part);
    parts
}

/// Key and value of a part; a bare word is a key without a value.
#[must_use]
pub fn key_value(part: &str) -> (&str, Option<&str>) {
    match part.split_once('=') {
        Some((key, value)) => (key, Some(value)),
        None => (part, None),
    }
}

/// A text as a part of a list.
#[must_use]
pub fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubled_comma_is_a_comma() {
        for (text, parts) in [
            ("", &[""][..]),
            ("a", &["a"]),
            ("/dev/a,,b,id=x,,y,on", &["/dev/a,b", "id=x,y", "on"]),
            ("a,,,b", &["a,", "b"]),
            (",a,", &["", "a", ""]),
        ] {
            assert_eq!(split(text), parts, "{text}");
            let escaped: Vec<_> = parts.iter().map(|part| escape(part)).collect();
            assert_eq!(split(&escaped.join(",")), parts, "{text}");
        }
    }

    #[test]
    fn a_part_is_a_key_with_or_without_a_value() {
        assert_eq!(key_value("id=x=y"), ("id", Some("x=y")));
        assert_eq!(key_value("id="), ("id", Some("")));
        assert_eq!(key_value("on"), ("on", None));
    }
}
