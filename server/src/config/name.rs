//! Names of exports.

use super::error::ConfigError;

/// Checks that a name can be a folder, a part of a socket path and a word in a table.
///
/// # Errors
///
/// When it cannot.
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    let ok = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with(['.', '-']);
    if ok {
        return Ok(());
    }
    Err(ConfigError::new(format!(
        "'{name}' is not a name for an export: give 1 to 64 letters, digits, '.', '_' or '-', the first neither \
         '.' nor '-' (NAME=KIND:ARG names an export)"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_runtime_directory_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            ".x",
            "-x",
            "a/b",
            "a b",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        for good in ["a", "disk-1.img_2", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
    }
}
