//! Sizes as people write them: `1G`, `512M`, `4096`.

/// A string that is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a size: give a number of bytes, or one with K, M, G, T, P or E (powers of 1024)"
)]
pub struct BadSize(String);

const UNITS: [(char, u32); 6] = [
    ('K', 10),
    ('M', 20),
    ('G', 30),
    ('T', 40),
    ('P', 50),
    ('E', 60),
];

/// Bytes from a number with an optional binary unit: `K`, `M`, `G`, `T`, `P`, `E`, also as `Ki` or `KiB`.
///
/// # Errors
///
/// When it is no such thing, or more than 64 bits hold.
pub fn parse_size(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.to_owned());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let unit = unit.to_ascii_uppercase();
    let shift = match unit
        .strip_suffix("IB")
        .or(unit.strip_suffix('I'))
        .unwrap_or(&unit)
    {
        "" if unit.is_empty() || unit == "B" => 0,
        unit => UNITS
            .iter()
            .find(|(letter, _)| unit.chars().eq([*letter]))
            .map(|(_, shift)| *shift)
            .ok_or_else(bad)?,
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// Bytes as people read them, exact: the largest unit that divides them, else bytes.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    for (letter, shift) in UNITS.iter().rev() {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{letter}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("1M", 1 << 20),
            ("1MiB", 1 << 20),
            ("3Gi", 3 << 30),
            ("16T", 16 << 40),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "G",
            "-1",
            "1.5G",
            "1GG",
            "1X",
            " 1",
            "1 G",
            "iB",
            "1iB",
            "16E",
            "99999999999T",
            "0x10",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        for (bytes, text) in [
            (0, "0"),
            (1, "1"),
            (1536, "1536"),
            (1 << 20, "1M"),
            (3 << 39, "1536G"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }
}
